"""Checkpoints: whole or not there, damage is named, nothing foreign is executed."""

import os
import pickle
import shutil

import pytest
import torch

from nanochat.checkpoint_manager import (MANIFEST, MODEL, OPTIMIZER, STATE, list_steps, list_tags, load_checkpoint,
                                         resolve_step, save_checkpoint, step_dir)
from nanochat.common import UserError

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.zeros((), dtype=torch.int64)}
MOMENTS = {"a/exp_avg": torch.randn(2, 3)}


@pytest.fixture
def run_dir(tmp_path):
    for step in (3, 10):
        save_checkpoint(tmp_path / "run", step, WEIGHTS, MOMENTS, {"note": "héllo"})
    return tmp_path / "run"


def test_round_trip(run_dir):
    weights, moments, state = load_checkpoint(run_dir, 10)
    assert state["note"] == "héllo" and state["step"] == 10
    for saved, loaded in ((WEIGHTS, weights), (MOMENTS, moments)):
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[k], loaded[k]) and saved[k].dtype == loaded[k].dtype for k in saved)


def test_steps_are_found_and_missing_ones_named(run_dir):
    assert list_steps(run_dir) == [3, 10] and resolve_step(run_dir, "latest") == 10 and resolve_step(run_dir, "3") == 3
    with pytest.raises(UserError, match="no checkpoint of step 7 .* There are: 3, 10"):
        resolve_step(run_dir, "7")
    with pytest.raises(UserError, match=r"no checkpoint in .*--model-tag \(there are: run\)"):
        resolve_step(run_dir.parent / "other", "latest")


def test_an_unfinished_checkpoint_is_not_taken(run_dir):
    shutil.copytree(step_dir(run_dir, 10), step_dir(run_dir, 20))
    (step_dir(run_dir, 20) / MANIFEST).unlink()
    assert resolve_step(run_dir, "latest") == 10


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "remove"])
def test_damage_is_found_and_the_file_named(run_dir, name, damage):
    path = step_dir(run_dir, 10) / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip a bit":
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    else:
        path.unlink()
    if name == MANIFEST and damage == "flip a bit":
        try:  # a flipped bit in a name or a number: refused, or of no effect on what is loaded
            weights, _, _ = load_checkpoint(run_dir, 10)
            assert torch.equal(weights["a"], WEIGHTS["a"])
        except UserError:
            pass
        return
    with pytest.raises(UserError, match=f"damaged .*{name if name != MANIFEST else ''}.*another step of this run: 3"):
        load_checkpoint(run_dir, 10)


def test_a_pickle_is_not_executed(run_dir, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)
    folder = step_dir(run_dir, 10)
    (folder / MODEL).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        load_checkpoint(run_dir, 10)
    assert not (tmp_path / "canary").exists()


def test_saving_again_replaces_and_leaves_no_debris(run_dir):
    save_checkpoint(run_dir, 10, {"a": torch.ones(1)}, {}, {})
    assert torch.equal(load_checkpoint(run_dir, 10)[0]["a"], torch.ones(1))
    assert sorted(p.name for p in run_dir.iterdir()) == ["step_000003", "step_000010"]


def test_a_disk_that_takes_nothing_leaves_the_earlier_checkpoints(run_dir):
    blocked = run_dir / f".step_000020.{os.getpid()}.tmp"
    blocked.write_text("a file where the folder should go")
    with pytest.raises(UserError, match="could not save a checkpoint .* needs 0 MiB"):
        save_checkpoint(run_dir, 20, WEIGHTS, MOMENTS, {})
    assert list_steps(run_dir) == [3, 10] and load_checkpoint(run_dir, 10)[2]["step"] == 10


def test_runs_are_listed_by_the_time_they_were_trained(tmp_path):
    for age, tag in enumerate(["old", "new", "new~"]):
        folder = save_checkpoint(tmp_path / tag, 1, WEIGHTS, {}, {})
        os.utime(folder, (1000 + age, 1000 + age))
    (tmp_path / "empty").mkdir()
    assert list_tags(tmp_path) == ["old", "new"]
