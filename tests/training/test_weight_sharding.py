"""--shard-weights on 2 and 4 ranks (Gloo): the bits of whole weights, 1/N of them on each rank, and the bytes of the formula."""

import json
import os
import random
import shutil
import socket
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace

import pytest
import torch

from nanochat import core_eval
from nanochat.cli.launch_environment import PeerLost
from nanochat.cli.paths import list_steps
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.loss_eval import evaluate_bpb, no_tokens
from nanochat.recipe.memory_estimate import MemoryConfig, estimate_memory
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.compilation import CompiledModel
from nanochat.runtime.device import evaluation
from nanochat.runtime.distributed import barrier, in_step
from nanochat.training import loop
from nanochat.training.build import build_run, build_trainer_only
from nanochat.training.config import parse_config
from nanochat.training.records import read_metrics
from nanochat.training.weight_sharding import WHOLE_BELOW
from nanochat.training.weight_units import unit_names
from processes import started, tiny_flags, train_and_exit, trained

TINY = ("--depth=4 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --vocab-size=600 --short-conv=4 --window-pattern=SL "
        "--device-batch-size=2 --warmup-steps=2 --core-metric-every=-1 --sample-every=-1 --eval-every=-1 --device-type=cpu "
        "--no-compile --dtype=float32 --num-iterations=40 --attention-backend=masked").split()
ONE = "--total-batch-size=TOKENS"  # one micro-batch: sums in the same order
FP8 = ["--fp8", "--fp8-emulate", "--fp8-min-dim=16"]
BF16 = ["--dtype=bfloat16", "--weight-gradient=torch", "--rotary-norm=torch", "--polar-express=plain"]
SUFFIX = ["--block-update-schedule=static_suffix", "--static-active-layers=2"]
EXACT = {  # these give the same bits
    "full": [ONE],
    "static suffix": [ONE, *SUFFIX],
    "progressive depth": [ONE, "--initial-depth=2", "--depth-growth-frac=0.05"],
    "relevance": [ONE, "--block-update-schedule=dynamic_suffix", "--dyn-freeze-start-frac=0", "--dyn-warmup-steps=1",
                  "--dyn-probe-every=3", "--dyn-min-active-layers=1", "--dyn-relevance-threshold=0.5"],
    "fp8": [ONE, *FP8],
    "bf16, chunked": [ONE, *BF16, "--bf16-momentum", "--chunked-ce", "--head-loss=torch", "--deferred-loss-logging"],
    "all at once": [ONE, *BF16, *FP8, "--fp8-skip-attn-qk", "--chunked-ce", "--cast-once"],
    "compiled": [ONE, *BF16, "--cast-once", "COMPILED", "--depth=2", "--aspect-ratio=32", "--short-conv=0"],
    "one layer": [ONE, "--depth=1", "--aspect-ratio=64"],
    "small tables": [ONE, "--depth=1", "--head-dim=8", "--aspect-ratio=24"],
}
ROUNDED = {"accumulated": ["--total-batch-size=256"]}  # 2 micro-batches
ON_FOUR = ("full", "small tables")
WATCHED = ("full", "static suffix", "progressive depth", "accumulated")
STEPS = {2: 6, 4: 3}  # by ranks


def trainer_of(base, flags, world_size):
    """A trainer of these flags; COMPILED among them compiles it in parts, by the cheapest backend that makes graphs."""
    known = [flag.replace("TOKENS", str(64 * world_size)) for flag in flags if flag != "COMPILED"]
    trainer = build_trainer_only(parse_config(FEATURES, [*TINY, f"--data={base / 'text'}", *known]))
    if "COMPILED" in flags:
        trainer.plan = replace(trainer.plan, compile=True)
        trainer.forward = CompiledModel(trainer.state.model, whole=False, backend="aot_eager")
    return trainer


def take_steps(trainer, count):
    results = []
    for _ in range(count):
        pending = trainer.launch_step()
        results.append(trainer.finalize_step(pending))
        trainer.state.features.after_step(results[-1].step, results[-1].loss, results[-1].time)
    return results


def all_weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state.sharding.weights_to_save()}


def stored(trainer):
    """Bytes of memory behind the model's tensors and the rows of tables that a rank owns."""
    model = trainer.state.model
    tensors = [*model.parameters(), *model.buffers(), *trainer.state.sharding.owned.values()]
    rotary = model.cos.untyped_storage().nbytes() + model.sin.untyped_storage().nbytes()
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values()) - rotary


@contextmanager
def watched(trainer):
    """Yields a list: the memory behind the weights, before and after each block and whenever a gradient has been computed."""
    seen, model = [], trainer.state.model

    def look(*_):
        seen.append(stored(trainer))
    hooks = [p.register_post_accumulate_grad_hook(look) for p in model.parameters()]
    for module in (*model.transformer.h, model.transformer.wte, *model.value_embeds.values(), model.lm_head):
        hooks += [module.register_forward_pre_hook(look), module.register_forward_hook(look)]
    yield seen
    for hook in hooks:
        hook.remove()


def compared(base, name, world_size):
    """Train a scenario with and without --shard-weights; what is known of both."""
    answer, flags = {}, (EXACT | ROUNDED)[name]
    for kind in ("whole", "divided"):
        trainer = trainer_of(base, [*flags, *["--shard-weights"] * (kind == "divided")], world_size)
        with watched(trainer) if name in WATCHED else nullcontext([]) as seen:
            results = take_steps(trainer, STEPS[world_size])
        if "COMPILED" in flags:
            assert all(trainer.forward.compiled_variants.values()) and not trainer.forward.graph_breaks
        trainer.loader.close()
        sharding, model = trainer.state.sharding, trainer.state.model
        answer[kind] = {
            "losses": [r.loss for r in results], "norms": [r.grad_norm for r in results], "trained": [r.trained for r in results],
            "active": [r.columns.get("active_layers") for r in results], "bytes": [r.columns["comm_bytes"] for r in results],
            "moments": sum(t.double().abs().sum().item() for t in trainer.state.optimizer.named_state().values()),
            "between": stored(trainer), "most": max(seen, default=0)}
        answer[kind, "weights"] = all_weights(trainer)
        if kind == "divided":
            units = {unit: sum(p.numel() * p.element_size() for p in model.get_submodule(unit).parameters())
                     for unit in unit_names(model)}
            answer["units"], answer["most here"] = units, sharding.units.most_here
            answer["after"] = stored(trainer)  # the weights were gathered in between
            answer["sent"] = {pieces[0].name: [p.numel(), p.element_size(), p in sharding.divided, [x.owner for x in pieces]]
                              for p, pieces in sharding.pieces.items()}
    whole, divided = answer.pop(("whole", "weights")), answer.pop(("divided", "weights"))
    assert whole.keys() == divided.keys()
    answer["apart"] = max((whole[name].float() - divided[name].float()).abs().max().item() for name in whole)
    return answer


# ---- processes

def join(number, world_size, port, base):
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_NATIVE": "0"}
    torch.set_num_threads(1)


def rank(number, world_size, port, base, names, out):
    join(number, world_size, port, base)
    answers = {name: compared(base, name, world_size) for name in names}
    if world_size == 2:
        answers["no scenario"] = {check.__name__: check(base, number) for check in (
            any_suffix, nan_on_one_rank, evaluated_in_between, broken_off)}
    (out / f"{number}.json").write_text(json.dumps(answers))


def on_ranks(world_size, target, *arguments, expected=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [started(target, number, world_size, port, *arguments) for number in range(world_size)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == (expected or [0] * world_size)


@pytest.fixture(scope="module")
def answers(base, tmp_path_factory):
    """world size -> answers of its ranks."""
    trainer_of(base, [ONE], 1).loader.close()  # the text is prepared
    found = {}
    for world_size, names in ((2, [*EXACT, *ROUNDED]), (4, ON_FOUR)):
        out = tmp_path_factory.mktemp(f"ranks{world_size}")
        on_ranks(world_size, rank, base, names, out)
        found[world_size] = [json.loads((out / f"{number}.json").read_text()) for number in range(world_size)]
    return found


def cases(names):
    return [(name, n) for name in names for n in (2, 4) if n == 2 or name in ON_FOUR]


# ---- the same training

@pytest.mark.slow
@pytest.mark.parametrize("name, world_size", cases(EXACT))
def test_the_bits_are_those_of_whole_weights(answers, name, world_size):
    for answer in answers[world_size]:
        whole, divided = answer[name]["whole"], answer[name]["divided"]
        assert min(whole["losses"]) < whole["losses"][0] - 0.01  # the last batch may be a hard one
        for key in ("losses", "trained", "active", "moments"):
            assert divided[key] == whole[key], key
        assert divided["norms"] == pytest.approx(whole["norms"], rel=1e-12)  # their squares are added up in another order
        assert answer[name]["apart"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDED)
def test_accumulated_gradients_differ_by_rounding(answers, name):
    """Ranks are summed before micro-batches, not after."""
    close = 1e-5
    for answer in answers[2]:
        whole, divided = answer[name]["whole"], answer[name]["divided"]
        assert divided["losses"] == pytest.approx(whole["losses"], rel=close) and divided["trained"] == whole["trained"]
        assert divided["norms"][:3] == pytest.approx(whole["norms"][:3], rel=close)
        assert all(rank[name]["divided"]["losses"] == divided["losses"] for rank in answers[2])


@pytest.mark.slow
def test_the_suffixes_were_of_several_lengths(answers):
    assert len(set(answers[2][0]["relevance"]["whole"]["active"])) > 1


# ---- memory and bytes

@pytest.mark.slow
@pytest.mark.parametrize("name, world_size", cases(WATCHED))
def test_a_rank_holds_its_share_and_few_units(answers, name, world_size):
    ranks = [answer[name] for answer in answers[world_size]]
    total, largest = ranks[0]["whole"]["between"], max(ranks[0]["units"].values())
    for answer in ranks:
        share = answer["divided"]["between"]
        assert share < 1.25 * total / world_size, "matrices are not divided, so the shares differ"
        assert share == answer["after"]
        assert answer["divided"]["most"] <= share + answer["most here"]
        assert share + largest < answer["divided"]["most"] < share + 3 * largest < total
    assert sum(answer["divided"]["between"] for answer in ranks) < 1.1 * total


@pytest.mark.slow
@pytest.mark.parametrize("name, world_size", cases((*WATCHED, "bf16, chunked", "fp8")))
def test_bytes_are_those_of_the_formula(answers, name, world_size):
    """(N-1) (M (F + B + G) + s), of all ranks together. Blocks that are left out do not travel."""
    ranks = [answer[name] for answer in answers[world_size]]
    step, blocks = (0, 2) if name == "progressive depth" else (-1, 4)
    sent = sum(answer["divided"]["bytes"][step] for answer in ranks)
    weights, micro_batches, suffix = ranks[0]["sent"], 2 if name == "accumulated" else 1, name == "static suffix"
    forward = backward = gradients = 0
    small = [0] * world_size
    for key, (count, size, divided, owners) in weights.items():
        block = int(key.split(".")[2]) if key.startswith("transformer.h.") else None
        table = "wte" in key or "value_embeds" in key
        layer = block if block is not None else int(key.split(".")[1]) if "value_embeds" in key else None
        if layer is not None and layer >= blocks:
            continue
        trained = not suffix or (layer >= 2 if layer is not None else "wte" in key or key in ("lm_head.weight", "backout_lambda"))
        gradients += count * size * trained
        linear = divided and not table
        wire = count * (2 if name == "bf16, chunked" and linear else 1 if name == "fp8" and linear else size)
        if name == "fp8" and linear:
            wire += 4 * (len(owners) == 1)  # the scale; that of rows each rank knows
        if divided:
            forward += wire
            backward += wire * (trained and block is not None and block != blocks - 1)
        elif trained:
            small[owners[0]] += count * size
    expected = micro_batches * (forward + backward + gradients) + world_size * max(small)
    assert sent == (world_size - 1) * expected
    if blocks == 4:
        assert all(set(answer["divided"]["bytes"]) == {answer["divided"]["bytes"][-1]} for answer in ranks)


def test_small_parameters_are_on_all_ranks():
    assert WHOLE_BELOW <= 2**14, "tables that are divided by rows must be among the divided"


# ---- in the midst of training

def whole_and_divided(base, *flags):
    return [trainer_of(base, [ONE, *flags, *extra], 2) for extra in ([], ["--shard-weights"])]


def any_suffix(base, number):
    """Any sequence of what is trained. The same bits with and without?"""
    trainers, same = whole_and_divided(base, "--num-iterations=2000"), True
    choose, seen = random.Random(7), set()
    for _ in range(10):
        args = {"active_start": choose.randrange(4), "detach_x0": choose.random() < 0.5}
        seen.add(tuple(args.values()))
        losses = []
        for trainer in trainers:
            trainer.state.features.before_step = lambda step, args=args: args
            losses += [r.loss for r in take_steps(trainer, 1)]
        same &= losses[0] == losses[1]
    weights = list(map(all_weights, trainers))
    for trainer in trainers:
        trainer.loader.close()
    return [len(seen) > 4, same, all(weights[0][name].equal(weights[1][name]) for name in weights[0])]


def nan_on_one_rank(base, number):
    """One rank's gradients are no numbers: no rank changes a weight, and all know. Then training goes on."""
    trainer, changed = whole_and_divided(base)[1], []
    take_steps(trainer, 2)
    before = all_weights(trainer)
    hook = trainer.state.model.transformer.h[1].mlp.c_fc.weight.register_hook(lambda g: g * torch.nan) if number else None
    bad = take_steps(trainer, 1)[0]
    after = all_weights(trainer)
    changed = [name for name in before if not before[name].equal(after[name])]
    if hook:
        hook.remove()
    good = take_steps(trainer, 1)[0]
    trainer.loader.close()
    return [changed, bad.not_finite, good.not_finite]


def evaluated_in_between(base, number):
    """Bits per byte in the midst of training, where rank 0 has two batches more than the other, and the score of a CORE task of
    which it has one question more: as whole weights give them."""
    task = {"label": "task", "type": "multiple_choice", "delimiter": " ", "num_fewshot": 1, "path": "task"}
    questions = [{"query": "def f" * (i % 5 + 1), "choices": ["return x", "import torch"], "gold": i % 2} for i in range(7)]
    core_eval.FORWARD_TOKENS = 64  # a forward pass for each
    answers = []
    for trainer in whole_and_divided(base, *FP8):
        model, device = trainer.state.model, trainer.plan.device
        token_bytes, found = torch.ones(600, dtype=torch.int64), []
        for _ in range(2):
            take_steps(trainer, 2)
            generator = torch.Generator().manual_seed(number)
            batches = [(torch.randint(600, (2, 32), generator=generator),) * 2 for _ in range(3 if number == 0 else 1)]
            if model.called_in_step:
                batches = in_step(batches, no_tokens(32, device), device)
            with evaluation(model), trainer.state.features.eval_context(model):
                found.append(evaluate_bpb(model, batches, None, token_bytes))
                found.append(core_eval.evaluate_task(model, trainer.plan.tokenizer, device, task, questions))
        answers.append(found)
        trainer.loader.close()
    return answers


def broken_off(base, number):
    """A forward pass and a backward pass that end in an error on all ranks: the next step is as if they had not been."""
    whole, divided = whole_and_divided(base)
    for trainer in (whole, divided):
        take_steps(trainer, 1)
    model, tokens = divided.state.model, torch.zeros((2, 32), dtype=torch.int64)

    def fail(*_):
        raise MemoryError("played")
    blocks = model.transformer.h
    for hook in (blocks[2].register_forward_pre_hook(fail), blocks[1].mlp.c_fc.weight.register_hook(fail)):
        with pytest.raises(MemoryError):
            model(tokens, tokens).backward()
        hook.remove()
        divided.state.sharding.zero_grad()
    losses = [[r.loss for r in take_steps(trainer, 2)] for trainer in (whole, divided)]
    for trainer in (whole, divided):
        trainer.loader.close()
    return losses


@pytest.mark.slow
def test_what_is_trained_may_change_from_step_to_step(answers):
    assert all(answer["no scenario"]["any_suffix"] == [True] * 3 for answer in answers[2])


@pytest.mark.slow
def test_nan_gradients_of_one_rank_reach_no_weight(answers):
    for answer in answers[2]:
        changed, bad, good = answer["no scenario"]["nan_on_one_rank"]
        assert (changed, bad, good) == ([], ["transformer.h.1.mlp.c_fc.weight"], [])


@pytest.mark.slow
def test_an_evaluation_changes_nothing_and_needs_no_equal_number_of_batches(answers):
    whole, divided = answers[2][0]["no scenario"]["evaluated_in_between"]
    assert whole == divided and whole == answers[2][1]["no scenario"]["evaluated_in_between"][1]


@pytest.mark.slow
def test_after_an_error_in_a_pass_the_next_one_is_right(answers):
    for answer in answers[2]:
        whole, divided = answer["no scenario"]["broken_off"]
        assert whole == divided


# ---- whole runs

RUN = ["--total-batch-size=128", "--num-iterations=6", "--save-every=3", "--dtype=float32", "--head-dim=16",
       "--aspect-ratio=32", "--attention-backend=masked", "--on-divergence=rollback", "--audit"]


def fit_one(base, tag, *flags, before=lambda run: None):
    run = build_run(parse_config(FEATURES, tiny_flags(base, tag, *RUN, *flags)))
    before(run)
    assert loop.fit(run) == 0


def copied(base, source, tag, number, step=3):
    """A copy of a run as it was at a step, on rank 0; the other waits for it in build_run."""
    folder = base / "base_checkpoints" / tag
    if number == 0:
        shutil.copytree(base / "base_checkpoints" / source, folder)
        for later in folder.glob("step_*"):
            if int(later.name[5:]) > step:
                shutil.rmtree(later)
    barrier()
    return tag


def lets_diverge(number):
    """At step 4 the gradients of rank 1 are no numbers, once."""
    def before(run):
        def hook(gradient):
            if run.state.step == 4 and number and not run.state.stats.rollbacks:
                return gradient * torch.nan
        run.state.model.transformer.h[0].attn.c_q.weight.register_hook(hook)
    return before


def runs(number, world_size, port, base):
    join(number, world_size, port, base)
    with redirect_stdout(open(base / f"said-{number}", "w")):
        fit_one(base, "whole", "--sample-every=6")
        fit_one(base, "divided", "--sample-every=6", "--shard-weights")
        fit_one(base, copied(base, "divided", "divided-on", number), "--shard-weights", "--resume-from-step=latest")
        fit_one(base, copied(base, "divided", "whole-on", number), "--resume-from-step=latest")
        fit_one(base, copied(base, "one", "one-on", number), "--shard-weights", "--resume-from-step=latest")
        for tag in ("whole", "divided"):
            flags = ["--shard-weights"] * (tag == "divided")
            fit_one(base, f"{tag}-back", *flags, before=lets_diverge(number))


@pytest.fixture(scope="module")
def of_runs(base):
    for tag in ("one", "one-divided"):
        trained(build_run(parse_config(FEATURES, tiny_flags(base, tag, *RUN, *["--shard-weights"] * (tag == "one-divided")))))
    on_ranks(2, runs, base)
    return base / "base_checkpoints"


def files(run_dir, step=6):
    return {path.name: path.read_bytes() for path in (run_dir / f"step_{step:06d}").glob("*.safetensors")}


def losses(run_dir):
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if row.get("loss") is not None]


@pytest.mark.slow
def test_checkpoints_are_the_files_of_whole_weights(of_runs):
    for step in (3, 6):
        assert files(of_runs / "divided", step) == files(of_runs / "whole", step) and len(files(of_runs / "divided", step)) == 3
    assert losses(of_runs / "divided") == losses(of_runs / "whole")
    assert files(of_runs / "one") == files(of_runs / "one-divided"), "with one rank it does nothing"


@pytest.mark.slow
def test_it_is_switched_on_and_off_at_a_resume(of_runs, base):
    """On 2 ranks to the same bits; from and to one rank within rounding."""
    for tag in ("divided-on", "whole-on"):
        assert files(of_runs / tag) == files(of_runs / "divided") and losses(of_runs / tag) == losses(of_runs / "whole")
    assert losses(of_runs / "one-on") == pytest.approx(losses(of_runs / "one"), abs=1e-4)
    shutil.copytree(of_runs / "divided", of_runs / "on-one")
    shutil.rmtree(of_runs / "on-one" / "step_000006")
    trained(build_run(parse_config(FEATURES, tiny_flags(base, "on-one", *RUN, "--resume-from-step=latest"))))
    assert losses(of_runs / "on-one") == pytest.approx(losses(of_runs / "divided"), abs=1e-4)


@pytest.mark.slow
def test_evaluations_samples_and_the_audit_are_those_of_whole_weights(of_runs):
    rows = {tag: read_metrics(of_runs / tag / "metrics.jsonl") for tag in ("whole", "divided")}
    whole, divided = ([{key: row.get(key) for key in ("val_bpb", "samples")} for row in of_one] for of_one in rows.values())
    assert whole == divided and any(row["samples"] for row in divided) and sum(row["val_bpb"] is not None for row in divided) == 3
    for tag in ("whole", "divided"):
        audit = json.loads((of_runs / tag / "result.json").read_text())["audit"]
        assert audit["changed_between_steps"] == [] and audit["backward_calls"] == audit["backward_declared"]


@pytest.mark.slow
def test_a_rollback_is_that_of_whole_weights(of_runs):
    assert files(of_runs / "divided-back") == files(of_runs / "whole-back") != files(of_runs / "whole")


def short_of_memory(number, world_size, port, base, log):
    """Memory runs out on rank 1 alone, in the midst of a forward pass."""
    join(number, world_size, port, base)
    os.environ["NANOCHAT_PATIENCE"] = "3"
    os.dup2(os.open(log / str(number), os.O_WRONLY | os.O_CREAT), 2)
    run = build_run(parse_config(FEATURES, tiny_flags(base, "short", *RUN, "--shard-weights")))

    def fail(*_):
        if number and run.state.step == 4:
            raise MemoryError("played")
    run.state.model.transformer.h[1].register_forward_pre_hook(fail)
    train_and_exit(run)


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(of_runs, base, tmp_path):
    on_ranks(2, short_of_memory, base, tmp_path, expected=[PeerLost.status, 1])
    assert "oom: rank 1: out of memory" in (tmp_path / "1").read_text()
    assert list_steps(of_runs / "short") == [3]


# ---- flags and estimates

@pytest.mark.parametrize("flags, says", [
    (["--compile-evaluation"], "--compile-evaluation makes one graph"), (["--fused-qkv=fused"], "keeps a copy of the weights"),
    ([*FP8, "--fp8-debug", "--no-compile"], "--fp8-debug looks at whole weights"),
    ([*FP8, "--fp8-policy=auto"], "--fp8-policy auto")])
def test_what_it_cannot_be_combined_with_is_said(monkeypatch, flags, says):
    monkeypatch.setenv("WORLD_SIZE", "2")
    parse_config(FEATURES, [*flags, "--device-type=cpu"])
    with pytest.raises(UserError, match=says):
        parse_config(FEATURES, [*flags, "--device-type=cpu", "--shard-weights"])


def test_the_estimate_divides_weights_gradients_and_moments():
    shape = GPTConfig(n_layer=24, n_embd=1536, n_head=12, n_kv_head=12, vocab_size=32768, sequence_len=2048)
    whole, divided = (estimate_memory(shape, 4, MemoryConfig(2, True, cuda=True, weight_ranks=n)) for n in (1, 8))
    assert divided.moments == whole.moments // 8 and divided.activations < whole.activations
    assert whole.weights / 8 < divided.weights < whole.weights / 2
    assert whole.gradients / 8 < divided.gradients < whole.gradients
    assert parse_config(FEATURES, ["--shard-weights"]).memory_fields().get("weight_ranks") is None  # alone
