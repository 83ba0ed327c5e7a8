"""Checkpoints: whole or not there, damage is named, nothing foreign is executed, and writing them beside training changes
nothing of what is in them."""

import json
import os
import re
import shutil
import threading
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from nanochat import checkpoint_manager, checkpoint_writer
from nanochat.checkpoint_manager import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointWriter,
    archive_later_checkpoints,
    check_disk_space,
    checkpoint_bytes,
    delete_old,
    list_steps,
    list_tags,
    load_checkpoint,
    recover_interrupted_writes,
    safetensors_blocks,
    save_checkpoint,
    saved_shape,
    step_dir,
    total_bytes,
)
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.rng import rng_state, set_rng_state

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.zeros((), dtype=torch.int64)}
MOMENTS = {"a/exp_avg": torch.randn(2, 3)}


@pytest.fixture
def run_dir(tmp_path):
    for step in (3, 10):
        save_checkpoint(tmp_path / "run", step, WEIGHTS, MOMENTS, {"note": "héllo"})
    return tmp_path / "run"


def same(saved: dict, loaded: dict) -> bool:
    return saved.keys() == loaded.keys() and all(
        saved[k].dtype == loaded[k].dtype and saved[k].shape == loaded[k].shape and torch.equal(saved[k], loaded[k])
        for k in saved)


def test_round_trip(run_dir):
    weights, moments, state = load_checkpoint(run_dir, 10)
    assert state["note"] == "héllo" and state["step"] == 10 and same(WEIGHTS, weights) and same(MOMENTS, moments)
    assert load_checkpoint(run_dir, "10", with_optimizer=False)[1] == {}


@settings(max_examples=30)
@given(tensors=st.dictionaries(st.text(min_size=1, max_size=9), st.tuples(
    st.sampled_from(sorted(checkpoint_manager.SAFETENSORS_DTYPES, key=str)), st.lists(st.integers(0, 3), max_size=3)),
    max_size=6))
def test_files_are_what_the_library_reads(tmp_path_factory, tensors):
    """Any names, dtypes and shapes, none and empty ones among them."""
    tensors = {name: torch.randint(0, 2, shape).to(dtype) for name, (dtype, shape) in tensors.items()}
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(b"".join(safetensors_blocks(tensors)))
    loaded = load_file(path)
    assert same({k: t.float() for k, t in tensors.items()}, {k: t.float() for k, t in loaded.items()})
    assert all(loaded[k].dtype == t.dtype for k, t in tensors.items())


def test_steps_are_found_and_missing_ones_named(run_dir):
    assert list_steps(run_dir) == [3, 10] and load_checkpoint(run_dir, "latest")[2]["step"] == 10
    with pytest.raises(UserError, match="no checkpoint of step 7 .* There are: 3, 10"):
        load_checkpoint(run_dir, "7")
    with pytest.raises(UserError, match=r"no checkpoint in .*--model-tag \(there are: run\)"):
        load_checkpoint(run_dir.parent / "other", "latest")


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "remove", "another step's"])
def test_damage_is_found_and_the_file_named(run_dir, name, damage, capsys):
    path = step_dir(run_dir, 10) / name
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip a bit":
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    elif damage == "remove":
        path.unlink()
    else:
        save_checkpoint(run_dir, 3, {k: t + 1 for k, t in WEIGHTS.items()}, {k: t + 1 for k, t in MOMENTS.items()}, {})
        shutil.copy(step_dir(run_dir, 3) / name, path)
    named = name if (name, damage) != (MANIFEST, "another step's") else STATE
    with pytest.raises(UserError, match=f"damaged .*{named}.*another step of this run: 3"):
        load_checkpoint(run_dir, 10)
    assert load_checkpoint(run_dir, "latest")[2]["step"] == 3
    printed = capsys.readouterr().out
    assert "skipping" in printed and "step_000010" in printed and named in printed


def test_a_whole_checkpoint_under_another_steps_name_is_refused(run_dir):
    shutil.copytree(step_dir(run_dir, 3), step_dir(run_dir, 20))
    with pytest.raises(UserError, match="state.json is of step 3"):
        load_checkpoint(run_dir, 20)


def test_where_nothing_is_sound_it_says_so(run_dir):
    for step in (3, 10):
        (step_dir(run_dir, step) / STATE).write_text("{}")
    with pytest.raises(UserError, match="none of this run is sound"):
        load_checkpoint(run_dir, "latest")


def test_saving_the_same_weights_again_replaces_and_leaves_no_debris(run_dir):
    save_checkpoint(run_dir, 10, WEIGHTS, MOMENTS, {"note": "again"})
    assert load_checkpoint(run_dir, 10)[2]["note"] == "again"
    assert sorted(p.name for p in run_dir.iterdir()) == ["step_000003", "step_000010"]


def test_other_weights_never_take_a_checkpoints_place(run_dir):
    for n in (1, 2):
        save_checkpoint(run_dir, 10, {"a": torch.full((1,), float(n))}, {}, {})
    assert torch.equal(load_checkpoint(run_dir, 10)[0]["a"], torch.full((1,), 2.0))
    assert same(load_file(run_dir / "step_000010~1" / MODEL), WEIGHTS)
    assert torch.equal(load_file(run_dir / "step_000010~2" / MODEL)["a"], torch.ones(1))


def test_a_disk_that_takes_nothing_leaves_the_earlier_checkpoints(run_dir):
    (run_dir / ".step_000020.writing").write_text("a file where the folder should go")
    with pytest.raises(UserError, match="could not save the checkpoint of step 20 .* needs [0-9]+ bytes, and [0-9,]+ are free"):
        save_checkpoint(run_dir, 20, WEIGHTS, MOMENTS, {})
    assert list_steps(run_dir) == [3, 10] and load_checkpoint(run_dir, 10)[2]["step"] == 10


class Killed(BaseException):
    """Stands for kill -9: nothing of the writer's own runs after it."""


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "replacing"])
def test_killed_between_any_two_changes_to_the_disk(run_dir, monkeypatch, replacing):
    """Whatever rename, sync or deletion was the last, afterwards the old checkpoint is there or the new one, whole, and
    nothing else after the next start."""
    step, new = (10 if replacing else 20), {"a": torch.ones(1)}
    real = {name: getattr(os, name) for name in ("rename", "fsync", "mkdir", "rmdir", "unlink")}
    for last in range(1000):
        folder = run_dir.with_name(f"run{last}")
        shutil.copytree(run_dir, folder)
        count = iter(range(1000))

        def stop_after(call, count=count, last=last):
            def wrapped(*args, **kwargs):
                if next(count) >= last:
                    raise Killed
                return call(*args, **kwargs)
            return wrapped
        with monkeypatch.context() as patch:
            for name, call in real.items():
                patch.setattr(os, name, stop_after(call))
            try:
                save_checkpoint(folder, step, new, {}, {"note": "new"})
                finished = True
            except Killed:
                finished = False
        recover_interrupted_writes(folder)
        expected = {3: WEIGHTS, 10: WEIGHTS}
        if step in list_steps(folder) and load_checkpoint(folder, step)[2]["note"] == "new":
            expected[step] = new
        aside = [folder / "step_000010~1"] if expected[10] is new else []  # other weights are kept
        assert list_steps(folder) == sorted(expected) and len(list(folder.iterdir())) == len(expected) + len(aside)
        assert all(same(WEIGHTS, load_file(path / MODEL)) for path in aside)
        assert all(same(weights, load_checkpoint(folder, s)[0]) for s, weights in expected.items())
        if finished:
            break
    assert finished and expected[step] is new and last > 5


def test_runs_are_listed_by_the_time_they_were_trained(tmp_path):
    for age, tag in enumerate(["old", "new", "new~1"]):
        folder = save_checkpoint(tmp_path / tag, 1, WEIGHTS, {}, {})
        os.utime(folder, (1000 + age, 1000 + age))
    (tmp_path / "empty").mkdir()
    assert list_tags(tmp_path) == ["old", "new"] and list_tags(tmp_path, set_aside=True)[-1] == "new~1"


# ---- beside training

def writer_of(run_dir, **options):
    lines = []
    return CheckpointWriter(run_dir, report=lines.append, **options), lines


def test_what_is_saved_is_of_the_moment_of_saving(tmp_path, monkeypatch):
    """The thread is held up until the weights, moments and state have gone on: none of that is in the checkpoint. Twice, as
    the second copy reuses the first one's memory."""
    go, write = threading.Event(), checkpoint_writer.save_checkpoint
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", lambda *args: go.wait(20) and write(*args))
    writer, _ = writer_of(tmp_path)
    weights, moments, state = {"w": torch.zeros(5)}, {"w/m": torch.zeros(5, dtype=torch.bfloat16)}, {"losses": [1.0]}
    for step in (1, 2):
        writer.save(step, weights, moments, state, {})
        weights["w"] += 1
        moments["w/m"] += 1
        state["losses"].append(2.0)
        assert list_steps(tmp_path) == list(range(1, step)), "the step waited for the disk"
        go.set()
        writer.wait()
        go.clear()
        saved = load_checkpoint(tmp_path, step)
        assert saved[0]["w"].tolist() == [step - 1] * 5 == saved[1]["w/m"].tolist() and len(saved[2]["losses"]) == step
    writer.close()


def test_a_second_save_waits_for_the_first(tmp_path):
    writer, lines = writer_of(tmp_path)
    big = {"w": torch.zeros(2**21)}
    for step in range(4):
        big["w"] += 1
        writer.save(step, big, {}, {}, {})
    writer.close()
    assert [line.split(" |")[0] for line in lines] == [f"step {step}" for step in range(4)]
    assert all((load_checkpoint(tmp_path, step)[0]["w"] == step + 1).all() for step in range(4))


def test_a_failed_save_is_told_at_once_and_counts_only_if_it_was_the_last(tmp_path):
    writer, lines = writer_of(tmp_path)
    writer.save(1, WEIGHTS, MOMENTS, {}, {})
    writer.wait()
    (tmp_path / ".step_000002.writing").write_text("in the way")
    writer.save(2, WEIGHTS, MOMENTS, {}, {})
    writer.wait()
    assert re.search("needs [0-9]+ bytes", lines[-1]) and "Training goes on" in lines[-1]
    assert load_checkpoint(tmp_path, "latest")[2]["step"] == 1
    (tmp_path / ".step_000003.writing").write_text("in the way")
    writer.save(3, WEIGHTS, MOMENTS, {}, {})
    with pytest.raises(UserError, match="step 3"):
        writer.close()
    writer, _ = writer_of(tmp_path)
    for hidden in tmp_path.glob(".*"):
        hidden.unlink()
    writer.save(2, WEIGHTS, MOMENTS, {"a room's state": {1, 2}}, {})
    writer.wait()
    assert "not JSON serializable" in str(writer.error)
    writer.save(2, WEIGHTS, MOMENTS, {}, {})
    writer.close()
    assert list_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("keep, val_bpb, kept", [
    (-1, {}, [1, 2, 3, 4, 5]), (1, {}, [5]), (2, {}, [4, 5]), (9, {}, [1, 2, 3, 4, 5]),
    (1, {2: 0.9, 3: 1.0, 4: 1.1}, [2, 5]), (2, {2: 0.9, 4: 0.8}, [4, 5]), (1, {2: float("nan"), 3: 2.0}, [3, 5]),
    (1, {7: 0.1, 2: 0.5}, [2, 5]),
])
def test_retention_keeps_the_last_and_the_best_evaluated(tmp_path, keep, val_bpb, kept):
    """Evaluations come after their step's checkpoint, so the writer knows those of the steps before."""
    writer, _ = writer_of(tmp_path, keep_last=keep)
    for step in range(1, 6):
        writer.save(step, WEIGHTS, {}, {}, {s: bpb for s, bpb in val_bpb.items() if s < step or s > 5})
    writer.close()
    assert list_steps(tmp_path) == kept and sorted(p.name for p in tmp_path.iterdir()) == [f"step_{s:06d}" for s in kept]


@given(steps=st.sets(st.integers(1, 30), min_size=1, max_size=8), keep=st.integers(1, 4), data=st.data())
@settings(max_examples=30)
def test_retention_never_takes_the_newest_nor_a_later_one(tmp_path_factory, steps, keep, data):
    newest = data.draw(st.sampled_from(sorted(steps)))
    val_bpb = data.draw(st.dictionaries(st.sampled_from(sorted(steps)), st.floats(0, 9), max_size=8))
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        (folder / f"step_{step:06d}").mkdir()
    others = data.draw(st.sets(st.sampled_from(sorted(steps))))  # that the run has not written
    delete_old(folder, newest, keep, val_bpb, steps - others)
    left, past = set(list_steps(folder)), sorted(s for s in steps - others if s <= newest)
    assert left >= {s for s in steps if s > newest} | others | set(past[-keep:]) and len(left & set(past)) <= keep + 1
    evaluated = [s for s in past if s in val_bpb]
    assert not evaluated or min(val_bpb[s] for s in evaluated) in [val_bpb[s] for s in left if s in val_bpb]


def test_a_deletion_that_is_cut_off_leaves_nothing_that_looks_like_a_checkpoint(run_dir, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    delete_old(run_dir, 10, 1, {}, own={3, 10})
    assert list_steps(run_dir) == [10] and (run_dir / ".step_000003.deleting" / MODEL).exists()
    monkeypatch.undo()
    recover_interrupted_writes(run_dir)
    assert [p.name for p in run_dir.iterdir()] == ["step_000010"]


def test_another_future_does_not_end_in_the_old_ones_checkpoints(run_dir):
    archive_later_checkpoints(run_dir, 3)
    assert list_steps(run_dir) == [3] and (run_dir / "step_000010~1" / MODEL).exists()
    save_checkpoint(run_dir, 10, {"a": torch.ones(1)}, {}, {})
    archive_later_checkpoints(run_dir, 3)
    assert list_steps(run_dir) == [3] and same(load_file(run_dir / "step_000010~1" / MODEL), WEIGHTS)
    assert (run_dir / "step_000010~2" / MODEL).exists()


# ---- room on the disk

def test_a_checkpoints_size_is_known_before_there_is_one(tmp_path):
    model = GPT(GPTConfig(sequence_len=16, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    optimizer = model.setup_optimizer(0.01, 0.01, 0.01, 0.0, 0.01)
    expected = checkpoint_bytes(model, optimizer)
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
    optimizer.step()
    folder = save_checkpoint(tmp_path, 1, model.state_dict(), optimizer.named_state(), {})
    written = sum(p.stat().st_size for p in folder.iterdir())
    assert expected <= total_bytes(model.state_dict()) + total_bytes(optimizer.named_state()) <= written
    assert written == pytest.approx(expected, rel=0.25), "headers and NorMuon's vectors are small even in a tiny model"


def test_room_is_asked_for_before_training(tmp_path, capsys):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=rf"no room .*: a checkpoint has {2 * free:,} bytes, and [0-9,]+ are free"):
        check_disk_space(tmp_path / "not" / "there" / "yet", 2 * free, count=1, rows=1)
    assert capsys.readouterr().out == ""
    check_disk_space(tmp_path, int(0.7 * free), count=1, rows=1)
    assert "room for 1, where the run writes 1" in capsys.readouterr().out
    check_disk_space(tmp_path, free // 10, count=50, rows=1)
    assert "the run writes 50. --keep-last deletes" in capsys.readouterr().out
    check_disk_space(tmp_path, free // 100, count=3, rows=100)
    assert capsys.readouterr().out == ""


# ---- generators

def test_generators_go_on_where_they_were():
    import random

    import numpy as np

    def draw():
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist()
    random.gauss(0, 1)  # each leaves half of a pair behind, which is state, too
    np.random.standard_normal()
    state = json.loads(json.dumps(rng_state(torch.device("cpu"))))
    expected = draw()
    assert draw() != expected
    set_rng_state(state, torch.device("cpu"))
    assert draw() == expected


@pytest.mark.parametrize("taps, said", [(0, None), (4, None), (1, "sees at least 2 tokens"), (-3, "sees at least 2 tokens")])
def test_a_checkpoint_says_how_many_tokens_a_short_convolution_sees(tmp_path, taps, said):
    config = GPTConfig(short_conv=taps)
    if said is None:
        assert saved_shape({"model_config": asdict(config)}, tmp_path) == config
    else:
        with pytest.raises(UserError, match=said):
            saved_shape({"model_config": asdict(config)}, tmp_path)
