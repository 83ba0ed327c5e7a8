"""Trackers hold what metrics.jsonl holds, every step once, whatever became of the run: real trackers, read back from disk."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.features import FEATURES
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from nanochat.training.records import MetricsFile, read_metrics
from nanochat.training.trackers import Trackers
from processes import SERVER, _train as run_served, tiny_flags, trained

ROOT = Path(__file__).parents[2]
STEPS = 12


def flags(base, tag, *extra):
    return tiny_flags(base, tag, f"--num-iterations={STEPS}", "--save-every=4", *extra)


def make(base, tag, *extra):
    return build_run(parse_config(FEATURES, flags(base, tag, *extra)))


def train(base, tag, *extra):
    """The folder of a run that goes well."""
    return trained(make(base, tag, *extra)).plan.run_dir


def resume(base, run_dir, *extra):
    return train(base, run_dir.name, "--resume-from-step=latest", *extra)


def remove(run_dir, *steps):
    for step in steps:
        shutil.rmtree(run_dir / f"step_{step:06d}")


def killed_in_step_9(run):
    forward = run.trainer.forward

    def killing(*args, **options):
        if run.state.step == 9:
            os.kill(os.getpid(), 9)
        return forward(*args, **options)
    run.trainer.forward = killing


def killed(base, tag, *extra):
    """The folder of a run that is killed in a process of its own: wandb's service in this one would not notice its end."""
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    log = base / f"{tag}.log"
    process = SERVER.Process(target=in_environment,
                             args=(environment, flags(base, tag, *extra), base, log, killed_in_step_9, None))
    process.start()
    process.join()
    assert process.exitcode == -9, log.read_text()
    return base / "base_checkpoints" / tag


def in_environment(environment, *run):
    os.environ.clear()
    os.environ.update(environment)
    run_served(*run)


# --- what is on disk ------------------------------------------------------------------------------------------------

def once(events):
    """{key: {step: value}} from (step, {key: value}); every step of a key once, the steps in order."""
    held = {}
    for step, values in events:
        for key, value in values.items():
            assert step not in held.setdefault(key, {}), f"{key} has step {step} twice"
            held[key][step] = value
    return {key: dict(sorted(values.items())) for key, values in held.items()}


def in_metrics(run_dir):
    def values(row):
        if row["val_bpb"] is not None:
            return {"val/bpb": row["val_bpb"], "val/train_time_sec": row["train_time_sec"]}
        return {f"train/{k}": v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
    return once((row["step"], values(row)) for row in read_metrics(run_dir / "metrics.jsonl"))


def in_tensorboard(run_dir):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return once((e.step, {tag: e.value}) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))


def wandb_records(path):
    """A .wandb file is a log of LevelDB's format: a head of 7 bytes, then pieces of records in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record
    whole, first, _, last = 1, 2, 3, 4
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # no room for the head of a piece
            at += -at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at:at + 7])
        record = (b"" if kind in (whole, first) else record) + data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (whole, last):
            yield Record.FromString(record)


def in_wandb(run_dir, run_id="*"):
    events = []
    for path in sorted(run_dir.glob(f"wandb/offline-run-*-{run_id}/*.wandb")):
        for record in wandb_records(path):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                events.append((items["_step"], {k: v for k, v in items.items() if not k.startswith("_")}))
    return once(events)


def in_trackio(run_dir):
    from trackio.sqlite_storage import SQLiteStorage
    name = f"dummy-{remembered(run_dir, 'trackio')['id']}"
    return once((log["step"], {k: v for k, v in log.items() if "/" in k}) for log in SQLiteStorage.get_logs("nanochat", name))


def remembered(run_dir, name):
    return json.loads((run_dir / "trackers.json").read_text())["trackers"][name]


def latest(run_dir, tracker):
    """Of the folders of wandb's runs, those of the last."""
    return {"run_id": remembered(run_dir, tracker)["id"]} if tracker == "wandb" else {}


READERS = {"tensorboard": in_tensorboard, "wandb": in_wandb, "trackio": in_trackio}


@pytest.fixture(params=READERS)
def tracker(request, base, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "0.1")  # or else what is killed this soon leaves nothing
    monkeypatch.setenv("TRACKIO_DIR", str(base / "trackio"))
    return request.param


def holds_every_step(run_dir, tracker, **only):
    held, wanted = READERS[tracker](run_dir, **only), in_metrics(run_dir)
    assert list(wanted["train/loss"]) == list(range(STEPS)) and list(wanted["val/bpb"]) == [0, 3, 6, 9, 12]
    assert {key: list(steps) for key, steps in held.items()} == {key: list(steps) for key, steps in wanted.items()}
    assert all(held[key] == pytest.approx(wanted[key]) for key in ("train/loss", "train/batch_crc32", "val/bpb"))


# --- resumes --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_resumed_twice(base, tracker):
    run_dir = train(base, f"{tracker}-twice", "--tracker", tracker)
    holds_every_step(run_dir, tracker)
    run_id = remembered(run_dir, tracker)["id"]
    for lost in (8, 12), (12,):
        remove(run_dir, *lost)
        resume(base, run_dir, "--tracker", tracker)
        holds_every_step(run_dir, tracker)
    assert remembered(run_dir, tracker)["id"] == run_id


@pytest.mark.slow
def test_killed(base, tracker):
    """What the tracker had not written out yet is made up for."""
    run_dir = killed(base, f"{tracker}-killed", "--tracker", tracker)
    run_id = remembered(run_dir, tracker)["id"]
    resume(base, run_dir, "--tracker", tracker)
    holds_every_step(run_dir, tracker)
    assert remembered(run_dir, tracker)["id"] == run_id or tracker == "trackio"


@pytest.mark.slow
def test_killed_and_then_left_out_for_a_while(base, tracker):
    run_dir = killed(base, f"{tracker}-out", "--tracker", tracker)
    resume(base, run_dir)
    resume(base, run_dir, "--tracker", tracker)
    holds_every_step(run_dir, tracker, **latest(run_dir, tracker))


@pytest.mark.slow
def test_switched_off_and_on(base, tracker):
    """On from step 0 to 4, off from 4 to 8, on to the end; and on only after the end of a run."""
    run_dir = train(base, f"{tracker}-off", "--tracker", tracker)
    remove(run_dir, 8, 12)
    stopped = make(base, run_dir.name, "--resume-from-step=4", "--matrix-lr=0.01", "--allow-change")
    assert fit(stopped) == 0
    remove(run_dir, 12)
    resume(base, run_dir, "--matrix-lr=0.01", "--tracker", tracker)
    holds_every_step(run_dir, tracker, **latest(run_dir, tracker))
    run_dir = train(base, f"{tracker}-on")
    assert not (run_dir / "trackers.json").exists()
    resume(base, run_dir, "--resume-from-step=8", "--tracker", tracker)
    holds_every_step(run_dir, tracker)


@pytest.mark.slow
def test_another_future(base, tracker):
    """A resume that changes the result, one that goes on with that, and one that takes it back."""
    run_dir = train(base, f"{tracker}-changed", "--tracker", tracker)
    was, run_id = READERS[tracker](run_dir), remembered(run_dir, tracker)["id"]
    changed = "--tracker", tracker, "--matrix-lr=0.01", "--allow-change"
    resume(base, run_dir, "--resume-from-step=4", *changed)
    only = latest(run_dir, tracker)
    holds_every_step(run_dir, tracker, **only)
    remove(run_dir, 12)
    resume(base, run_dir, "--tracker", tracker, "--matrix-lr=0.01")
    holds_every_step(run_dir, tracker, **only)
    if tracker == "wandb":
        assert only["run_id"] != run_id and in_wandb(run_dir, run_id) == was
    resume(base, run_dir, "--resume-from-step=4", "--tracker", tracker)
    holds_every_step(run_dir, tracker, **latest(run_dir, tracker))


def diverging_in_step_9(run):
    """Once: the parameters get gradients that are not finite."""
    parameter, done = next(run.state.model.parameters()), []

    def spoil(gradient):
        if run.state.step == 9 and not done:
            done.append(True)
            return gradient * math.nan
        return gradient
    parameter.register_hook(spoil)


def test_a_rollback(base, tracker):
    run = make(base, f"{tracker}-rollback", "--tracker", tracker, "--on-divergence=rollback")
    diverging_in_step_9(run)
    assert fit(run) == 0 and run.state.stats.rollbacks == [[9, 8]]
    holds_every_step(run.plan.run_dir, tracker, **latest(run.plan.run_dir, tracker))


# --- trouble --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("memory", ["", "[]", '{"trackers": {"tensorboard": 3}, "branched": 0}', "\0"])
def test_a_memory_that_is_damaged(tmp_path, memory, capsys):
    pytest.importorskip("tensorboard")
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    trackers = Trackers(["tensorboard"], "dummy", tmp_path, {})
    for step in range(3):
        metrics.write({"step": step, "loss": step / 2})
        trackers.log({"train/loss": step / 2}, step)
    trackers.close()
    (tmp_path / "trackers.json").write_text(memory)
    trackers = Trackers(["tensorboard"], "dummy", tmp_path, {}, step=3)
    trackers.log({"train/loss": 1.5}, 3)
    trackers.close()
    assert "trackers.json" in capsys.readouterr().out
    assert in_tensorboard(tmp_path) == {"train/loss": {step: step / 2 for step in range(4)}}


@pytest.mark.slow
def test_wandb_without_a_home(tmp_path):
    """Offline, for a user who has no HOME and is in no list of users."""
    pytest.importorskip("wandb")
    code = ("import pwd; from pathlib import Path; from nanochat.training.trackers import Trackers\n"
            "def getpwuid(uid): raise KeyError(uid)\n"
            "pwd.getpwuid = getpwuid\n"
            f"trackers = Trackers(['wandb'], 'dummy', Path({str(tmp_path)!r}), {{}})\n"
            "trackers.log({'train/loss': 1.0}, 0); trackers.close()")
    environment = {k: v for k, v in os.environ.items() if k != "HOME" and not k.startswith("WANDB_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert in_wandb(tmp_path) == {"train/loss": {0: 1.0}}, done.stdout + done.stderr
