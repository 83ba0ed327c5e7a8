"""The lab's evaluation of checkpoints: of cells that were only trained, of some that fail, by a program that may be killed."""

import os
import shutil
import sys
import time

import pytest

from nanochat.features import FEATURES
from nanochat.lab import evaluation
from nanochat.lab.cells import Cell, Folder
from nanochat.lab.rows import make_row, read_csv
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from processes import tiny_flags, trained


@pytest.mark.slow
def test_trained_cells_are_evaluated_by_the_next_start(base, monkeypatch):
    """The worker was killed when all was trained. What the rows say is not what the weights say, which are the same; one run has
    lost its last checkpoint. The process that evaluates loads no feature."""
    monkeypatch.setattr(evaluation, "COMMAND", [sys.executable, "-X", "importtime", *evaluation.COMMAND[1:]])
    flags = tuple(flag for flag in tiny_flags(base, "x", "--num-iterations=4", "--dtype=float32") if "--model-tag" not in flag)
    folder = Folder(base / "exp", "exp", base)
    cells = [Cell("baseline", 1, flags), Cell("cheat", 1, flags), Cell("lost", 1, flags), Cell("of-before", 1, flags)]
    trained(build_run(parse_config(FEATURES, [*flags, f"--model-tag={folder.tag(cells[0])}"])))
    for cell, claimed in zip(cells, (1.0, 0.1, 1.0, 1.0), strict=True):
        folder.cell_dir(cell).mkdir()
        result = {"status": "ok", "val_bpb": claimed, "lab_val_bpb": claimed, "tokens_seen": 512,
                  "steps_done": 5 if cell.variant == "lost" else 4}
        folder.write_row(cell, make_row("exp", cell.variant, 1, cell.id, list(flags), result, 0) | {"flags": flags})
    for other in cells[1:3]:
        shutil.copytree(folder.run_dir(cells[0]), folder.run_dir(other))

    baseline, cheat, lost, before = Folder(base / "exp", "exp", base).run(cells)
    assert baseline["val_bpb"] == 1.0 and cheat["val_bpb"] == 0.1  # what the runs say stays apart
    assert baseline["lab_val_bpb"] == cheat["lab_val_bpb"] > 1 and baseline["weights_sha256"] == cheat["weights_sha256"]
    assert baseline["lab_val_tokens"] == cheat["lab_val_tokens"] and baseline["lab_val_time_sec"] > 0
    assert lost["status"] == "ok" and lost["lab_val_bpb"] is None and "step 4, and the run took 5" in lost["lab_val_error"]
    assert before["lab_val_bpb"] is before["lab_val_error"] is None  # there was no checkpoint
    assert [folder.run_dir(cell).exists() for cell in cells] == [False, False, True, False]
    written = {row["variant"]: row["lab_val_bpb"] for row in read_csv(base / "exp/runs.csv")}
    assert float(written["cheat"]) == cheat["lab_val_bpb"] and written["lost"] == ""

    log = base / "exp/evaluation.txt"
    assert "nanochat.checkpoint_manager" in log.read_text() and "nanochat.features" not in log.read_text()
    log.unlink()
    assert Folder(base / "exp", "exp", base).run(cells)[2]["lab_val_error"] and not log.exists()  # not evaluated again
    again = Folder(base / "exp", "exp", base, retry_failed=True)
    assert [again.can_be_evaluated(cell) for cell in cells] == [False, False, True, False]


def program(monkeypatch, code):
    """Let this Python code be the program that evaluates; `todo` is the list of folders."""
    start = "import json, os, signal, sys, time\ntodo = json.load(sys.stdin)\ndef answer(run_dir): " \
            "print(json.dumps({'run_dir': run_dir, 'bpb': 1.0}), flush=True)\n"
    monkeypatch.setattr(evaluation, "COMMAND", [sys.executable, "-c", start + code])


def evaluated(tmp_path, names, heartbeat=lambda: None):
    """Evaluate runs of these names; their answers, a bpb or an error."""
    found = []
    evaluation.evaluate_runs([tmp_path / name for name in names], [], tmp_path, tmp_path / "log.txt", found.append, heartbeat)
    assert all(answer["seconds"] > 0 for answer in found)
    return {answer["run_dir"].rpartition("/")[2]: answer.get("bpb") or answer["error"] for answer in found}


def test_a_run_at_which_the_program_is_killed_fails_alone(monkeypatch, tmp_path):
    program(monkeypatch, "for run in todo: os.kill(os.getpid(), signal.SIGKILL) if run.endswith('large') else answer(run)")
    found = evaluated(tmp_path, ["a", "large", "b"])
    assert (found["a"], found["b"]) == (1.0, 1.0) and "exit status -9" in found["large"] and "log.txt" in found["large"]


def test_where_the_program_cannot_begin_it_is_started_once(monkeypatch, tmp_path):
    program(monkeypatch, "print('no such text', file=sys.stderr); sys.exit(2)")
    found = evaluated(tmp_path, ["a", "b", "c"])
    assert all("exit status 2" in error for error in found.values()) and len(found) == 3
    assert (tmp_path / "log.txt").read_text().splitlines() == ["no such text"]


def test_heartbeats_while_it_works_and_its_end_with_the_worker(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "POLL_SECONDS", 0.02)
    program(monkeypatch, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    beats = []

    def heartbeat():
        beats.append(time.monotonic())
        if len(beats) >= 3 and (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        evaluated(tmp_path, ["a"], heartbeat)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
