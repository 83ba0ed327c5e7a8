"""Stretches of steps on demand: what a run says and does, and how it ends."""

import json
import os
import signal
import threading

import pytest

from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.runtime.signals import Interrupted
from nanochat.runtime.turns import VARIABLE, Turns
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from nanochat.training.records import read_metrics
from processes import tiny_flags

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes are not inherited by number")


class Lab:
    """The other end of the pipes; `given` is the value of NANOCHAT_TURNS."""

    def __init__(self):
        requests, answers = os.pipe(), os.pipe()
        self.given = f"{requests[0]},{answers[1]}"
        self.requests, self.answers = os.fdopen(requests[1], "w"), os.fdopen(answers[0])

    def ask(self, line):
        print(line, file=self.requests, flush=True)

    def hear(self):
        return self.answers.readline().rstrip("\n")


@pytest.fixture
def lab(monkeypatch):
    lab = Lab()
    monkeypatch.setenv(VARIABLE, lab.given)
    yield lab
    lab.answers.close()


def test_what_is_said(lab):
    turns = Turns.from_environment(1)
    lab.ask("go 3")
    turns.wait(0, 5.0)  # seconds of compilation before the first stretch are not its own
    assert lab.hear() == "ready" and turns.steps_left == 3
    for compiled, said in ((5.0, "done 3 0"), (6.0, "done 3 1"), (6.0, "done 3 0")):
        lab.ask("go 1")
        turns.wait(3, compiled)
        assert lab.hear() == said and turns.steps_left == 1
    lab.requests.close()
    with pytest.raises(Interrupted):
        turns.wait(4, 6.0)


def test_nobody_listens(lab):
    turns = Turns.from_environment(1)
    lab.answers.close()
    with pytest.raises(Interrupted):
        turns.wait(0, 0.0)
    lab.requests.close()


@pytest.mark.parametrize("line", ["go 0", "go", "go -1", "stop", ""])
def test_a_request_that_is_none(lab, line):
    turns = Turns.from_environment(1)
    lab.ask(line)
    with pytest.raises(UserError, match="go STEPS"):
        turns.wait(0, 0.0)
    lab.requests.close()


@pytest.mark.parametrize("value, ranks", [("5", 1), ("a,b", 1), ("", 1), ("5,6,7", 1), ("987,988", 1), ("0,1", 2)])
def test_a_variable_that_is_wrong(monkeypatch, value, ranks):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match=f"{VARIABLE}.*unset it"):
        Turns.from_environment(ranks)


def train(base, tag, *extra):
    """Exit status, result and metrics of a run in this process."""
    run = build_run(parse_config(FEATURES, tiny_flags(base, tag, "--num-iterations=8", "--eval-every=-1", *extra)))
    status, folder = fit(run), base / "base_checkpoints" / tag
    return status, json.loads((folder / "result.json").read_text()), read_metrics(folder / "metrics.jsonl")


def steps_of(rows):
    return [(row["step"], row["loss"], row["batch_crc32"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--deferred-loss-logging"]], ids=["plain", "deferred"])
def test_a_run_takes_the_steps_it_is_asked_for(base, lab, monkeypatch, flags):
    tag, seen = f"turns-{len(flags)}", []

    def ask():
        seen.append(lab.hear())
        for steps in (2, 1, 3):
            lab.ask(f"go {steps}")
            seen.append(lab.hear())
            seen.append(len(read_metrics(base / "base_checkpoints" / tag / "metrics.jsonl")))
        lab.requests.close()
    thread = threading.Thread(target=ask)
    thread.start()
    status, result, rows = train(base, tag, *flags)
    thread.join()
    # an answer comes when everything of the stretch has been read and written
    assert seen == ["ready", "done 2 0", 2, "done 3 0", 3, "done 6 0", 6]
    assert (result["status"], result["steps_done"], result["last_checkpoint"]) == ("interrupted", 6, None) and status == 129
    monkeypatch.delenv(VARIABLE)
    _, _, whole = train(base, f"{tag}-whole", *flags)
    assert steps_of(rows) == steps_of(whole)[:6] and len(whole) == 8


def test_the_last_stretch_ends_with_the_run(base, lab):
    """Where more steps are asked for than the run has, it ends as always."""
    lab.ask("go 100")
    lab.requests.close()
    status, result, rows = train(base, "turns-all")
    assert (status, result["status"], len(rows)) == (0, "ok", 8)


def test_a_signal_ends_the_wait(base, lab):
    def stop():
        assert lab.hear() == "ready"
        lab.ask("go 2")
        assert lab.hear() == "done 2 0"
        os.kill(os.getpid(), signal.SIGTERM)
    thread = threading.Thread(target=stop)
    thread.start()
    status, result, rows = train(base, "turns-stopped")
    thread.join()
    lab.requests.close()
    assert (status, result["status"], len(rows)) == (128 + signal.SIGTERM, "interrupted", 2)


def test_waiting_is_no_time_of_the_run(base, lab):
    def ask():
        lab.hear()
        lab.ask("go 2")
        lab.hear()
        threading.Event().wait(1.5)
        lab.requests.close()
    thread = threading.Thread(target=ask)
    thread.start()
    _, result, _ = train(base, "turns-waited")
    thread.join()
    assert result["loop_time_sec"] < 1.5 and result["wall_time_sec"] > 1.5
