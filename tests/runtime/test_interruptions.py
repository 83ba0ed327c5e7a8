"""Runs that are told to stop, locked out, diverge, run out of memory, or lose their logs: real signals, files and processes.

Signals are raised by the run itself in a chosen moment, so that nothing depends on the machine's speed.
"""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import list_steps, load_checkpoint
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.runtime.compilation import CompiledModel
from nanochat.runtime.lock import SILENCE, RunLock
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.divergence import MAX_ROLLBACKS, MAX_SKIPS
from nanochat.training.loop import fit
from nanochat.training.records import MetricsFile, read_metrics
from processes import Served, compile_with, python_m, tiny_flags, trained

ROOT = Path(__file__).parents[2]
STEPS = 8
SUFFIX = ("--block-update-schedule=dynamic_suffix --dyn-warmup-steps=1 --dyn-probe-every=4 --dyn-refresh-every=0 "
          "--dyn-freeze-start-frac=0 --dyn-min-active-layers=1").split()


def flags(base, tag, *extra):
    return tiny_flags(base, tag, f"--num-iterations={STEPS}", *extra)


def make(base, tag, *extra):
    return build_run(parse_config(FEATURES, flags(base, tag, *extra)))


def train(base, tag, *extra):
    """A run that goes well."""
    return trained(make(base, tag, *extra))


def result(run):
    return json.loads((run.plan.run_dir / "result.json").read_text())


def record(run):
    """All that was computed: the rows, but for times and memory, and the final tensors."""
    timed = {"dt_ms", "tok_per_sec", "peak_mem_mib", "train_time_sec", "cost_share"}
    rows = [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run.plan.run_dir / "metrics.jsonl")]
    final = run.plan.run_dir / f"step_{STEPS:06d}"
    return rows, [(final / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")]


@pytest.fixture(scope="module")
def undisturbed(base):
    runs = {}

    def of(*extra):
        if extra not in runs:
            runs[extra] = record(train(base, f"undisturbed{len(runs)}", *extra))
        return runs[extra]
    return of


def resumed(base, run, *extra):
    """Resume under the same name, to the end."""
    return record(train(base, run.plan.run_dir.name, "--resume-from-step=latest", *extra))


# --- signals --------------------------------------------------------------------------------------------------------

def in_step(run, step, act):
    """Do something in the middle of a step."""
    forward = run.trainer.forward

    def acting(*args, **options):
        loss = forward(*args, **options)
        if run.state.step == step:
            act()
        return loss
    run.trainer.forward = acting


def in_evaluation(run, step, act):
    run.state.model.register_forward_hook(lambda *_: act() if run.state.step == step and not run.state.model.training else None)


def in_save(run, step, act):
    save = run.checkpoints.save

    def acting():
        save()
        if run.state.step == step:
            act()
    run.checkpoints.save = acting


MOMENTS = {  # where the signal comes, and at what step the checkpoint is then
    "step": (in_step, 3, 4), "first step": (in_step, 0, 1), "last step": (in_step, STEPS - 1, STEPS),
    "evaluation": (in_evaluation, 6, 6), "last evaluation": (in_evaluation, STEPS, STEPS), "save": (in_save, 5, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment, signum, extra", [
    ("step", signal.SIGTERM, ()), ("step", signal.SIGINT, ("--deferred-loss-logging",)), ("step", signal.SIGHUP, tuple(SUFFIX)),
    ("first step", signal.SIGINT, ()), ("last step", signal.SIGTERM, ()), ("evaluation", signal.SIGTERM, ()),
    ("last evaluation", signal.SIGINT, tuple(SUFFIX)), ("save", signal.SIGTERM, ()),
])
def test_a_signal_ends_the_run_where_it_can_go_on_exactly(base, undisturbed, moment, signum, extra):
    place, step, checkpoint = MOMENTS[moment]
    if moment == "save":
        extra = (*extra, "--save-every=5")
    run = make(base, f"stopped-{moment.replace(' ', '-')}-{signum}", *extra)
    place(run, step, lambda: signal.raise_signal(signum))
    before = signal.getsignal(signum)
    assert fit(run) == 128 + signum
    assert signal.getsignal(signum) is before
    done = result(run)
    assert done["status"] == "interrupted" and done["exit_code"] == 128 + signum and done["steps_done"] == checkpoint
    assert list_steps(run.plan.run_dir) == [checkpoint] and done["last_checkpoint"].endswith(f"step_{checkpoint:06d}")
    assert signal.Signals(signum).name in done["error"] and "--resume-from-step=latest" in done["error"]
    assert resumed(base, run, *extra) == undisturbed(*extra)


def test_a_signal_before_anything_is_trained_leaves_no_checkpoint(base):
    run = make(base, "untrained")
    in_evaluation(run, 0, lambda: signal.raise_signal(signal.SIGTERM))
    assert fit(run) == 143
    assert list_steps(run.plan.run_dir) == [] and result(run)["last_checkpoint"] is None
    assert "no checkpoint" in result(run)["error"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 3])
def test_a_signal_during_compilation(base, step):
    """With nothing to lose the run ends at once; else the step is finished first."""
    run, compiled = make(base, f"compiling-{step}", "--eval-every=-1"), []

    def backend(graph, inputs):
        if run.state.step == step and run.state.step not in compiled:
            signal.raise_signal(signal.SIGTERM)
        compiled.append(run.state.step)
        return graph.forward
    compile_with(run, CompiledModel(run.state.model, whole=True, backend=backend))
    before_step = run.state.features.before_step
    run.state.features.before_step = lambda step: before_step(step) | {"active_start": step // 3 % 2}  # another graph at step 3
    assert fit(run) == 143
    assert set(compiled) == (set() if step == 0 else {0, 3})
    assert list_steps(run.plan.run_dir) == ([] if step == 0 else [4])


def child(base, tag, before=None, *extra, output=None):
    """A run in a process of its own."""
    return Served(flags(base, tag, *extra), base, base / f"{tag}.log", before, output)


def twice():
    for pause in (0.1, 0.6):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)


def twice_in_step(run):
    in_step(run, 4, twice)


def twice_in_save(run):
    in_save(run, 4, twice)


@pytest.mark.slow
@pytest.mark.parametrize("place", [twice_in_step, twice_in_save])
def test_a_second_signal_ends_the_process_on_the_spot(base, undisturbed, place):
    """A repeat within half a second counts as the same wish. What was saved before is whole."""
    process = child(base, place.__name__, place, "--save-every=2")
    assert process.wait() == 143
    assert "still here" not in process.log.read_text() and "Traceback" not in process.log.read_text()
    folder = base / "base_checkpoints" / place.__name__
    assert not (folder / "result.json").exists()
    newest = list_steps(folder)[-1]
    assert newest in (2, 4) and load_checkpoint(folder, newest)[2]["step"] == newest
    run = train(base, folder.name, "--resume-from-step=latest", "--save-every=2")
    assert record(run) == undisturbed()


def test_ignored_signals_stay_ignored(base):
    """As nohup, and a shell's background jobs, want it."""
    run = make(base, "nohup", "--eval-every=-1", "--num-iterations=2")
    in_step(run, 0, lambda: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert fit(run) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_ranks_agree_on_the_step_to_stop_at(base, quick_python):
    """One of two ranks gets the signal; both end after the same step, and what they save can be resumed."""
    agent = subprocess.Popen([quick_python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
                              "scripts.base_train", *flags(base, "ranks", "--num-iterations=100000", "--eval-every=-1")],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = base / "base_checkpoints/ranks"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(read_metrics(folder / "metrics.jsonl")) > 2, agent)
    os.kill(rank_of(base, 1), signal.SIGTERM)
    _, err = agent.communicate(timeout=120)
    assert agent.returncode != 0
    done = json.loads((folder / "result.json").read_text())
    assert done["status"] == "interrupted" and done["exit_code"] == 143 and done["steps_done"] > 2, err[-2000:]
    assert list_steps(folder) == [done["steps_done"]]
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(done["steps_done"]))


def rank_of(base: Path, rank: int) -> int:
    """The process of a rank that torchrun has started, with this base directory's text."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (f"RANK={rank}" in (process / "environ").read_text().split("\0")
                    and f"--data={base / 'text'}" in (process / "cmdline").read_text().split("\0")):
                return int(process.name)
        except OSError:
            pass
    pytest.skip("no /proc to find the ranks in")


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.02)


# --- the lock -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_name_in_use_is_refused_and_a_killed_run_gives_its_lock_back(base, capsys):
    process = child(base, "locked", None, "--num-iterations=100000", "--save-every=2", "--eval-every=-1")
    folder = base / "base_checkpoints/locked"
    try:
        wait_for(lambda: list_steps(folder), process)
        for extra in ((), ("--resume-from-step=latest",)):
            with pytest.raises(UserError, match=rf"process {process.pid} on .*, since \d{{4}}-.* --model-tag"):
                make(base, "locked", *extra)
        refused = python_m("scripts.base_train", *flags(base, "locked"))
        assert refused.returncode == 2 and str(process.pid) in refused.stderr and "Traceback" not in refused.stderr
        assert process.poll() is None and not list(folder.parent.glob("locked~*"))
    finally:
        process.kill()
        process.wait()
    steps = list_steps(folder)[-1] + 2
    train(base, "locked", "--resume-from-step=latest", f"--num-iterations={steps}", "--allow-change", "--eval-every=-1")
    assert f"process {process.pid}" in capsys.readouterr().out
    assert not folder.with_name(".locked.lock").exists()


def test_a_lock_holds_until_it_is_released(tmp_path, capsys):
    first = RunLock(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        RunLock(tmp_path / "run")
    RunLock(tmp_path / "other").release()
    first.release()
    first.release()
    RunLock(tmp_path / "run").release()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("holder, seconds_ago, taken", [
    ({"host": "elsewhere", "boot": "another"}, 60, False), ({"host": "elsewhere", "boot": "another"}, SILENCE + 60, True),
    ({"host": "elsewhere"}, 60, True),  # a container of this machine: its lock would be held
    ({"boot": "another"}, 60, True),    # this machine, before it was started anew
    (None, 60, True),
])
def test_a_lock_that_was_left_behind(tmp_path, capsys, holder, seconds_ago, taken):
    RunLock(tmp_path / "model")  # not released: the file is closed with the object, as the system does at kill -9
    path, then = tmp_path / ".model.lock", time.time() - seconds_ago
    path.write_text("{ half" if holder is None else json.dumps(json.loads(path.read_text()) | holder))
    os.utime(path, (then, then))
    if taken:
        RunLock(tmp_path / "model").release()
        assert ("recovered the lock" in capsys.readouterr().out) == (holder is not None)
    else:
        with pytest.raises(UserError, match=f"on elsewhere.* 1 minutes old.* delete {path}"):
            RunLock(tmp_path / "model")
        run = tmp_path / "model"
        run.mkdir()
        os.utime(path, (then - SILENCE, then - SILENCE))
        (run / "metrics.jsonl").write_text("a row, just now\n")
        with pytest.raises(UserError, match=" 0 minutes old"):
            RunLock(run)


def test_a_run_that_cannot_be_made_gives_its_lock_back(base):
    with pytest.raises(UserError):
        make(base, "unmade", "--resume-from-step=3")
    RunLock(base / "base_checkpoints/unmade").release()


# --- divergence -----------------------------------------------------------------------------------------------------

def poison(run, bad):
    """Make the loss NaN wherever bad() says so. With a NaN in the loss, every gradient is one."""
    forward = run.trainer.forward
    run.trainer.forward = lambda x, y, **options: forward(x, y, **options) * (math.nan if bad(x) else 1)


def weights(run):
    tensors = run.state.model.state_dict() | run.state.optimizer.named_state()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), tuple(SUFFIX)], ids=["plain", "suffix"])
def test_skipping_leaves_out_a_step_and_nothing_else(base, extra, capsys):
    extra = (*extra, "--on-divergence=skip", "--save-every=2")
    tag = f"skip{len(extra)}"
    run, seen = make(base, tag, *extra), {}
    bad = (3, 5)
    poison(run, lambda x: seen.setdefault(run.state.step, weights(run)) and run.state.step in bad)
    assert fit(run) == 0
    for step in bad:
        assert equal(seen[step], seen[step + 1]) and not equal(seen[step + 1], seen[step + 2])
    rows = {row["step"]: row for row in read_metrics(run.plan.run_dir / "metrics.jsonl") if row["val_bpb"] is None}
    assert [step for step, row in rows.items() if row["step_kind"] == "skipped"] == list(bad)
    assert all((row["loss"] is None) == (step in bad) for step, row in rows.items()) and sorted(rows) == list(range(STEPS))
    assert result(run)["skipped_steps"] == 2 and result(run)["status"] == "ok"
    assert capsys.readouterr().out.count("; skipped (") == 2
    for step in (6, STEPS):  # the rest is a run resumed from step 4, of two skipped one: the record is in the checkpoint
        shutil.rmtree(run.plan.run_dir / f"step_{step:06d}")
    before = record_without_final(run)
    again = make(base, tag, *extra, "--resume-from-step=latest")
    poison(again, lambda x: again.state.step in bad)
    assert fit(again) == 0
    assert again.recorder.first_step == 4 and result(again)["skipped_steps"] == 2
    assert record_without_final(again) == before and equal(weights(run), weights(again))


def record_without_final(run):
    timed = {"dt_ms", "tok_per_sec", "peak_mem_mib", "train_time_sec", "cost_share"}
    return [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run.plan.run_dir / "metrics.jsonl")]


def test_skipping_ends_where_it_does_not_help(base):
    run = make(base, "skip-all", "--on-divergence=skip", "--num-iterations=30", "--eval-every=-1")
    poison(run, lambda x: run.state.step >= 2)
    assert fit(run) == 1
    assert result(run)["status"] == "diverged" and run.state.step == 2 + MAX_SKIPS - 1 and "does not help" in result(run)["error"]


@pytest.mark.slow
def test_rolling_back_goes_on_with_other_data(base):
    """Diverged at step 5, back to the checkpoint of step 4: the batches of steps 4 and 5 are left out."""
    extra = ("--on-divergence=rollback", "--save-every=2")
    reference = train(base, "rollback-none", *extra, "--num-iterations=12")
    batches = [row["batch_crc32"] for row in read_metrics(reference.plan.run_dir / "metrics.jsonl") if row["loss"] is not None]
    run = make(base, "rollback", *extra)
    with_bad_data = bad_batch(run, 5)
    assert fit(run) == 0
    rows = [row for row in read_metrics(run.plan.run_dir / "metrics.jsonl") if row["loss"] is not None]
    assert [row["batch_crc32"] for row in rows] == batches[:4] + batches[6:6 + STEPS - 4]
    assert [row["step"] for row in rows] == list(range(STEPS)) and all(math.isfinite(row["loss"]) for row in rows)
    assert result(run)["rollbacks"] == 1 and result(run)["status"] == "ok"
    whole = record(run)
    for step in (6, STEPS):  # killed before the next checkpoint was there: it diverges and goes back again
        shutil.rmtree(run.plan.run_dir / f"step_{step:06d}")
    again = make(base, "rollback", *extra, "--resume-from-step=latest")
    poison(again, with_bad_data)
    assert fit(again) == 0 and record(again) == whole
    shutil.rmtree(run.plan.run_dir / f"step_{STEPS:06d}")  # killed after it: the record is in the checkpoint
    assert record(train(base, "rollback", *extra, "--resume-from-step=latest")) == whole


def bad_batch(run, step):
    """Poison the batch that is step's at first, wherever it comes."""
    marked = []

    def bad(x):
        if run.state.step == step and not marked:
            marked.append(x.clone())
        return bool(marked) and torch.equal(x, marked[0])
    poison(run, bad)
    return bad


def test_rolling_back_ends_where_it_does_not_help(base):
    run = make(base, "rollback-all", "--on-divergence=rollback", "--save-every=2", "--eval-every=-1")
    poison(run, lambda x: run.state.step == 3)
    assert fit(run) == 1
    done = result(run)
    assert done["status"] == "diverged" and done["rollbacks"] == MAX_ROLLBACKS
    assert done["last_checkpoint"].endswith("step_000002")
    assert "step_000002" in done["error"] and "have not helped" in done["error"]
    with pytest.raises(UserError, match="--save-every"):
        make(base, "rollback-none", "--on-divergence=rollback")


# --- out of memory --------------------------------------------------------------------------------------------------

def exhaust():
    torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize("place, saved", [(in_step, []), (in_evaluation, [6])], ids=["step", "evaluation"])
def test_out_of_memory_is_a_status_with_advice(base, place, saved, capsys):
    """A failure of torch's own allocator. What was trained before an evaluation is saved even then."""
    run = make(base, f"oom-{place.__name__}")
    place(run, 6, exhaust)
    assert fit(run) == 1
    done = result(run)
    assert done["status"] == "oom" and done["exit_code"] == 1 and done["steps_done"] == 6
    assert list_steps(run.plan.run_dir) == saved
    assert "--device-batch-size 1" in done["error"] and done["error"] in capsys.readouterr().err


def limit_memory(run):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_out_of_memory_under_a_limit(base):
    """The address space is limited to a little more than the process has; nothing but the system's answer says no."""
    process = child(base, "ulimit", limit_memory, "--device-batch-size=64", "--max-seq-len=512",
                    "--total-batch-size=32768", "--eval-every=-1")
    assert process.wait() == 1 and "Traceback" not in process.log.read_text(), process.log.read_text()[-2000:]
    done = json.loads((base / "base_checkpoints/ulimit/result.json").read_text())
    assert done["status"] == "oom" and "--device-batch-size " in done["error"]


# --- logs -----------------------------------------------------------------------------------------------------------

def test_a_row_that_cannot_be_written_is_lost_whole(tmp_path, capsys):
    """A limit on the file's size cuts a row in its middle, as a full disk does."""
    metrics, limits = MetricsFile(tmp_path / "metrics.jsonl"), resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics.write({"step": 0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, limits[1]))
        metrics.write({"step": 1})
        metrics.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    metrics.write({"step": 3})
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 3]
    printed = capsys.readouterr().out
    assert printed.count("could not be written") == 1 and "2 rows" in printed


def test_training_goes_on_without_its_logs(base, undisturbed, tmp_path, monkeypatch, capsys):
    """Metrics on a full disk, and a tracker that fails at every call."""
    (tmp_path / "wandb.py").write_text("def init(**options): return __import__('wandb')\n"
                                       "def log(values, step): raise ConnectionError('unreachable')\n"
                                       "def finish(): raise ConnectionError('still unreachable')\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = make(base, "silent", "--tracker", "wandb")
    run.recorder.metrics.file = open("/dev/full", "ab", buffering=0)
    assert fit(run) == 0
    printed = capsys.readouterr().out
    assert printed.count("training goes on") == 1 and printed.count("wandb failed (unreachable)") == 1
    assert "still unreachable" in printed
    assert record(run)[1] == undisturbed()[1] and result(run)["status"] == "ok"
    sys.modules.pop("wandb")


@pytest.mark.slow
@pytest.mark.parametrize("output", ["full", "nobody"])
def test_training_goes_on_without_an_output(base, output):
    """A log on a full disk, and a pipe whose reader is gone."""
    pipe, opened = base / "pipe", None
    if output == "nobody":
        os.mkfifo(pipe)
        opened = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = child(base, f"output-{output}", output="/dev/full" if output == "full" else pipe)
    if opened:
        wait_for(lambda: (base / "base_checkpoints/output-nobody/metrics.jsonl").exists(), process)
        os.close(opened)
    assert process.wait() == 0 and process.log.read_text().count("going on in silence") == 1, process.log.read_text()
    done = json.loads((base / f"base_checkpoints/output-{output}/result.json").read_text())
    assert done["status"] == "ok" and done["steps_done"] == STEPS
