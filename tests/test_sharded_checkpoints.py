"""Checkpoints that several ranks write together: whatever the pieces, they are read as one state; what a kill, a full disk, a
rank that is gone or an earlier attempt leaves behind is never taken for a part of one. Threads or processes stand for ranks."""

import json
import multiprocessing
import random
import resource
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from nanochat import checkpoint_shards
from nanochat.checkpoint_files import merge_shards
from nanochat.checkpoint_manager import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    CheckpointWriter,
    SharedSaves,
    list_steps,
    load_checkpoint,
    recover_interrupted_writes,
    save_checkpoint,
    step_dir,
)
from nanochat.checkpoint_names import is_part_of_checkpoint, optimizer_files, optimizer_name
from nanochat.common import UserError
from nanochat.runtime.files import seal
from nanochat.training.cleanup import is_whole

FORK = multiprocessing.get_context("fork")  # starts at once, and this process has loaded all that is needed
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(checkpoint_shards, "POLL", 0.002)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(checkpoint_shards, "PATIENCE", 1.0)


class Team:
    """The ranks of a run, a writer each."""

    def __init__(self, run_dir, world_size, launch="aa", **options):
        self.run_dir, self.lines = run_dir, []
        self.writers = [CheckpointWriter(run_dir, report=self.lines.append, ranks=SharedSaves(run_dir, rank, world_size, launch),
                                         **options) for rank in range(world_size)]

    def save(self, step, weights, parts, absent=(), **state):
        """Save at the same step on all ranks but the absent ones."""
        for rank, (writer, part) in enumerate(zip(self.writers, parts, strict=True)):
            if rank not in absent:
                writer.save(step, weights if rank == 0 else {}, part, state, {})

    def close(self):
        """Every rank waits and ends, rank 0 last: the others must not need it."""
        with ThreadPoolExecutor(len(self.writers)) as pool:
            for done in [pool.submit(writer.close) for writer in reversed(self.writers)]:
                done.result(60)


def tensors_of(step, world_size=2):
    """Weights and each rank's part: a table in rows, and a matrix for every rank, all of values that tell the step."""
    rows = [6 * rank // world_size for rank in range(world_size + 1)]
    weights = {"table": torch.full((6, 3), float(step))} | {f"m{rank}": torch.ones(2, 2) for rank in range(world_size)}
    parts = [{f"table[{rows[rank]}:{rows[rank + 1]}]/step": torch.tensor(step),
              f"table[{rows[rank]}:{rows[rank + 1]}]/exp_avg": torch.arange(18.0).view(6, 3)[rows[rank]:rows[rank + 1]] + step,
              f"m{rank}/momentum_buffer": torch.full((2, 2), float(step))} for rank in range(world_size)]
    return weights, parts


def whole_of(step, world_size=2):
    return {"table/step": torch.tensor(step), "table/exp_avg": torch.arange(18.0).view(6, 3) + step} | {
        f"m{rank}/momentum_buffer": torch.full((2, 2), float(step)) for rank in range(world_size)}


def same(one, other):
    return one.keys() == other.keys() and all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints 3 and 10, by three ranks."""
    team = Team(tmp_path / "run", 3)
    for step in (3, 10):
        team.save(step, *tensors_of(step, 3))
    team.close()
    return tmp_path / "run"


# ---- what is saved on N is read whole

@settings(max_examples=25)
@given(data=st.data(), world_size=st.integers(2, 4))
def test_any_pieces_on_any_number_of_ranks_are_read_as_what_one_process_would_have_saved(tmp_path_factory, data, world_size):
    weights, whole, parts = {}, {}, [{} for _ in range(world_size)]
    for i in range(data.draw(st.integers(0, 5))):
        kind, dtype = data.draw(st.sampled_from(sorted(MOMENTS))), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
        name, rows = f"transformer.h.{i}.weight", data.draw(st.integers(1, 9))
        weights[name] = torch.randn(rows, 3)
        if data.draw(st.integers(0, 5)) == 0:
            continue  # it has had no gradient yet
        state = {key: torch.randn(rows, 3).to(dtype) for key in MOMENTS[kind]}
        state |= {"step": torch.tensor(i)} if kind == "adamw" else {"second_momentum": torch.randn(1, 3)}
        whole |= {f"{name}/{key}": tensor for key, tensor in state.items()}
        if kind == "muon" or data.draw(st.booleans()):
            parts[data.draw(st.integers(0, world_size - 1))] |= {f"{name}/{key}": tensor for key, tensor in state.items()}
            continue
        cuts = [0, *sorted(data.draw(st.lists(st.integers(0, rows), max_size=6))), rows]
        for start, stop in zip(cuts, cuts[1:], strict=False):
            if start < stop:
                parts[data.draw(st.integers(0, world_size - 1))] |= {
                    f"{name}[{start}:{stop}]/{key}": tensor[start:stop] if tensor.dim() else tensor
                    for key, tensor in state.items()}
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    team = Team(run_dir, world_size)
    team.save(7, weights, parts, note="one")
    team.close()
    loaded = load_checkpoint(run_dir, "latest")
    assert same(loaded[0], weights) and same(loaded[1], whole) and loaded[2]["note"] == "one"
    assert names(step_dir(run_dir, 7)) == sorted(["manifest.json", "model.safetensors", "state.json",
                                                 *(optimizer_name(rank, world_size) for rank in range(world_size))])
    assert names(run_dir) == ["step_000007"] and names(run_dir.parent) == ["run"]
    alone = save_checkpoint(run_dir.with_name("alone"), 7, *loaded[:2], {})  # saved on many, resumed and saved by one
    direct = save_checkpoint(run_dir.with_name("direct"), 7, weights, whole, {})
    assert all((alone / name).read_bytes() == (direct / name).read_bytes() for name in (MODEL, OPTIMIZER))


ROWS = torch.arange(12.0).view(6, 2)


@pytest.mark.parametrize("files, says", [
    ([{"w[0:2]/m": ROWS[:2]}, {"w[3:6]/m": ROWS[3:]}], "rows 2 to 3 of w/m are missing"),
    ([{"w[1:3]/m": ROWS[1:3]}, {"w[3:6]/m": ROWS[3:]}], "rows 0 to 1 of w/m are missing"),
    ([{"w[0:3]/m": ROWS[:3]}, {"w[3:5]/m": ROWS[3:5]}], "rows 5 to 6 of w/m are missing"),
    ([{"w[0:4]/m": ROWS[:4]}, {"w[3:6]/m": ROWS[3:]}], "rows 3 to 4 of w/m are there twice"),
    ([{"w[0:3]/m": ROWS[:3]}, {"w[3:7]/m": torch.ones(4, 2)}], "b.safetensors: rows 3 to 7 of w/m .*do not fit"),
    ([{"w[0:3]/m": ROWS[:3]}, {"w[3:6]/m": ROWS[3:].double()}], "b.safetensors.*do not fit"),
    ([{"w[0:3]/m": ROWS[:3]}, {"w[3:6]/m": ROWS[3:5]}], "b.safetensors.*do not fit"),
    ([{"w[0:3]/m": ROWS[:3]}, {"w[3:6]/m": torch.tensor(1.0)}], "b.safetensors.*do not fit"),
    ([{"w[0:3]/m": torch.tensor(1.0)}, {"w[3:6]/m": ROWS[3:]}], "b.safetensors.*do not fit"),
    ([{"w/m": ROWS}, {"w/m": ROWS}], "b.safetensors holds w/m, which is in another file"),
    ([{"w/m": ROWS}, {"w[0:3]/m": ROWS[:3]}], "b.safetensors holds rows of w/m, which is in another file"),
    ([{"w[0:6]/m": ROWS}, {"w/m": ROWS}], "b.safetensors holds w/m, which is in another file"),
    ([{"v[0:6]/m": ROWS}, {}], "a.safetensors holds rows of v/m, which is no parameter"),
    ([{"w[0:3]/step": torch.tensor(4)}, {"w[3:6]/step": torch.tensor(5)}], "b.safetensors: .* say 5, and others 4"),
])
def test_pieces_that_are_no_whole_are_refused(tmp_path, files, says):
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, tensors in zip(paths, files, strict=True):
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    with pytest.raises(ValueError, match=says):
        merge_shards(paths, {"w": ROWS})


# ---- damage

@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "remove", "another rank's", "another step's"])
def test_damage_of_one_ranks_file_is_found_and_the_file_named(saved, rank, damage, capsys):
    path = step_dir(saved, 10) / optimizer_name(rank, 3)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "flip a bit":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
    elif damage == "remove":
        path.unlink()
    elif damage == "another rank's":
        shutil.copy(path.with_name(optimizer_name((rank + 1) % 3, 3)), path)
    else:
        shutil.copy(step_dir(saved, 3) / path.name, path)
    with pytest.raises(UserError, match=f"damaged .*{path.name}.*another step of this run: 3"):
        load_checkpoint(saved, 10)
    assert same(load_checkpoint(saved, "latest")[1], whole_of(3, 3)) and path.name in capsys.readouterr().out
    assert load_checkpoint(saved, 10, with_optimizer=False)[0]["table"][0, 0] == 10 and not is_whole(step_dir(saved, 10))


def test_a_manifest_that_names_not_all_shards_is_refused(saved):
    path = step_dir(saved, 10) / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"], manifest["files"][optimizer_name(1, 3)]
    path.write_text(seal(manifest))
    with pytest.raises(UserError, match="damaged .*not those of one save"):
        load_checkpoint(saved, 10)
    assert not is_whole(path.parent)


def test_where_only_weights_were_kept_it_is_said(saved):
    for path in optimizer_files(step_dir(saved, 10)):
        path.unlink()
    with pytest.raises(UserError, match="as after `scripts.runs gc`; its weights are there"):
        load_checkpoint(saved, 10)
    assert load_checkpoint(saved, 10, with_optimizer=False)[1] == {}


# ---- ranks in trouble

def test_a_rank_that_is_gone_costs_a_checkpoint_and_no_training(tmp_path, impatient):
    team = Team(tmp_path / "run", 3)
    team.save(1, *tensors_of(1, 3), absent=(2,))
    for writer in team.writers:
        writer.wait()
    line, = team.lines
    assert "step 1 |" in line and "nothing came from rank 2" in line and "must share the base directory" in line
    assert line.endswith("Training goes on") and names(tmp_path / "run") == []
    team.writers[2].save(1, {}, {}, {}, {})  # late, and on its own: it finds that this one is over, and has no part in any other
    team.save(2, *tensors_of(2, 3))
    team.close()
    assert list_steps(tmp_path / "run") == [2] and same(load_checkpoint(tmp_path / "run", 2)[1], whole_of(2, 3))


def test_ranks_that_do_not_share_a_folder_are_told_so_at_the_start(tmp_path, impatient):
    SharedSaves(tmp_path / "a" / "run", 0, 2, "aa")
    for folder, launch in (("b", "aa"), ("a", "bb")):  # also where another run has left its announcement
        with pytest.raises(UserError, match=r"cannot see .*\.run\.saving.*must share the base directory.*NANOCHAT_BASE_DIR"):
            SharedSaves(tmp_path / folder / "run", 1, 2, launch)


def test_one_rank_finds_no_room(tmp_path, monkeypatch):
    """The thread of rank 1 alone sees a full disk."""
    run_dir, usage = tmp_path / "run", shutil.disk_usage(tmp_path)
    team = Team(run_dir, 2)
    team.save(1, *tensors_of(1))
    for writer in team.writers:
        writer.wait()
    thread = team.writers[1].thread.submit(threading.get_ident).result()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9) if threading.get_ident() == thread else usage)
        team.save(2, *tensors_of(2))
        for writer in team.writers:
            writer.wait()
    needed = int(team.lines[-1].partition("It needs ")[2].partition(" ")[0].replace(",", ""))
    assert "rank 1: there is no room. It needs" in team.lines[-1] and names(run_dir) == ["step_000001"]
    files = {path.name: path.stat().st_size for path in step_dir(run_dir, 1).iterdir() if path.name != MANIFEST}
    assert sum(files.values()) - 1500 < needed < sum(files.values()), "all but the headers"
    team.save(2, *tensors_of(2))
    team.close()
    assert same(load_checkpoint(run_dir, "latest")[1], whole_of(2))


def test_an_error_of_the_last_checkpoint_is_rank_0s_to_raise(tmp_path):
    team = Team(tmp_path / "run", 2)
    weights, parts = tensors_of(1)
    team.save(1, weights, [parts[0], parts[1] | {"w/odd": torch.ones(2, dtype=torch.complex64)}])
    team.writers[1].close()
    with pytest.raises(UserError, match="rank 1: .*complex64"):
        team.writers[0].close()
    assert names(tmp_path / "run") == [] and names(tmp_path) == ["run"]


def test_every_rank_waits_until_the_checkpoint_is_there(tmp_path):
    """Rank 0 is slow: it waits in its report of what was saved before; the others return only when the folder has its name."""
    team, go = Team(tmp_path / "run", 3), threading.Event()
    team.writers[0].thread.submit(go.wait)
    team.save(1, *tensors_of(1, 3))
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(writer.wait) for writer in team.writers[1:]]
        time.sleep(0.1)
        assert not any(wait.done() for wait in waits)
        go.set()
        for wait in waits:
            wait.result(30)
        assert list_steps(tmp_path / "run") == [1]
    team.close()


# ---- leftovers

def test_what_other_attempts_have_left_is_not_taken_for_a_part(tmp_path, saved):
    """Parts and reports of an attempt that was killed, of another number of ranks, and whole files under the final names."""
    for hidden in (saved / ".step_000020.writing", saved / ".step_000030.writing"):
        shutil.copytree(step_dir(saved, 10), hidden)
        for name in (optimizer_name(1, 3), optimizer_name(1, 4)):
            for kind in ("bb-1.part", "aa-2.part"):
                (hidden / f"{name}.{kind}").write_bytes(b"of another attempt")
            for kind in ("bb-1.told", "aa-2.told"):
                (hidden / f"{name}.{kind}").write_text(json.dumps({"bytes": 18, "sha256": "0" * 64}))
    assert all(map(is_part_of_checkpoint, names(saved / ".step_000020.writing")))
    team = Team(saved, 3, launch="cc")
    team.save(20, *tensors_of(20, 3))
    team.close()
    assert same(load_checkpoint(saved, 20)[1], whole_of(20, 3)) and len(names(step_dir(saved, 20))) == 6
    recover_interrupted_writes(saved)
    assert names(saved) == ["step_000003", "step_000010", "step_000020"]


def test_a_rank_of_a_run_that_was_started_again_writes_nothing(tmp_path):
    """Its process has outlived rank 0's."""
    old = Team(tmp_path / "run", 2, launch="aa")
    new = Team(tmp_path / "run", 2, launch="bb")
    old.writers[1].save(1, {}, {"m1/momentum_buffer": torch.zeros(2, 2)}, {}, {})
    new.save(1, *tensors_of(1))
    new.close()
    old.writers[1].close()
    assert same(load_checkpoint(tmp_path / "run", 1)[1], whole_of(1)) and names(tmp_path) == ["run"]


def test_the_same_step_again(saved):
    """As after a rollback: the same weights replace, others set aside; from three ranks, two and one."""
    team = Team(saved, 2)
    for change in (0, 1):
        weights, parts = tensors_of(10)
        team.save(10, {"table": weights["table"] + change, "m0": weights["m0"], "m1": weights["m1"]}, parts)
        for writer in team.writers:
            writer.wait()
    team.close()
    assert same(load_checkpoint(saved, 10)[1], whole_of(10)) and load_checkpoint(saved, 10)[0]["table"][0, 0] == 11
    assert (saved / "step_000010~1").is_dir() and (saved / "step_000010~2").is_dir() and not (saved / "step_000010~3").exists()
    save_checkpoint(saved, 10, *load_checkpoint(saved, 10)[:2], {})
    assert names(step_dir(saved, 10)) == ["manifest.json", MODEL, OPTIMIZER, "state.json"]


def test_old_checkpoints_of_several_ranks_go(tmp_path):
    team = Team(tmp_path / "run", 2, keep_last=2)
    for step in range(1, 6):
        team.save(step, *tensors_of(step))
    team.close()
    assert names(tmp_path / "run") == ["step_000004", "step_000005"]


# ---- kills

def rank_process(run_dir, rank, launch, first, limit=None):
    """A rank that saves at steps first, first + 1, ... until it is killed. limit: of bytes that it can write to a file."""
    checkpoint_shards.POLL, checkpoint_shards.PATIENCE = 0.002, 1.0
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    ready = [run_dir.with_name(f"{launch}-{other}") for other in (0, 1)]
    if rank == 1:
        wait_until(ready[0].exists)
    writer = CheckpointWriter(run_dir, report=lambda line: print(line, file=open(run_dir.with_name("log"), "a")),
                              ranks=SharedSaves(run_dir, rank, 2, launch))
    ready[rank].touch()
    wait_until(ready[1].exists)
    for step in range(first, 10**6):
        weights, parts = tensors_of(step)
        parts[rank][f"big{rank}/m"] = torch.full((2**16,), float(step))
        writer.save(step, weights, parts[rank], {}, {})


def start(run_dir, launch, first, **limits):
    ranks = [FORK.Process(target=rank_process, args=(run_dir, rank, launch, first, limits.get(f"rank{rank}")), daemon=True)
             for rank in (0, 1)]
    for process in ranks:
        process.start()
    return ranks


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_any_moment_one_rank_or_all(tmp_path):
    """kill -9 of rank 0, of rank 1 and of both, in the midst of saving; every checkpoint that is there is whole. The next start
    goes on at the step after the last one, which the killed ranks may have begun; twice without the repairs of a resume."""
    run_dir, first, half_done = tmp_path / "run", 1, 0
    for attempt in range(9):
        victims = ((0,), (1,), (0, 1))[attempt % 3]
        ranks = start(run_dir, f"{attempt:02x}", first)
        wait_until(lambda first=first: len(list_steps(run_dir)) and list_steps(run_dir)[-1] >= first + 1)
        time.sleep(random.random() / 20)
        for rank in victims:
            ranks[rank].kill()
        if victims == (1,):  # rank 0 gives up this one, and goes on to the next
            ranks[1].join()
            wait_until(lambda: "nothing came from rank 1" in (tmp_path / "log").read_text())
        for process in ranks:
            process.kill()
            process.join()
        steps = list_steps(run_dir)
        for step in steps[-2:]:
            weights, moments, _ = load_checkpoint(run_dir, step)
            assert weights["table"][0, 0] == step and moments.pop("big0/m")[-1] == moments.pop("big1/m")[-1] == step
            assert same(moments, whole_of(step))
        half_done += bool(list(run_dir.glob(".step_*.writing")))
        if attempt % 4:
            recover_interrupted_writes(run_dir)
            assert names(run_dir) == [f"step_{step:06d}" for step in steps] and not list(tmp_path.glob(".*"))
        first = steps[-1] + 1
    assert half_done, "no kill has hit a save"


def test_a_disk_that_takes_no_more_from_one_rank(tmp_path):
    """The write itself fails, in the process of rank 1, after some of it."""
    ranks = start(tmp_path / "run", "aa", 1, rank1=2**16)
    try:
        wait_until(lambda: (tmp_path / "log").exists() and "step 2 |" in (tmp_path / "log").read_text())
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = (tmp_path / "log").read_text()
    assert "step 1 | could not save" in said and "rank 1: File too large. It needs" in said and list_steps(tmp_path / "run") == []
