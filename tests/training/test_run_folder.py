"""Nothing trained is deleted: starts, kills and resumes under the same names, with real runs and real files."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.checkpoint_manager import MODEL, CheckpointWriter, list_steps
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.runtime.files import set_aside
from nanochat.training import run_folder
from nanochat.training.build import FailedStart, build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import close, fit
from processes import Served, python_m

ROOT = Path(__file__).parents[2]


def flags(base, tag, *extra):
    return ("--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
            "--num-iterations=6 --eval-every=-1 --core-metric-every=-1 --sample-every=-1 --vocab-size=300 --device-type=cpu "
            f"--no-compile --data={base / 'text'} --model-tag={tag}").split() + list(extra)


def train(base, tag, *extra):
    run = build_run(parse_config(FEATURES, flags(base, tag, *extra)))
    assert fit(run) == 0
    return run.plan.run_dir


def weights(folder: Path, hidden: bool = True) -> set[str]:
    """The content of every weight file below a folder; without those in folders that are only being written or replaced."""
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob(MODEL)
            if hidden or not path.parent.name.startswith(".")}


def command(base, tag, *extra):
    return python_m("scripts.base_train", *flags(base, tag, *extra), NANOCHAT_BASE_DIR=str(base))


def test_a_second_start_of_a_name_is_refused_before_torch_is_loaded(base):
    trained = train(base, "twice")
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    code = f"""import sys, runpy
sys.argv = ["x"] + {flags(base, "twice")!r}
try: runpy.run_module("scripts.base_train", run_name="__main__")
except SystemExit as e: sys.exit(9 if "torch" in sys.modules else e.code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert all(way in done.stderr for way in ("--resume-from-step", "--model-tag", "--overwrite", "step 6", str(trained)))
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


@pytest.mark.slow
def test_runs_started_at_random_under_colliding_names_lose_no_weights(base, tmp_path):
    """Started, killed, resumed, resumed with other flags: every weight file that was ever whole is still somewhere."""
    dice, runs = random.Random(7), base / "base_checkpoints"
    ever, statuses = set(), []
    for turn in range(12):
        tag = dice.choice(["a", "b"])
        resume = ["--resume-from-step=latest"] if dice.random() < 0.6 and list_steps(runs / tag) else []
        if resume and dice.random() < 0.6:  # another future, from somewhere on the way
            resume = [f"--resume-from-step={dice.choice(list_steps(runs / tag))}", "--allow-change",
                      f"--lr-multiplier={2 + turn}"]
        run = Served(flags(base, tag, "--save-every=2", "--num-iterations=20", *resume), base, tmp_path / f"{turn}.log")
        if dice.random() < 0.5:
            reached = len(list_steps(runs / tag)) + dice.randrange(4)
            while run.poll() is None and len(list_steps(runs / tag)) < reached:
                time.sleep(0.001)
            run.kill()
        statuses.append(run.wait())
        assert ever <= weights(runs), f"turn {turn}, {tag}, {resume}"
        ever |= weights(runs, hidden=False)
    assert statuses.count(0) > 1 and statuses.count(-9) > 1, statuses  # trained to the end, killed
    assert list(runs.glob("*/step_*~*")) and len(ever) > 15


def test_an_attempt_without_weights_makes_room(base):
    for _ in range(2):
        run = build_run(parse_config(FEATURES, flags(base, "attempt")))
        run.recorder.metrics.write({"step": 0, "loss": 1.0})
        close(run, "failed", "the test's", 1)
    assert list_steps(train(base, "attempt")) == [6]
    assert not list(run.plan.run_dir.parent.glob("attempt~*"))


@pytest.mark.parametrize("name", ["model_000300.pt", "meta_000300.json", "notes.txt"])
def test_files_of_other_programs_are_left_alone(base, name):
    folder = base / "base_checkpoints" / f"shared-{name.split('.')[0]}"
    folder.mkdir(parents=True)
    (folder / name).write_text("of another program")
    for extra in ([], ["--overwrite"]):
        done = command(base, folder.name, *extra)
        assert done.returncode == 2 and name in done.stderr and "Traceback" not in done.stderr
    assert [p.name for p in folder.iterdir()] == [name] and (folder / name).read_text() == "of another program"


@pytest.mark.parametrize("name", ["step_000300.pt", "step_000300/pytorch_model.bin", "step_7/model.bin", ".step_1.pt"])
def test_checkpoints_of_other_programs_are_left_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("trained elsewhere")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="another program"):
            run_folder.begin(tmp_path, overwrite)
    assert (tmp_path / name).read_text() == "trained elsewhere"


def test_a_first_checkpoint_that_was_only_being_written_is_no_run(tmp_path):
    (tmp_path / ".step_000005.writing").mkdir()
    (tmp_path / ".step_000005.writing" / MODEL).write_bytes(b"half")
    run_folder.begin(tmp_path, overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".step_000005.replaced").mkdir()
    (tmp_path / ".step_000005.replaced" / MODEL).write_bytes(b"whole")
    with pytest.raises(UserError, match="--resume-from-step"):
        run_folder.begin(tmp_path, overwrite=False)


# ---- --overwrite

def test_overwrite_deletes_the_old_run_only_when_the_new_one_has_weights(base):
    old = weights(train(base, "over"))
    run = build_run(parse_config(FEATURES, flags(base, "over", "--overwrite", "--seed=1")))
    assert weights(run.plan.run_dir.with_name("over~1")) == old and not weights(run.plan.run_dir)
    assert fit(run) == 0
    assert not run.plan.run_dir.with_name("over~1").exists() and weights(run.plan.run_dir) and weights(run.plan.run_dir) != old
    assert not (run.plan.run_dir / run_folder.REPLACES).exists()


def test_a_run_that_trained_nothing_gives_the_name_back(base):
    old = weights(train(base, "back"))
    run = build_run(parse_config(FEATURES, flags(base, "back", "--overwrite")))
    close(run, "failed", "the test's", 1)
    assert weights(run.plan.run_dir) == old and not run.plan.run_dir.with_name("back~1").exists()


@pytest.mark.slow
def test_a_killed_overwrite_gives_the_name_back_at_the_next_start(base, tmp_path):
    old = weights(train(base, "killed"))
    for _ in range(2):
        victim = Served(flags(base, "killed", "--overwrite", "--num-iterations=1000000"), base, tmp_path / "log")
        while not (base / "base_checkpoints/killed" / run_folder.REPLACES).exists():
            time.sleep(0.01)
        victim.kill()
        victim.wait()
        assert weights(base / "base_checkpoints") >= old
    with pytest.raises(UserError, match="trained to step 6"):
        build_run(parse_config(FEATURES, flags(base, "killed")))
    assert weights(base / "base_checkpoints/killed") == old
    resumed = build_run(parse_config(FEATURES, flags(base, "killed", "--resume-from-step=latest")))
    assert resumed.state.step == 6 and fit(resumed) == 0


def test_overwrite_and_resume_exclude_each_other():
    with pytest.raises(UserError, match="--overwrite .*--resume-from-step"):
        parse_config(FEATURES, ["--overwrite", "--resume-from-step=latest"])


# ---- --keep-last

def test_keep_last_knows_its_own(base):
    """A resumed run deletes what it has written itself, also before the resume, and nothing that was put there."""
    folder = train(base, "keeps", "--save-every=2")
    stranger = folder / "step_000001"
    stranger.mkdir()
    (stranger / MODEL).write_bytes(b"put there")
    train(base, "keeps", "--save-every=1", "--num-iterations=9", "--allow-change", "--keep-last=2", "--resume-from-step=4")
    assert list_steps(folder) == [1, 8, 9]
    assert json.loads((folder / "step_000009/state.json").read_text())["own_steps"] == [2, 4, 5, 6, 7, 8, 9]
    assert (folder / "step_000006~1" / MODEL).exists()  # of the future that the resume left


def test_a_writer_deletes_nothing_that_it_has_not_written(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"step_{step:06d}").mkdir()
    writer = CheckpointWriter(tmp_path, keep_last=1, report=lambda _: None)
    for step in (4, 5):
        writer.save(step, {"a": torch.ones(1)}, {}, {}, {})
    writer.close()
    assert list_steps(tmp_path) == [1, 2, 3, 5]


# ---- names

@settings(max_examples=30)
@given(st.lists(st.integers(1, 5), max_size=5, unique=True))
def test_what_is_set_aside_takes_the_first_free_name(tmp_path_factory, taken):
    folder = tmp_path_factory.mktemp("names")
    (folder / "x").write_text("it")
    for number in taken:
        (folder / f"x~{number}").symlink_to("nowhere")
    aside = set_aside(folder / "x")
    assert aside.name == f"x~{min(set(range(1, 7)) - set(taken))}" and aside.read_text() == "it"


def test_a_resume_that_finds_no_memory_leaves_the_runs_result(base, monkeypatch):
    folder = train(base, "kept")
    before = (folder / "result.json").read_text()
    monkeypatch.setattr("nanochat.recipe.memory_estimate.host_memory", lambda available: 2**16)
    with pytest.raises(FailedStart, match="out of memory"):
        train(base, "kept", "--resume-from-step=latest")
    assert (folder / "result.json").read_text() == before
