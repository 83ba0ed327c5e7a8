"""Training on 2 and 4 ranks (Gloo) gives what one rank gives, whatever is trained, and each rank holds and sends its share."""

import json
import os
import random
import socket

import pytest
import torch

from nanochat.features import FEATURES
from nanochat.optim import split_label
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.distributed import grad_scaler
from nanochat.training.build import build_trainer_only
from nanochat.training.config import parse_config
from nanochat.training.sharding import SPLIT_FROM, divide
from processes import started

MODEL = "--depth=4 --head-dim=16 --aspect-ratio=8 --max-seq-len=32 --vocab-size=600 --short-conv=4 --window-pattern=SL"
TINY = (f"{MODEL} --total-batch-size=512 --device-batch-size=4 --warmup-steps=4 --core-metric-every=-1 --sample-every=-1 "
        "--eval-every=-1 --device-type=cpu --no-compile --dtype=float32 --num-iterations=50").split()
SCENARIOS = {
    "full": [],
    "one micro-batch": ["--total-batch-size=512", "--device-batch-size=WHOLE"],
    "static suffix": ["--block-update-schedule=static_suffix", "--static-active-layers=2"],
    "dynamic suffix": ["--block-update-schedule=dynamic_suffix", "--dyn-freeze-start-frac=0.2", "--dyn-warmup-steps=4",
                       "--dyn-probe-every=6"],
    "progressive depth": ["--initial-depth=2", "--depth-growth-frac=0.2"],
    "chunked": ["--chunked-ce", "--deferred-loss-logging"],
    "fp8": ["--fp8", "--fp8-emulate", "--fp8-min-dim=16"],
    "bf16 momentum": ["--bf16-momentum"],
}
ON_FOUR = ("full", "dynamic suffix", "chunked")  # of these on 4 ranks, too
STEPS = {"full": 50, "dynamic suffix": 50}  # others 20


def losses_of(base, flags, world_size, num_steps):
    """Train in this process, which may be one of several ranks; what is known of it at the end."""
    flags = [flag.replace("WHOLE", str(16 // world_size)) for flag in flags]
    trainer = build_trainer_only(parse_config(FEATURES, [*TINY, f"--data={base / 'text'}", *flags]))
    state, steps = trainer.state, []
    for _ in range(num_steps):
        pending = trainer.launch_step()
        steps.append(trainer.finalize_step(pending))
        state.features.after_step(steps[-1].step, steps[-1].loss, steps[-1].time)
    trainer.loader.close()
    moments = {key: [*tensor.shape] for key, tensor in state.optimizer.named_state().items()}
    weights = torch.cat([p.detach().flatten().double() for p in state.model.parameters()])
    return {"losses": [step.loss for step in steps], "norms": [step.grad_norm for step in steps],
            "trained": [step.trained for step in steps], "active": [step.columns.get("active_layers") for step in steps],
            "bytes": [step.columns.get("comm_bytes") for step in steps], "moments": moments,
            "weights": [weights.sum().item(), weights.square().sum().item()],
            "memory": sum(t.numel() * t.element_size() for s in state.optimizer.state.values() for t in s.values()),
            "parameters": {name: [p.numel(), p.element_size()] for name, p in state.model.named_parameters()}}


def rank(number, world_size, port, base, scenarios, out):
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "NANOCHAT_BASE_DIR": str(base)}
    torch.set_num_threads(1)
    (out / f"{number}.json").write_text(json.dumps(
        {name: losses_of(base, flags, world_size, STEPS.get(name, 20)) for name, flags in scenarios.items()}))


def on_ranks(world_size, base, scenarios, out):
    """The answers of each rank: scenario -> what `losses_of` gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [started(rank, number, world_size, port, base, scenarios, out) for number in range(world_size)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0] * world_size
    return [json.loads((out / f"{number}.json").read_text()) for number in range(world_size)]


@pytest.fixture(scope="module")
def answers(base, tmp_path_factory):
    """world size -> answers of its ranks. One rank first: it prepares the text, and the kernels are chosen once."""
    of_four = {name: SCENARIOS[name] for name in ON_FOUR}
    return {n: on_ranks(n, base, of_four if n == 4 else SCENARIOS, tmp_path_factory.mktemp(f"ranks{n}")) for n in (1, 2, 4)}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_several_ranks_train_like_one(answers, scenario):
    one = answers[1][0][scenario]
    assert one["losses"][-1] < one["losses"][0] - 0.3
    for world_size in (2, 4) if scenario in ON_FOUR else (2,):
        ranks = [answer[scenario] for answer in answers[world_size]]
        for key in ("losses", "norms", "trained", "active", "weights"):
            assert all(ranked[key] == ranks[0][key] for ranked in ranks), f"{key}: the ranks differ"
        assert ranks[0]["trained"] == one["trained"] and ranks[0]["active"] == one["active"]
        # the order of sums differs; what training makes of that grows with the steps
        assert ranks[0]["losses"][:3] == pytest.approx(one["losses"][:3], rel=2e-6 if scenario != "fp8" else 1e-3)
        assert ranks[0]["norms"][:3] == pytest.approx(one["norms"][:3], rel=2e-5 if scenario != "fp8" else 1e-2)
        assert ranks[0]["losses"] == pytest.approx(one["losses"], rel=1e-3 if scenario not in ("fp8", "bf16 momentum") else 5e-3)


@pytest.mark.slow
def test_a_suffix_was_trained(answers):
    """Or the scenarios above say nothing about it."""
    assert set(answers[1][0]["static suffix"]["active"]) == {2}
    assert len(set(answers[1][0]["dynamic suffix"]["active"])) > 1


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_moment_has_one_owner(answers, scenario):
    whole = answers[1][0][scenario]["moments"]
    for world_size in (2, 4) if scenario in ON_FOUR else (2,):
        rows: dict[str, list] = {}
        for answer in answers[world_size]:
            for key, shape in answer[scenario]["moments"].items():
                label, _, slot = key.rpartition("/")
                name, part = split_label(label)
                rows.setdefault(f"{name}/{slot}", []).append((part, shape))
        assert rows.keys() == whole.keys()
        for key, parts in rows.items():
            if parts[0][0] == slice(None):
                assert [shape for _, shape in parts] == [whole[key]], f"{key} has several owners"
            elif whole[key]:
                parts.sort(key=lambda part: part[0].start)
                assert [part.start for part, _ in parts[1:]] == [part.stop for part, _ in parts[:-1]]
                assert parts[0][0].start == 0 and parts[-1][0].stop == whole[key][0]
                assert all(shape == [part.stop - part.start, *whole[key][1:]] for part, shape in parts)


@pytest.mark.slow
def test_bytes_follow_the_formula(answers):
    """(N-1)/N of the gradients out and as much back, of all ranks together. On the way back short rows are filled up."""
    for scenario, world_size in (("full", 2), ("static suffix", 2), ("full", 4)):
        ranks, one = [answer[scenario] for answer in answers[world_size]], answers[1][0][scenario]
        trained = {key.rpartition("/")[0] for key in one["moments"]}  # a parameter that is never trained has no moments
        there = sum(n * size for name, (n, size) in one["parameters"].items() if name in trained) * (world_size - 1)
        assert 2 * there <= sum(ranked["bytes"][-1] for ranked in ranks) <= 2.1 * there
        assert all(set(ranked["bytes"]) == {ranked["bytes"][-1]} for ranked in ranks)
    full, suffix = (answers[2][0][scenario]["bytes"][-1] for scenario in ("full", "static suffix"))
    assert suffix < 0.75 * full


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_owners_have_equal_shares_of_memory_and_of_muon(world_size):
    """Of a model of usual shape, whole and for every suffix of its blocks."""
    from nanochat.checkpoint_manager import empty_model
    model = empty_model(GPTConfig(n_layer=12, n_embd=768, n_head=6, n_kv_head=6, vocab_size=32768, short_conv=4), torch.float32)
    optimizer = model.setup_optimizer()
    muon = {p for group in optimizer.param_groups if group["kind"] == "muon" for p in group["params"]}
    pieces = divide(model.named_parameters(), muon.__contains__, world_size)
    assert sum(piece.numel() for piece in pieces) == sum(p.numel() for p in model.parameters())
    memory = [sum(piece.numel() * (1 if piece.parameter in muon else 2) for piece in pieces if piece.owner == owner)
              for owner in range(world_size)]
    assert max(memory) < 1.1 * sum(memory) / world_size
    for start in range(0, 12, 3):
        work = [sum(piece.numel() * min(piece.parameter.shape) for piece in pieces if piece.owner == owner
                    and piece.parameter in muon and int(piece.name.split(".")[2]) >= start) for owner in range(world_size)]
        assert max(work) <= sum(work) / world_size + 768 * 3072 * 768  # one matrix of the MLP more than the mean (Graham 1966)


def test_small_tables_and_few_rows_are_not_divided():
    shapes = {"small": (4, SPLIT_FROM // 4 - 1), "few rows": (2, SPLIT_FROM), "large": (7, SPLIT_FROM)}
    tables = {name: torch.zeros(shape) for name, shape in shapes.items()}
    pieces = divide(tables.items(), lambda p: False, 3)
    assert sorted((piece.name, piece.start) for piece in pieces if piece.start is not None) == [
        ("large", 0), ("large", 2), ("large", 4)]
    assert sum(piece.numel() for piece in pieces) == sum(table.numel() for table in tables.values())


# ---- any sequence of active_start

def random_starts(number, world_size, port, base, out):
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(number), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "NANOCHAT_BASE_DIR": str(base)}
    torch.set_num_threads(1)
    trainer = build_trainer_only(parse_config(FEATURES, [*TINY, f"--data={base / 'text'}", "--total-batch-size=256",
                                                         "--num-iterations=2000", "--short-conv=0"]))
    choose, seen = random.Random(7), set()
    for _ in range(200):
        for _ in range(choose.randrange(1, 4)):
            args = {"active_start": choose.randrange(4), "detach_x0": choose.random() < 0.5}
            seen.add(tuple(args.values()))
            trainer.state.features.before_step = lambda step, args=args: args
            result = trainer.finalize_step(trainer.launch_step())
            assert not result.not_finite
    trainer.loader.close()
    weights = torch.cat([p.detach().flatten().double() for p in trainer.state.model.parameters()])
    (out / str(number)).write_text(json.dumps([len(seen), result.loss, weights.sum().item(), overflow_on_one_rank(number)]))


def overflow_on_one_rank(number):
    """A weight and the loss scale after a step of fp16 training whose gradients overflow on rank 1 alone."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), grad_scaler(torch.device("cpu"), enabled=True)
    scaler.scale((weight * (torch.inf if number else 1.0)).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    before = scaler.get_scale()
    scaler.update()
    return [weight.tolist(), scaler.get_scale() / before]


@pytest.mark.slow
def test_no_sequence_of_trained_blocks_blocks_the_ranks(answers, base, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [started(random_starts, number, 2, port, base, tmp_path) for number in range(2)]
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / str(number)).read_text()) for number in range(2))
    assert first == second and first[0] == 8
    assert first[-1] == [[1.0, 1.0, 1.0], 0.5]  # no rank takes the step, and all lower the scale
