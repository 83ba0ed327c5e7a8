"""The lab on small but real runs: compared, crashed, diverged, stopped, shared, killed and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.lab.processes import signals_wait, sigterm_as_interrupt
from nanochat.lab.rows import read_csv
from nanochat.training.records import read_metrics

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("quick_starts")
PROFILE = """# A few seconds a run, most of them Python's imports.
--device-type=cpu --no-compile --dtype=float32 --data={text} --vocab-size=300
--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --window-pattern=L --device-batch-size=4 --total-batch-size=128
--num-iterations=12 --warmup-steps=2
--eval-every=6 --eval-tokens=512 --core-metric-every=-1 --sample-every=-1
"""
COSINE = ("--candidate", "--warmdown-shape=cosine", "--no-calibrate", "--no-clock")


@pytest.fixture(scope="module")
def out(base):
    (base / "tiny.flags").write_text(PROFILE.format(text=base / "text"))
    return base / "experiment"


def start(base, *argv, pictures=False):
    """The lab in a process of its own; with pictures it finds matplotlib."""
    command = [sys.executable, "-m", "scripts.lab", *map(str, argv), f"--profile={base / 'tiny.flags'}"]
    environment = {name: value for name, value in os.environ.items() if not (pictures and name == "PYTHONPATH")}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=environment | {"NANOCHAT_BASE_DIR": str(base)})


def lab(base, *argv, pictures=False):
    process = start(base, *argv, pictures=pictures)
    output, _ = process.communicate(timeout=900)
    return process.returncode, output


def rows(folder, variant=None):
    return [row for row in read_csv(folder / "runs.csv") if variant in (None, row["variant"])]


@pytest.fixture(scope="module")
def compared(base, out):
    """Four runs that the other tests use too, as the same baseline is never trained twice; a copy is in `as-compared`."""
    status, output = lab(base, "compare", *COSINE, f"--out={out}", pictures=True)
    shutil.copytree(out, base / "as-compared")
    return status, output


@pytest.mark.slow
def test_a_comparison(compared, base):
    (status, output), out = compared, base / "as-compared"
    assert status == 0, output
    assert re.fullmatch(r"verdict: (keep optional|reject|inconclusive) \(.+\)", output.splitlines()[-1])
    assert re.findall(r"^\[\d/\d\] (\w+) seed (\d): ok", output, re.MULTILINE) == [
        ("baseline", "1"), ("candidate", "1"), ("candidate", "2"), ("baseline", "2")]
    assert sorted((r["variant"], r["seed"], r["status"]) for r in rows(out)) == [
        (side, seed, "ok") for side in ("baseline", "candidate") for seed in "12"]
    batches = {path.parent.name[:-9]: [row["batch_crc32"] for row in read_metrics(path)]
               for path in (out / "cells").glob("*/metrics.jsonl")}
    assert batches["baseline-s1"] == batches["candidate-s1"] != batches["baseline-s2"] == batches["candidate-s2"]
    assert json.loads((out / "verdict.json").read_text())["line"] == output.splitlines()[-1]
    assert "<img" in (out / "report.html").read_text()
    cells = {path.name for path in (out / "cells").iterdir() if path.is_dir()}
    kept = [path.name for path in (base / "lab").glob("text-*/base_checkpoints/*")]
    assert len(cells) == 4 and not [name for name in kept if name.endswith(tuple(cells))]  # no run that succeeded is kept


@pytest.mark.slow
def test_the_same_command_again_trains_nothing(compared, base, out):
    before = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*/log.txt")}
    status, output = lab(base, "compare", *COSINE, f"--out={out}")
    assert status == 0 and output.splitlines()[-1] == compared[1].splitlines()[-1]
    assert {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*/log.txt")} == before


@pytest.mark.slow
def test_candidates_that_crash_or_diverge_are_rows_and_rejects(compared, base, out):
    for flags, ended in (("--attention-backend=fa3", "failed"), ("--matrix-lr=1e38 --embedding-lr=1e38", "diverged")):
        status, output = lab(base, "compare", f"--candidate={flags}", "--no-calibrate", "--no-clock", f"--out={out}")
        assert status == 1 and output.splitlines()[-1].startswith("verdict: reject (no instability")
        assert [r["status"] for r in rows(out, "candidate")[-2:]] == [ended] * 2
        assert [r["status"] for r in rows(out, "baseline")] == ["ok", "ok"]


@pytest.mark.slow
def test_named_variants_are_rows_of_a_table_with_chosen_columns(compared, base, out):
    """The first is the comparison's baseline, which is not trained again; the second fails before its first step."""
    columns = "variant bpb=val_bpb:.3f compiled=compile:.0f val_data exit_code status"
    status, output = lab(base, "run", "--variant", "baseline=", "bad=--val-data=/no/such/file", "--match=steps", "--seeds", 1,
                         f"--columns={columns}", f"--out={out}")
    bpb = float(rows(out, "baseline")[0]["val_bpb"])
    table = [line.split() for line in output[output.index("\nvariant "):].splitlines()[1:4]]
    assert status == 1 and table == ["variant bpb compiled val_data exit_code status".split(),
                                     ["baseline", f"{bpb:.3f}", "0", "NA", "0", "ok"],
                                     ["bad", "NA", "0", "/no/such/file", "2", "failed"]]
    log = Path(re.search(r"^bad seed 1 failed: (.+)", output, re.MULTILINE)[1]).read_text()
    assert log.startswith("+ ") and "scripts.base_train" in log.splitlines()[0] and "/no/such/file" in log.splitlines()[-1]
    assert "[1/1] bad" in output


@pytest.mark.slow
def test_a_gate_kills_a_run_and_resumes_it_to_the_same_bits(compared, base, out):
    status, output = lab(base, "gate", "--candidate", "--warmdown-shape=cosine", "--no-calibrate", "--no-clock", f"--out={out}")
    assert status == 0, output
    resumed, = rows(out, "candidate-resumed")
    assert resumed["killed_at"].startswith("step_0000") and resumed["status"] == "ok"
    same, = [r for r in rows(out, "candidate") if r["seed"] == resumed["seed"] and r["warmdown_shape"] == "cosine"]
    assert (resumed["final_loss"], resumed["val_bpb"]) == (same["final_loss"], same["val_bpb"])
    assert re.search(r"^pass +resume", output, re.MULTILINE)
    assert len(rows(out, "control")) == 2


@pytest.mark.slow
def test_a_against_a(compared, base, out):
    status, output = lab(base, "noise", "--no-calibrate", "--no-clock", f"--out={out}")
    assert status == 0, output
    again, baseline = rows(out, "again"), [r for r in rows(out, "baseline") if not r["killed_at"]]
    assert [(r["seed"], r["val_bpb"]) for r in again] == [(r["seed"], r["val_bpb"]) for r in baseline]  # the same bits
    card = json.loads((out / "noise.json").read_text())
    assert card["pairs"] == 2 and card["same_seed_same_bits"] and card["a_against_a"]["decision"] != "promote"
    assert card["control"]["decision"] != "promote" and card["control_as_candidate"]["decision"] == "reject"


@pytest.mark.slow
def test_two_workers_share_a_sweep_and_a_stopped_one_loses_nothing(compared, base):
    out, template = base / "shared", base / "mine.json"
    template.write_text(json.dumps({"variants": {"cosine": "--warmdown-shape=cosine"}}))
    argv = ("sweep", template, "--baseline=--num-iterations=40 --save-every=5", "--no-calibrate", "--no-clock", f"--out={out}")
    stopped, other = start(base, *argv), start(base, *argv)
    while stopped.poll() is None and not (len(list((out / "cells").glob("*.claim"))) == 2  # both are at work
                                          and any((base / "lab").glob("text-*/base_checkpoints/*/step_*"))):
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(300) == 130, stopped.stdout.read()
    output, _ = other.communicate(timeout=900)
    assert other.returncode == 0 and "verdict: inconclusive" in output.splitlines()[-1], output
    assert sorted((r["variant"], r["seed"], r["status"], r["steps_done"]) for r in rows(out)) == [
        (variant, seed, "ok", "40") for variant in ("baseline", "cosine") for seed in "12"]
    begun = [len(re.findall(r"^\+ ", log.read_text(), re.MULTILINE)) for log in (out / "cells").glob("*/log.txt")]
    assert len(begun) == 4 and sum(begun) <= 5  # only the run that was stopped was started again
    assert not list((out / "cells").glob("*.claim"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_program_has_been_started(signum):
    """Otherwise nobody would have got hold of the program, and it would run on."""
    started = False
    with sigterm_as_interrupt(), pytest.raises(KeyboardInterrupt):
        with signals_wait():
            signal.raise_signal(signum)
            started = True
    assert started
    with sigterm_as_interrupt(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signum)  # as before


@pytest.mark.slow
def test_two_experiments_at_once_train_and_evaluate_a_shared_cell_once(compared, base):
    code = """import sys
from pathlib import Path
from nanochat.lab.cells import Cell, Folder
from nanochat.lab.plan import read_profile
base, name = Path(sys.argv[1]), sys.argv[2]
folder = Folder(base / name, name, next(base.glob("lab/text-*")))
folder.run([Cell("baseline", 7, tuple(read_profile(str(base / "tiny.flags"))), shared=True)])"""
    both = [subprocess.Popen([sys.executable, "-c", code, str(base), name], cwd=ROOT, stdout=subprocess.PIPE,
                             env={**os.environ, "NANOCHAT_BASE_DIR": str(base)}) for name in ("first", "second")]
    assert [process.wait(300) for process in both] == [0, 0], [process.stdout.read() for process in both]
    (one,), (two,) = rows(base / "first"), rows(base / "second")
    assert one["lab_val_bpb"] == two["lab_val_bpb"] != "" and one["weights_sha256"] == two["weights_sha256"]
    assert sorted(bool(row["shared_from"]) for row in (one, two)) == [False, True]  # one of them has run it
    assert [row["experiment_name"] for row in (one, two)] == ["first/baseline", "second/baseline"]
    logs = [next((base / name / "cells").glob("*/log.txt")).read_text() for name in ("first", "second")]
    assert logs[0] == logs[1] and logs[0].count("+ ") == 1
    evaluations = [(base / name / "evaluation.txt").exists() for name in ("first", "second")]
    assert sorted(evaluations) == [False, True]
    store = Path(one["shared_from"] or two["shared_from"])
    assert not list(store.glob("cells/*.claim")) and not list(base.glob(f"lab/text-*/base_checkpoints/*{one['cell']}"))


@pytest.mark.slow
@pytest.mark.parametrize("argv, names", [
    (["compare", "--candidate=--no-such"], "--no-such"), (["compare"], "--candidate"), (["sweep"], "TEMPLATE"),
    (["compare", "--candidate=--depth=3", "--seeds", "1", "1"], "--seeds"),
    (["run", "--variant", "a b=--fp8"], "--variant"), (["run", "--variant", "a=", "a="], "--variant a"),
    (["run", "--variant", "a=--no-such"], "--no-such"), (["run", "--variant", "a=", "--candidate=--depth=3"], "--candidate"),
    (["run", "--variant", "a=", "b=--num-iterations=5", "--match=time"], "--match"),
    (["run", "--control", "--horizons", ".5", ".6", ".7"], "--control"),
    (["compare", "--candidate=--depth=3", "--horizons", ".5", ".5", ".6"], "--horizons"),
    (["sweep", "B", "--match=time"], "--match"), (["noise", "--candidate=--fp8"], "--candidate"),
    (["sweep", "Z"], "A-theory"), (["judge"], "judge"),
    (["miniseries", "--candidate=--fp8", "--depths", "4"], "--depths"),
    (["compare", "--candidate=--warmdown-shape=linear"], "lab noise")])
def test_a_wrong_command_line_is_one_message(base, argv, names):
    process = subprocess.run([sys.executable, "-m", "scripts.lab", *argv], cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "NANOCHAT_BASE_DIR": str(base)})
    assert process.returncode == 2 and names in process.stderr
    assert process.stderr.startswith("error: ") and "Traceback" not in process.stderr


def test_a_cycle_by_its_commands(base, tmp_path):
    def cycle(*argv):
        done = subprocess.run([sys.executable, "-m", "scripts.lab", "cycle", *argv, f"--file={tmp_path / 'c.json'}"], cwd=ROOT,
                              capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr
    assert cycle("status")[0] == 2
    assert cycle("start", "--name=one")[0] == 2  # a cycle declares its target first
    assert cycle("start", "--name=one", "--target-metric-threshold=1.7")[0] == 0
    status, output = cycle("phase", "--phase=0")
    assert status == 0 and "val_bpb of 1.7" in output and re.search(r"^0 .* done$", output, re.MULTILINE)
    assert cycle("phase", "--phase=9")[0] == 2
