"""Whole runs, small but real: text to checkpoint, the same bits twice and after a resume, and what is left when it fails."""

import copy
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.features import FEATURES
from nanochat.runtime.compilation import CompiledModel, graphs_compiled
from nanochat.runtime.compute_dtype import pick_compute_dtype
from nanochat.runtime.provenance import source_fingerprint
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from nanochat.training.plot import plot_run
from nanochat.training.records import RESULT_FIELDS, ROW_COLUMNS, read_metrics
from processes import Served, anew, compile_with, python_m
from training_text import write_text

ROOT = Path(__file__).parents[2]
STEPS = 12
OTHER_DTYPE = "float32" if pick_compute_dtype(torch.device("cpu"))[0] == torch.bfloat16 else "bfloat16"  # than `auto` takes here
TINY = ("--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --device-batch-size=4 --total-batch-size=256 "
        f"--num-iterations={STEPS} --warmup-steps=4 --eval-every=6 --eval-tokens=1500 --core-metric-every=-1 --sample-every=-1 "
        "--device-type=cpu").split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory with a tokenizer and tokens of a longer text."""
    base = tmp_path_factory.mktemp("base")
    write_text(base / "text", files=40)
    done = cli(base, "--vocab-size=400", "--num-iterations=1", "--no-compile", "--model-tag=first", module="scripts.base_train")
    assert done.returncode == 0, done.stderr
    return base


@pytest.fixture(autouse=True)
def in_base(base, monkeypatch, request):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))


def flags(base, *extra):
    return [*TINY, f"--data={base / 'text'}", *extra]


def cli(base, *extra, module="scripts.base_train", tiny=True):
    """Run a script in a process of its own."""
    argv = anew(flags(base, *extra)) if module == "scripts.base_train" and tiny else flags(base, *extra) if tiny else list(extra)
    return python_m(module, *argv, NANOCHAT_BASE_DIR=str(base))


def run_here(base, tag, *extra, features=FEATURES):
    """Run in this process; returns the run's folder and its rows."""
    run = build_run(parse_config(features, anew(flags(base, f"--model-tag={tag}", *extra))), features)
    assert fit(run) == 0
    return run.plan.run_dir, read_metrics(run.plan.run_dir / "metrics.jsonl")


def losses(rows):
    return [(r["step"], r["loss"]) for r in rows if r["loss"] is not None]


def result(run_dir):
    return json.loads((run_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def plain(base):
    """The run that others are compared with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        return run_here(base, "plain", "--no-compile", "--save-every=5")


def test_a_run_leaves_its_records(plain, base):
    run_dir, rows = plain
    assert all(set(ROW_COLUMNS) <= set(row) for row in rows)
    assert [s for s, _ in losses(rows)] == list(range(STEPS))
    assert [r["step"] for r in rows if r["val_bpb"] is not None] == [0, 6, STEPS]
    first, last = losses(rows)[0][1], losses(rows)[-1][1]
    assert first == pytest.approx(math.log(400), abs=0.05) and last < first - 0.1
    done = result(run_dir)
    assert list(done) == list(RESULT_FIELDS) and done["status"] == "ok" and done["exit_code"] == 0
    assert done["steps_done"] == STEPS and done["tokens_seen"] == STEPS * 256 and done["peak_mem_mib"] > 50
    assert done["val_bpb"] == done["val_curve"][-1][2] == rows[-1]["val_bpb"] and done["fp8_layers"] is None
    assert done["train_time_sec"] == pytest.approx(sum(r["dt_ms"] or 0 for r in rows) / 1000)
    assert done["tok_per_sec_avg"] == pytest.approx(STEPS * 256 / done["train_time_sec"])
    assert done["audit"] is None and done["source_fingerprint"] == source_fingerprint()
    assert done["save_time_sec"] > 0 and done["unnamed_time_sec"] > 0 and done["loop_time_sec"] < done["wall_time_sec"]
    parts = ("train_time_sec", "eval_time_sec", "compile_time_sec", "save_time_sec", "unnamed_time_sec")
    assert done["loop_time_sec"] == pytest.approx(sum(done[part] for part in parts))
    assert (run_dir / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(p.name for p in run_dir.glob("step_*")) == ["step_000005", "step_000010", "step_000012"]
    assert (run_dir / "tokenizer" / "tokenizer.json").exists()


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits_in_another_process(plain, base):
    done = cli(base, "--no-compile", "--model-tag=again")
    assert done.returncode == 0, done.stderr
    assert losses(read_metrics(base / "base_checkpoints/again/metrics.jsonl")) == losses(plain[1])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4])
def test_training_goes_through_the_graph_that_was_warmed_up(base, rows):
    torch._dynamo.reset()
    run = build_run(parse_config(FEATURES, flags(base, f"--model-tag=graphs{rows}", "--no-compile", "--num-iterations=2",
                                           f"--device-batch-size={rows}")), FEATURES)
    compile_with(run, CompiledModel(run.state.model, whole=True, backend="eager"))
    graphs = graphs_compiled()
    assert fit(run) == 0
    assert graphs_compiled() == graphs + 1


def test_another_seed_gives_others(plain, base):
    _, rows = run_here(base, "seed", "--no-compile", "--seed=7", "--num-iterations=2", "--eval-every=-1")
    assert losses(rows)[0][1] != losses(plain[1])[0][1]


@pytest.mark.parametrize("step", ["5", "10", "latest"])
def test_a_resumed_run_ends_in_the_same_bits(plain, base, step):
    """Losses, evaluations and final weights; each step is in metrics.jsonl once."""
    tag = f"resumed-{step}"
    shutil.copytree(plain[0], base / "base_checkpoints" / tag)
    if step == "latest":  # as if the run had ended after step 5 and been cut off while writing the rest
        for later in ("step_000010", "step_000012"):
            shutil.rmtree(base / "base_checkpoints" / tag / later)
        with open(base / "base_checkpoints" / tag / "metrics.jsonl", "a") as f:
            f.write('{"step": 11, "loss"')
    run_dir, rows = run_here(base, tag, "--no-compile", "--save-every=5", f"--resume-from-step={step}")
    assert losses(rows) == losses(plain[1])
    assert [(r["step"], r["val_bpb"]) for r in rows if r["val_bpb"]] == \
        [(r["step"], r["val_bpb"]) for r in plain[1] if r["val_bpb"]]
    for name in ("model.safetensors", "optimizer.safetensors"):
        final = f"step_{STEPS:06d}/{name}"
        assert (run_dir / final).read_bytes() == (plain[0] / final).read_bytes()
    assert result(run_dir)["steps_done"] == STEPS and len(result(run_dir)["val_curve"]) == 3


@pytest.fixture(scope="module")
def compiled(base):
    """The losses of a compiled run in a process of its own."""
    done = cli(base, "--model-tag=compiled")
    assert done.returncode == 0, done.stderr
    return losses(read_metrics(base / "base_checkpoints/compiled/metrics.jsonl"))


def follows(compiled, eager):
    """Whether the first steps agree to bf16 rounding; later ones drift apart as any two roundings do."""
    return [loss for _, loss in compiled[:3]] == pytest.approx([loss for _, loss in eager[:3]], rel=1e-3)


@pytest.mark.slow
def test_killed_and_resumed_compiled(compiled, base):
    """kill -9 in the middle, then `latest`: the same losses as a compiled run that was left alone."""
    victim = Served(flags(base, "--model-tag=victim", "--save-every=1"), base, base / "victim.log")
    folder = base / "base_checkpoints/victim"
    deadline = time.monotonic() + 240
    while not (folder / "step_000003").exists() and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.kill()
    victim.wait()
    assert (folder / "step_000003").exists()
    done = cli(base, "--model-tag=victim", "--save-every=1", "--resume-from-step=latest")
    assert done.returncode == 0, done.stderr
    assert losses(read_metrics(folder / "metrics.jsonl")) == compiled
    times = result(folder)
    assert times["compile_time_sec"] > 1 and times["train_time_sec"] < times["wall_time_sec"]


@pytest.mark.slow
def test_compiled_training_follows_eager(plain, compiled):
    assert len(compiled) == STEPS and compiled != losses(plain[1]) and follows(compiled, losses(plain[1]))


@pytest.mark.slow
def test_a_compiled_evaluation_changes_no_step(compiled, base):
    """The losses stay to the bit; the bits per byte to bf16 rounding. It compiles in no step's time."""
    run_dir, rows = run_here(base, "compiled-evaluation", "--compile-evaluation")
    assert losses(rows) == compiled
    others = read_metrics(base / "base_checkpoints/compiled/metrics.jsonl")
    assert [r["val_bpb"] for r in rows if r["val_bpb"]] == pytest.approx([r["val_bpb"] for r in others if r["val_bpb"]], rel=1e-3)
    done, other = result(run_dir), result(base / "base_checkpoints/compiled")
    assert (done["eager_fallbacks"], done["graph_breaks"]) == (0, 0) and other["graph_breaks"] == 0


@pytest.mark.slow
def test_compiled_in_parts_training_follows_eager(plain, base):
    run_dir, rows = run_here(base, "parts", "--compile-parts")
    assert follows(losses(rows), losses(plain[1]))
    assert result(run_dir)["compiled_graphs"] >= 4 and result(run_dir)["eager_fallbacks"] == 0  # two kinds of blocks at least


FP32 = ("--no-compile", "--dtype=float32", "--num-iterations=3", "--eval-every=3")


@pytest.fixture(scope="module")
def by_four(base):
    """The rows of a run in fp32, four rows of text at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        return run_here(base, "micro-4", *FP32)[1]


@pytest.mark.slow
@pytest.mark.parametrize("micro", ["1", "2", "8"])
def test_micro_batches_change_neither_the_data_nor_the_metric(by_four, base, micro):
    """fp32, so that only the order of summation differs; three steps at a high rate blow that up, so the metric is
    compared most closely on the untrained model, which is the same in all runs."""
    _, rows = run_here(base, f"micro-{micro}", *FP32, f"--device-batch-size={micro}")
    assert [loss for _, loss in losses(rows)] == pytest.approx([loss for _, loss in losses(by_four)], rel=1e-4)
    assert rows[0]["val_bpb"] == pytest.approx(by_four[0]["val_bpb"], rel=1e-6)
    assert rows[-1]["val_bpb"] == pytest.approx(by_four[-1]["val_bpb"], rel=2e-4)


@pytest.mark.slow
def test_two_ranks_train_like_one(base, quick_python):
    common = ("--no-compile", "--dtype=float32", "--device-batch-size=2")
    done = subprocess.run(
        [quick_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.base_train",
         *flags(base, *common, "--model-tag=ranks")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    _, rows = run_here(base, "one-rank", *common)
    both = read_metrics(base / "base_checkpoints/ranks/metrics.jsonl")
    assert [loss for _, loss in losses(both)][:4] == pytest.approx([loss for _, loss in losses(rows)][:4], rel=1e-4)
    assert both[0]["val_bpb"] == pytest.approx(rows[0]["val_bpb"], rel=1e-6)
    assert both[-1]["val_bpb"] == pytest.approx(rows[-1]["val_bpb"], rel=1e-2)


@pytest.mark.slow
def test_ranks_agree_on_the_end_of_the_time(base, quick_python):
    """They wait for each other in every step: a rank that stopped a step earlier would leave the other one hanging."""
    done = subprocess.run(
        [quick_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.base_train",
         *flags(base, "--no-compile", "--device-batch-size=2", "--model-tag=ranks-limited", "--num-iterations=100000",
                "--max-train-seconds=1", "--eval-every=-1", "--deferred-loss-logging")],
        cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = result(base / "base_checkpoints/ranks-limited")
    assert ended["status"] == "ok" and 1 <= ended["train_time_sec"] < 20 and 2 < ended["steps_done"] < 100000


def test_time_limit_ends_the_run_with_a_checkpoint(base):
    run_dir, rows = run_here(base, "limited", "--no-compile", "--num-iterations=100000", "--max-train-seconds=1")
    done = result(run_dir)
    assert done["status"] == "ok" and 1 <= done["train_time_sec"] < 20 and done["steps_done"] < 100000
    assert (run_dir / f"step_{done['steps_done']:06d}").exists() and rows[-1]["val_bpb"] is not None


@pytest.mark.parametrize("ends", [False, True])
def test_a_time_limit_does_not_read_results_early(base, ends):
    """Deferred, a step is pending whenever the next one is launched, also where the clock is asked before each."""
    run = build_run(parse_config(FEATURES, anew(flags(base, "--model-tag=pending", "--no-compile", "--eval-every=-1",
                    "--deferred-loss-logging", f"--max-train-seconds={0.01 if ends else 1e6}", "--num-iterations=1000"))))
    launch_step, pending = run.trainer.launch_step, []

    def launch(**options):
        pending.append(run.pending and run.pending.step)
        if len(pending) == 8:
            run.signals.received = signal.SIGTERM
        return launch_step(**options)
    run.trainer.launch_step = launch
    assert fit(run) == (0 if ends else 128 + signal.SIGTERM)
    assert pending == [None, *range(len(pending) - 1)] and len(pending) >= 2
    # the step that exceeds the limit is known when the next one is under way
    assert result(run.plan.run_dir)["steps_done"] == len(pending)


def test_the_collector_passes_over_what_lasts(base):
    """From the fourth step on the objects of model and optimizer are frozen; the collector stays on, and in the end all is as it
    was."""
    run = build_run(parse_config(FEATURES, anew(flags(base, "--model-tag=collector", "--no-compile", "--num-iterations=6",
                                                      "--eval-every=-1"))))
    frozen, forward = [], run.trainer.forward

    def counted(*batch, **options):
        frozen.append(gc.get_freeze_count())
        return forward(*batch, **options)
    run.trainer.forward = counted
    assert fit(run) == 0
    per_step = run.plan.horizon.grad_accum_steps
    assert set(frozen[:3 * per_step]) == {0} and min(frozen[3 * per_step:]) > 10_000
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_time_to_target(base, tmp_path):
    run_dir, rows = run_here(base, "target", "--no-compile", "--target-metric-name=smooth_loss", "--target-metric-threshold=5.9",
                             f"--result-json={tmp_path / 'copy.json'}")
    assert (tmp_path / "copy.json").read_text() == (run_dir / "result.json").read_text()
    reached = result(run_dir)["time_to_target_sec_measured"]
    above = max(r["train_time_sec"] for r in rows if r["smooth_loss"] and r["smooth_loss"] > 5.9)
    below = min(r["train_time_sec"] for r in rows if r["smooth_loss"] and r["smooth_loss"] <= 5.9)
    assert above <= reached <= below


@pytest.mark.slow
def test_divergence_is_a_status_not_a_traceback(base):
    done = cli(base, "--no-compile", "--model-tag=diverged", "--lr-multiplier=1e38", "--eval-every=-1")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "--lr-multiplier" in done.stderr
    assert json.loads((base / "base_checkpoints/diverged/result.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("deferred", [[], ["--deferred-loss-logging"]], ids=["at-once", "deferred"])
@pytest.mark.parametrize("where", ["loss", "gradient", "parameter"])
def test_a_step_that_is_not_finite_is_not_taken(base, where, deferred, capsys):
    """A NaN in a batch's loss, a gradient or a weight from step 3 on: every other weight and moment stays to the bit."""
    run = build_run(parse_config(FEATURES, flags(base, "--no-compile", "--model-tag=nan", "--eval-every=-1", *deferred)))
    matrix, forward, saved = run.state.model.transformer.h[1].mlp.c_fc.weight, run.trainer.forward, {}

    def poisoned(x, y, **options):
        if run.state.step == 3 and not saved:
            saved.update(copy.deepcopy({"model": run.state.model.state_dict(), "optimizer": run.state.optimizer.named_state()}))
            if where == "parameter":
                matrix.data[0, 0] = math.nan
        loss = forward(x, y, **options)
        return loss * math.nan if where == "loss" and run.state.step >= 3 else loss
    run.trainer.forward = poisoned
    if where == "gradient":
        matrix.register_hook(lambda g: g * math.nan if run.state.step >= 3 else g)
    assert fit(run) == 1
    done = result(run.plan.run_dir)
    assert done["status"] == "diverged" and done["steps_done"] == 3 and len(read_metrics(run.plan.run_dir / "metrics.jsonl")) == 3
    assert "step 3 was not taken" in capsys.readouterr().err
    for name, tensor in run.state.model.state_dict().items():
        assert torch.equal(tensor, saved["model"][name]) or (where == "parameter" and "h.1.mlp.c_fc" in name), name
    moments = {k: v for k, v in run.state.optimizer.named_state().items() if not k.endswith("/step")}
    assert all(torch.equal(v, saved["optimizer"][k]) for k, v in moments.items())


@pytest.mark.slow
def test_ctrl_c_leaves_a_result(base, quick_python):
    process = subprocess.Popen([quick_python, "-m", "scripts.base_train", *flags(base, "--no-compile", "--model-tag=stopped",
                               "--num-iterations=100000")], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = base / "base_checkpoints/stopped/metrics.jsonl"
    try:
        while not (metrics.exists() and len(read_metrics(metrics)) > 3) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err
    done = json.loads((metrics.parent / "result.json").read_text())
    assert done["status"] == "interrupted" and done["exit_code"] == 130 and done["steps_done"] > 1


@pytest.mark.slow
def test_it_runs_without_the_optional_packages(base, tmp_path):
    """Training on prepared tokens where wandb, matplotlib and the rest cannot be imported: it says what it goes without."""
    blocked = ("wandb", "datasets", "matplotlib", "scipy", "rich", "tokenizers", "pyarrow", "tensorboard", "yaml")
    for name in blocked:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('No module named {name}')")
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", *flags(base, "--no-compile", "--model-tag=bare",
                           "--tracker", "wandb", "tensorboard")], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "wandb is not installed" in done.stdout and "matplotlib is not installed" in done.stdout
    assert "tensorboard is not installed" in done.stdout
    assert not (base / "base_checkpoints/bare/loss.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("extra, advice", [
    (["--resume-from-step=7"], "There are: 5, 10, 12"),
    (["--resume-from-step=latest", "--model-tag=nobody"], "there are: "),
    (["--resume-from-step=5", "--depth=3", "--matrix-lr=0.1"], "--depth 2 -> 3\n  --matrix-lr 0.02 -> 0.1\n"),
    (["--resume-from-step=5", "--depth=3", "--allow-change"], "another shape"),
    (["--resume-from-step=5", "--num-iterations=4"], "--num-iterations 12 -> 4"),
    (["--resume-from-step=5", "--num-iterations=4", "--allow-change"], "lengthen it"),
    (["--resume-from-step=5", "--max-chars=40000"], "--max-chars -1 -> 40000"),
    (["--resume-from-step=5", f"--dtype={OTHER_DTYPE}"], "the compute dtype "),
    (["--device-type=cuda"], "no such device"),
    (["--dtype=float16"], "bfloat16 or float32"),
    (["--data=/no/such/folder"], "/no/such/folder"),
    (["--max-seq-len=65536", "--device-batch-size=4096", "--total-batch-size=-1"], "tokens"),
])
def test_bad_input_exits_with_2_and_overwrites_nothing(plain, base, extra, advice):
    if "--device-type=cuda" in extra and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    before = {p: p.stat().st_mtime_ns for p in plain[0].rglob("*")}
    done = cli(base, "--no-compile", "--model-tag=plain", *extra)
    assert done.returncode == 2, done.stdout + done.stderr
    assert advice in done.stderr and "Traceback" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in plain[0].rglob("*")} == before


@pytest.mark.slow
def test_another_vocabulary_is_refused_on_resume(plain, base, tmp_path):
    other = tmp_path / "base"
    other.mkdir()
    shutil.copytree(plain[0], other / "base_checkpoints/plain")
    trained = cli(other, f"--data={base / 'text'}", "--vocab-size=300", module="scripts.tok_train", tiny=False)
    assert trained.returncode == 0, trained.stderr
    done = cli(other, *flags(base, "--no-compile", "--model-tag=plain", "--resume-from-step=5", "--allow-change"), tiny=False)
    assert done.returncode == 2 and "another vocabulary" in done.stderr and "Traceback" not in done.stderr


def test_core_samples_and_what_is_missing(base, capsys):
    """CORE from a bundle at hand and samples, in a run; a checkpoint is there before either of them."""
    bundle = base / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    (bundle / "core.yaml").write_text("icl_tasks:\n- label: sayings\n  dataset_uri: s.jsonl\n  num_fewshot: [0]\n"
                                      "  icl_task_type: language_modeling\n")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsayings,0\n")
    (bundle / "eval_data" / "s.jsonl").write_text('{"context": "def", "continuation": "step"}\n' * 3)
    _, rows = run_here(base, "core", "--no-compile", "--num-iterations=2", "--core-metric-every=2", "--sample-every=2")
    assert [r["core_metric"] for r in rows if "core_metric" in r] == [pytest.approx(0, abs=1)]
    printed = capsys.readouterr().out
    assert printed.index("saved") < printed.index("CORE metric") < printed.index("samples")
    (bundle / "core.yaml").unlink()
    run_here(base, "no-core", "--no-compile", "--num-iterations=1", "--core-metric-every=1")
    assert "CORE left out" in capsys.readouterr().out


def test_a_validation_that_is_not_finite_is_no_reason_for_no_plot(plain, tmp_path):
    rows = [json.loads(line) for line in (plain[0] / "metrics.jsonl").read_text().splitlines()]
    rows[0]["val_bpb"], rows[-1]["val_bpb"] = "NaN", "Infinity"
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_run(tmp_path) == f"loss plot: {tmp_path / 'loss.png'}" and (tmp_path / "loss.png").stat().st_size > 10_000
