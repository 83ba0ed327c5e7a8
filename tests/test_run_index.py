"""Runs on disk, and `scripts.runs`: each is shown as it stands; nothing is deleted without --yes, while it trains, or that could
be missed."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.runtime.lock import RunLock
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.run_index import StoredRun, find_run, last_recorded_step
from processes import Served, tiny_flags, trained
from scripts.runs import main

ROOT = Path(__file__).parent.parent
RUNS = {"plain": ["--num-iterations=12", "--save-every=3"],
        "other": ["--num-iterations=6", "--seed=2", "--warmdown-shape=cosine"]}


@pytest.fixture(scope="module")
def two_runs(base):
    for tag, extra in RUNS.items():
        trained(build_run(parse_config(FEATURES, tiny_flags(base, tag, "--dtype=float32", *extra))))
    return base


@pytest.fixture
def runs(two_runs, tmp_path, monkeypatch):
    """The folder of two runs, copied: `plain` with checkpoints at 3, 6, 9 and 12, and `other`."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return shutil.copytree(two_runs / "base_checkpoints", tmp_path / "base_checkpoints")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def statuses() -> dict[str, str]:
    return {run.name: run.status for run in map(find_run, ("plain", "other"))}


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---- how a run stands

def test_a_run_stands_as_its_lock_and_its_records_say(runs):
    plain, other = runs / "plain", runs / "other"
    assert statuses() == {"plain": "ok", "other": "ok"}
    lock = RunLock(plain)
    assert statuses() == {"plain": "running", "other": "ok"} and str(os.getpid()) in StoredRun(plain).holder
    assert StoredRun(plain, is_ours=True).status == "ok"
    lock.file.close()  # as a kill does: the file stays
    assert statuses()["plain"] == "unfinished"
    RunLock(plain).release()
    assert statuses()["plain"] == "ok"
    change(other / "result.json", status="diverged")
    rows = (plain / "metrics.jsonl").read_text().splitlines(keepends=True)
    (plain / "metrics.jsonl").write_text("".join(rows) + rows[-2].replace('"step": 11', '"step": 12'))  # resumed, then killed
    assert last_recorded_step(plain) == 12 and statuses() == {"plain": "unfinished", "other": "diverged"}
    (plain / "metrics.jsonl").write_text("".join(rows[:8]) + rows[8][:50])  # resumed from an earlier step, then killed
    run = StoredRun(plain)
    assert (run.status, run.steps_done, run.steps_planned) == ("unfinished", last_recorded_step(plain) + 1, 12)
    assert run.best_bpb == min(bpb for *_, bpb in run.val_curve) and run.tokens_per_second > 0
    shutil.copytree(other, runs / "other~1")
    (other / "model_000100.pt").write_bytes(b"of the public nanochat")
    assert [StoredRun(runs / name).status for name in ("other", "other~1")] == ["foreign", "set aside"]


def test_a_lock_of_another_machine_counts_while_its_run_shows_life(runs):
    plain = runs / "plain"
    (runs / ".plain.lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "boot": "x", "since": time.time()}))
    assert StoredRun(plain).status == "running" and "elsewhere" in StoredRun(plain).holder
    for path in (runs / ".plain.lock", plain, plain / "metrics.jsonl"):
        os.utime(path, (0, time.time() - 3600))
    assert StoredRun(plain).status == "unfinished"


def test_the_list_has_every_run_and_its_order(runs, capsys):
    (runs / "empty").mkdir()
    (runs / "a file").write_text("no run")
    for word in ("other", "plain"):
        shutil.copytree(runs / word, runs / f"{word} ü")
    change(runs / "plain ü" / "result.json", min_val_bpb=1.5, val_bpb=1.75)

    def listed(*flags):
        assert main(["list", *flags]) == 0
        head, *lines = capsys.readouterr().out.splitlines()
        assert head.split() == ["name", "depth", "steps", "status", "bpb", "tok/s", "time", "size", "date"]
        assert len({len(line) for line in lines}) <= 2  # aligned; "NA" of the last column is shorter
        return [re.split(r"  +", line)[0] for line in lines]
    assert listed("--sort=name") == ["empty", "other", "other ü", "plain", "plain ü"]
    assert listed("--sort", "bpb")[0] == "plain ü" and listed("--sort", "bpb")[-1] == "empty"
    assert listed("--sort", "bpb", "--reverse")[-2:] == ["plain ü", "empty"]  # what is not known stays last
    assert {*listed("--sort=steps")[:2]} == {"plain", "plain ü"}
    assert {*listed("--sort=size")[:2]} == {"plain", "plain ü"}


def test_show_says_what_the_records_say_and_writes_the_page(runs, capsys):
    assert main(["show", "plain"]) == 0
    said, result = capsys.readouterr().out, json.loads((runs / "plain" / "result.json").read_text())
    for known in ("plain: ok: 12 of 12 steps", f"{result['min_val_bpb']:.4f}", r"--warmup-steps\s+2 \(default 40\)",
                  r"12 +[\d.]+ +0\.\d MiB +.*last", "report: .*report.html"):
        assert re.search(known, said), known
    assert "<b id=\"status\">ok: 12 of 12 steps" in (runs / "plain" / "report.html").read_text()


def test_the_comparison_has_only_what_differs(runs, capsys):
    change(runs / "other" / "result.json", host="another")
    assert main(["compare", "plain", "other"]) == 0
    said = capsys.readouterr().out
    differing = [line.split()[0] for line in said.split("results\n")[0].splitlines()[2:] if line]
    assert differing == ["--seed", "--num-iterations", "--warmdown-shape", "--save-every", "host"]
    page = Path(re.search("page: (.*)", said)[1]).read_text()
    assert page.count("<svg") == 4 and page.count('<g class="c0"') == page.count('<g class="c1"') == 4
    assert "different tokens" not in said and "One run of each proves little" in page
    change(runs / "other" / "result.json", text_fingerprint="another text")
    assert main(["compare", "plain", "other", "--html", str(runs / "a b.html")]) == 0
    assert "different tokens" in capsys.readouterr().out and (runs / "a b.html").exists()


# ---- deletion

def test_nothing_is_deleted_without_yes_or_while_it_trains(runs, capsys):
    before = files(runs)
    with pytest.raises(UserError, match="Add --yes"):
        main(["rm", "plain"])
    said = capsys.readouterr().out
    assert str(runs / "plain") in said and "checkpoints: 4" in said and "MiB" in said
    lock = RunLock(runs / "plain")
    with pytest.raises(UserError, match=f"plain is training: process {os.getpid()}"):
        main(["rm", "other", "plain", "--yes"])
    lock.release()
    assert files(runs) == before
    assert main(["rm", "--yes", "plain"]) == 0
    assert files(runs) == {name for name in before if not name.startswith("plain/")} and not (runs / ".plain.lock").exists()


def test_what_is_not_ours_to_delete_is_refused(runs, tmp_path):
    (runs / "plain" / "notes.txt").write_text("of the user")
    (runs / "link").symlink_to(runs / "other")
    (runs / "other~1").mkdir()
    lock = RunLock(runs / "other")
    for name, why in (("plain", "notes.txt"), ("link", "is a link"), ("other~1", "kept for other"), (".", "no run is called"),
                      ("../base_checkpoints", "no run is called"), ("nosuch", "no run is called 'nosuch'.*plain")):
        with pytest.raises(UserError, match=why):
            main(["rm", name, "--yes"])
    lock.release()
    assert (runs / "plain" / "notes.txt").exists() and (runs / "other" / "result.json").exists() and (runs / "other~1").exists()


def test_the_run_that_was_to_be_replaced_gets_its_name_back(runs, capsys):
    (runs / "plain").rename(runs / "plain~1")
    (runs / "plain").mkdir()
    (runs / "plain" / "replaces.txt").write_text("plain~1")
    assert main(["rm", "plain", "--yes"]) == 0
    assert find_run("plain").status == "ok" and not (runs / "plain~1").exists()


def test_gc_takes_only_what_can_go_without_loss(runs, capsys):
    plain = runs / "plain"
    shutil.copytree(plain / "step_000003", plain / "step_000001")  # not of the run itself
    before = files(runs)
    steps = {step: bpb for step, _, bpb in StoredRun(plain).val_curve if step in (3, 6, 9, 12)}
    kept = {min(steps, key=steps.get), 12}
    doomed = {f"plain/step_{step:06d}/optimizer.safetensors" for step in steps if step not in kept}
    assert doomed and main(["gc"]) == 0 and files(runs) == before
    capsys.readouterr()
    assert main(["gc", "--yes"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in doomed) and files(runs) == before - doomed
    for step in steps:
        assert load_checkpoint(plain, step, with_optimizer=False)[2]["step"] == step
    assert load_checkpoint(plain, "latest")[2]["step"] == 12 and load_checkpoint(plain, min(kept))[1]
    assert main(["gc"]) == 0 and "nothing that can go" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", ["trains", "interrupted", "the last is damaged", "not evaluated", "set aside"])
def test_gc_leaves_runs_alone_of_which_it_is_not_sure(runs, capsys, trouble):
    plain = runs / "plain"
    lock = RunLock(plain) if trouble == "trains" else None
    if trouble == "interrupted":
        change(plain / "result.json", status="interrupted")
    if trouble == "the last is damaged":
        (plain / "step_000012" / "model.safetensors").write_bytes(b"short")
    if trouble == "not evaluated":
        rows = (plain / "metrics.jsonl").read_text().splitlines(keepends=True)
        (plain / "metrics.jsonl").write_text("".join(row for row in rows if '"val_bpb": null' in row))
    if trouble == "set aside":
        plain.rename(runs / "plain~1")
    before = files(runs)
    assert main(["gc", "--yes"]) == 0 and files(runs) == before
    assert "nothing that can go" in capsys.readouterr().out
    if lock:
        lock.release()


def test_gc_finishes_what_a_kill_interrupted(runs, capsys):
    plain, other = runs / "plain", runs / "other"
    before = files(runs)
    shutil.copytree(other / "step_000006", other / ".step_000009.writing")
    shutil.copytree(other / "step_000006", other / ".step_000003.deleting")
    (other / "step_000006").rename(other / ".step_000006.replaced")  # killed between two renames: this one comes back
    (other / ".config.json.7.tmp").write_text("half")
    os.utime(other / ".config.json.7.tmp", (0, 0))
    shutil.copytree(plain, runs / ".gone~deleting")
    shutil.copytree(plain, runs / "other~1")
    (other / "replaces.txt").write_text("other~1")
    everything = files(runs)
    assert main(["gc"]) == 0 and files(runs) == everything
    assert main(["gc", "--yes"]) == 0
    left = {name for name in before if "/" in name and not (name.startswith("plain/step") and "optimizer" in name)}
    assert left <= files(runs) <= before
    assert load_checkpoint(other, "latest")[2]["step"] == 6 and find_run("other").status == "ok"


# ---- the command line

@pytest.mark.parametrize("argv, says", [
    (["frobnicate"], "not a command: choose one of list"), (["show"], "takes NAME, got none"), (["show", "a", "b"], "takes NAME"),
    (["compare", "plain"], "two to 8 names"), (["compare", "plain", "plain"], "named twice"),
    (["list", "plain"], "takes no names"), (["list", "--sort=x"], "must be one of name"), (["show", "plane"], "There is: plain"),
    (["compare", "plain", "other", "--html=/nowhere/x"], "no folder")])
def test_wrong_commands_are_answered_in_one_line(runs, argv, says):
    with pytest.raises(UserError, match=says) as e:
        main(argv)
    assert "\n" not in str(e.value)


def test_a_base_directory_without_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "none"))
    assert main(["list"]) == 0 and "there is no run" in capsys.readouterr().out
    assert main(["gc"]) == 0 and "nothing that can go" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no run"):
        main(["show", "x"])


@pytest.mark.slow
def test_a_run_that_trains_is_shown_and_safe_and_a_killed_one_too(two_runs, tmp_path):
    """With real processes: the run, its kill, and the command."""
    run = Served(tiny_flags(two_runs, "victim", "--num-iterations=1000000"), two_runs, tmp_path / "log")
    folder = two_runs / "base_checkpoints" / "victim"

    def command(*words):
        return subprocess.run([sys.executable, "-m", "scripts.runs", *words], cwd=ROOT, text=True, capture_output=True,
                              env=os.environ | {"NANOCHAT_BASE_DIR": str(two_runs)})
    try:
        while last_recorded_step(folder) < 3:
            assert run.poll() is None
            time.sleep(0.02)
        assert re.search(r"victim .*running", command("list").stdout)
        refused = command("rm", "victim", "--yes")
        assert refused.returncode == 2 and f"process {run.pid}" in refused.stderr and folder.exists()
    finally:
        run.kill()
        run.wait()
    shown = command("show", "victim").stdout
    assert "victim: unfinished: " in shown and "<svg" in (folder / "report.html").read_text()
    assert command("rm", "victim", "--yes").returncode == 0 and not folder.exists()
