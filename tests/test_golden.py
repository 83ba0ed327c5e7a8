"""Golden runs on any machine: a run agrees with itself, and a difference is found and named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # dev/ is not installed

from dev.golden import differences, record

RUN = {"device": "cpu", "step 0 loss": "0x1p+2", "step 1 loss": "0x1p+1", "model": "ab"}


def golden(*argv, python=sys.executable, **environment):
    return subprocess.run([python, "-m", "dev.golden", *map(str, argv)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment)


@pytest.mark.slow
def test_a_run_agrees_with_itself_and_not_with_another_seed(tmp_path, quick_python):
    done = golden("--write", tmp_path / "golden.json", "--runs", "plain", python=quick_python)
    assert done.returncode == 0, done.stdout + done.stderr
    before = json.loads((tmp_path / "golden.json").read_text())
    assert sum(what.endswith(" loss") for what in before["plain"]) == 16
    assert {"step 0 val_bpb", "step 15 grad_norm", "step 15 batch_crc32", "model", "optimizer"} <= set(before["plain"])
    done = golden("--against", tmp_path / "golden.json", "--runs", "plain", python=quick_python)
    assert done.returncode == 0, done.stdout + done.stderr
    row, = differences(before, {"plain": record("plain", tmp_path, "--seed=7")})
    assert row["run"] == "plain" and row["first difference"] in ("step 0 val_bpb", "step 0 batch_crc32")


@pytest.mark.parametrize("now, first", [
    (RUN, None), (RUN | {"model": "ac"}, "model"), (RUN | {"step 1 loss": "0x1p+3", "model": "ac"}, "step 1 loss"),
    ({what: RUN[what] for what in list(RUN)[:-1]}, "model"), (RUN | {"step 2 loss": "0x1p+0"}, "step 2 loss"),
    ({"failed": "error: no text"}, "failed"),
])
def test_the_first_difference_is_named(now, first):
    rows = differences({"a": RUN, "b": RUN}, {"a": RUN, "b": now})
    assert [(row["run"], row["first difference"]) for row in rows] == ([("b", first)] if first else [])


def test_a_run_that_fails_is_named_and_not_recorded(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    (tmp_path / "golden.json").write_text(json.dumps({"plain": RUN}))
    done = golden("--against", tmp_path / "golden.json", "--runs", "plain", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "no torch here" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split()[:3] == ["plain", "failed", "None"]
    done = golden("--write", tmp_path / "other.json", "--runs", "plain", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "no torch here" in done.stderr and not (tmp_path / "other.json").exists()


@pytest.mark.parametrize("argv, names", [
    (["--against", "{tmp}/missing.json"], "--against"), (["--write", "{tmp}/a", "--against", "{tmp}/b"], "--write"),
    ([], "--write"), (["--write", "{tmp}"], "--write"), (["--write", "{tmp}/a", "--runs", "planes"], "--runs")])
def test_wrong_flags_are_refused(tmp_path, argv, names):
    done = golden(*(word.format(tmp=tmp_path) for word in argv))
    assert done.returncode == 2 and names in done.stderr and "Traceback" not in done.stderr
