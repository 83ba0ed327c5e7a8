"""Faults of disks, files and machines, done to real files under real runs: nothing is lost, and what is wrong is named.

What processes suffer (kills, signals, locks, no memory) is in test_interruptions.py; bytes at random are in test_fuzz.py.
"""

import ast
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.checkpoint_manager import (
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    list_steps,
    load_checkpoint,
    load_model,
    save_checkpoint,
    step_dir,
)
from nanochat.cli.flags import flag
from nanochat.common import UserError
from nanochat.dataset import TokenDataset
from nanochat.features import FEATURES, Feature
from nanochat.runtime.files import file_digest, seal
from nanochat.tokenizer import Tokenizer
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from nanochat.training.records import read_metrics
from processes import python_m

ROOT = Path(__file__).parents[2]
STEPS = 6
EVERY_BIT = "NANOCHAT_FUZZ" in os.environ  # else some of them, which takes less time


def argv(base, tag, *extra):
    return (f"--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
            f"--num-iterations={STEPS} --warmup-steps=2 --short-conv=2 --eval-every=3 --eval-tokens=256 "
            f"--core-metric-every=-1 --sample-every=-1 --save-every=2 --vocab-size=300 --device-type=cpu --no-compile "
            f"--data={base / 'text'} --model-tag={tag}").split() + list(extra)


def train(base, tag, *extra, features=FEATURES):
    """A run in this process -> (its folder, its exit status)."""
    run = build_run(parse_config(features, argv(base, tag, *extra)), features)
    return run.plan.run_dir, fit(run)


def train_process(base, tag, *extra):
    return python_m("scripts.base_train", *argv(base, tag, *extra), NANOCHAT_BASE_DIR=str(base))


def final_bytes(run_dir):
    return [(step_dir(run_dir, STEPS) / name).read_bytes() for name in (MODEL, OPTIMIZER)]


def losses(run_dir):
    return [(row["step"], row["loss"]) for row in read_metrics(run_dir / "metrics.jsonl") if row["loss"] is not None]


def put(path, content):
    """Write a file anew: ext4 takes its time to overwrite one in place."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def plain(base):
    """The run that nothing happens to."""
    run_dir, status = train(base, "plain")
    assert status == 0 and list_steps(run_dir) == [2, 4, 6]
    return run_dir


@pytest.fixture
def copy(plain, request):
    """A copy of its folder, to be damaged; what comes after step 4 is yet to be trained."""
    folder = plain.with_name(request.node.name.partition("[")[0])
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(plain, folder)
    shutil.rmtree(step_dir(folder, STEPS))
    return folder


# ---- row 2: the disk is full

@contextmanager
def small_disk(folder, size):
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_the_disk_fills_up(plain, base, tmp_path):
    """Room for one checkpoint and a half: the second and the third cannot be saved, the first loads, and with more room the
    run ends as if nothing had been."""
    elsewhere = tmp_path / "base"
    shutil.copytree(base, elsewhere, ignore=shutil.ignore_patterns("base_checkpoints"))
    one = sum(p.stat().st_size for p in step_dir(plain, 2).iterdir())
    with small_disk(elsewhere / "base_checkpoints", f"{int(1.7 * one) // 1024}k"):
        done = train_process(elsewhere, "full", f"--data={base / 'text'}")
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert "room for 1, where the run writes 3. --keep-last" in done.stdout
        assert "step 4 | could not save" in done.stdout and "Training goes on" in done.stdout
        assert "could not save the checkpoint of step 6" in done.stderr and "bytes" in done.stderr and "are free" in done.stderr
        run_dir = elsewhere / "base_checkpoints/full"
        assert list_steps(run_dir) == [2] and not list(run_dir.glob(".step*"))
        assert losses(run_dir) == losses(plain) and json.loads((run_dir / "result.json").read_text())["status"] == "failed"
        subprocess.run(["mount", "-o", "remount,size=100m", str(elsewhere / "base_checkpoints")], check=True)
        done = train_process(elsewhere, "full", f"--data={base / 'text'}", "--resume-from-step=latest")
        assert done.returncode == 0, done.stderr
        assert final_bytes(run_dir) == final_bytes(plain) and losses(run_dir) == losses(plain)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits")
def test_a_file_that_cannot_grow_any_further(tmp_path):
    """The write fails in the middle of each file, as under a quota."""
    import resource
    tensors = {"a": torch.randn(5000)}
    save_checkpoint(tmp_path, 1, tensors, tensors, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, 10_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(UserError, match="File too large. It needs 40,0.. bytes"):
                save_checkpoint(tmp_path, 2, tensors, tensors, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"] and load_checkpoint(tmp_path, 1)[2]["step"] == 1


def test_no_room_at_all_is_said_before_training(base, monkeypatch):
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(UserError, match=r"no room for a checkpoint: a checkpoint has [0-9,]+ bytes, and 20,000 are free"):
        train(base, "roomless")
    assert not (base / "base_checkpoints/roomless").exists()


# ---- row 3: damaged checkpoints

def test_every_bit_and_every_length(tmp_path):
    """Each single bit of each file flipped, each file cut off at each length: always found, and the file named. (Without
    NANOCHAT_FUZZ every seventh.)"""
    save_checkpoint(tmp_path, 1, {"w": torch.randn(3, 2)}, {"w/m": torch.randn(2)}, {"tokens": "x", "clock": {"train": 1.5}})
    folder, tried, stride = step_dir(tmp_path, 1), 0, 1 if EVERY_BIT else 7

    def is_found(path):
        try:
            load_checkpoint(tmp_path, 1)
        except UserError as e:
            return path.name in str(e)
    assert load_checkpoint(tmp_path, 1)[2]["tokens"] == "x"
    for path in folder.iterdir():
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), stride):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            put(path, flipped)
            assert is_found(path), (path.name, bit)
        for length in range(0, len(content), stride):
            put(path, content[:length])
            assert is_found(path), (path.name, length)
        put(path, content)
        tried += 9 * len(content) // stride
    assert tried > 6000 // stride and load_checkpoint(tmp_path, 1)[2]["tokens"] == "x"


@pytest.mark.slow
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
def test_latest_falls_back_and_ends_in_the_same_bits(plain, base, copy, name, capsys):
    path = step_dir(copy, 4) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"step_000004 is damaged .*{name}.*another step of this run: 2"):
        train(base, copy.name, "--resume-from-step=4")
    _, status = train(base, copy.name, "--resume-from-step=latest")
    printed = capsys.readouterr().out
    assert status == 0 and "skipping" in printed and name in printed and "at step 2" in printed
    assert final_bytes(copy) == final_bytes(plain) and losses(copy) == losses(plain)


# ---- row 4: code in the place of data

class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def reseal(path, **changes):
    """Write a manifest with these changes and a seal that fits them, as who wants to harm would."""
    content = json.loads(path.read_bytes()) | changes
    del content["sha256"]
    path.write_text(seal(content))


def test_a_pickle_in_a_checkpoint_is_not_executed(copy, tmp_path):
    """Even where its checksum fits: a checksum is no signature."""
    folder, canary = step_dir(copy, 4), tmp_path / "canary"
    for name in (MODEL, OPTIMIZER, STATE):
        for content in (pickle.dumps(Bomb(canary)), _zipped_pickle(canary, tmp_path)):
            before = (folder / name).read_bytes(), (folder / MANIFEST).read_bytes()
            (folder / name).write_bytes(content)
            files = json.loads(before[1])["files"] | {name: {"bytes": len(content), "sha256": file_digest(folder / name)}}
            reseal(folder / MANIFEST, files=files)
            with pytest.raises(UserError, match=name):
                load_checkpoint(copy, 4)
            (folder / name).write_bytes(before[0])
            (folder / MANIFEST).write_bytes(before[1])
    assert load_checkpoint(copy, 4)[2]["step"] == 4 and not canary.exists()


def _zipped_pickle(canary, tmp_path):
    torch.save(Bomb(canary), tmp_path / "bomb.pt")
    return (tmp_path / "bomb.pt").read_bytes()


def test_a_pickle_in_the_token_cache_or_as_tokenizer_is_not_executed(plain, base, tmp_path):
    canary = tmp_path / "canary"
    tokens = next(p for p in (base / "tokens").iterdir() if (p / "manifest.json").exists())
    folder = shutil.copytree(tokens, tmp_path / "tokens")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    entry = manifest["splits"]["train"]["shards"][0][1]
    with open(folder / entry["name"], "wb") as f:
        np.save(f, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    entry |= {"bytes": (folder / entry["name"]).stat().st_size, "sha256": file_digest(folder / entry["name"])}
    reseal(folder / "manifest.json", splits=manifest["splits"])
    with pytest.raises(UserError, match=entry["name"]):
        TokenDataset.open(folder).split("train")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(UserError, match="tokenizer.pkl is a pickle"):
        Tokenizer.from_directory(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.from_directory(tmp_path / "tokenizer")
    assert not canary.exists()


def test_nothing_in_the_project_unpickles():
    """No module that does, no torch.load but with weights_only=True, no allow_pickle=True, no yaml that makes objects."""
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    files = [p for part in ("nanochat", "scripts", "attempts", "dev") for p in (ROOT / part).rglob("*.py")]
    assert len(files) > 40
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {a.name for a in node.names} | {getattr(node, "module", None) or ""}
                assert not {n.partition(".")[0] for n in names} & modules, path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
                true = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
                assert called != "torch.load" or "weights_only" in true, path
                assert "allow_pickle" not in true and called not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), path


# ---- row 6: damaged and exchanged text and tokens

@pytest.fixture
def tokens(plain, base, tmp_path):
    """A copy of the prepared tokens."""
    return shutil.copytree(next(p for p in (base / "tokens").iterdir() if (p / "manifest.json").exists()), tmp_path / "tokens")


def keep_times(path, content):
    """Write without leaving a trace in the file's size and time of change."""
    times = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("file", ["train_000000.bin", "val_000000.bin", "train_000000.lengths.npy", "val_000000.lengths.npy"])
def test_a_flipped_bit_in_a_shard_is_named(tokens, file):
    TokenDataset.open(tokens)
    content = (tokens / file).read_bytes()
    for bit in random.Random(file).sample(range(8 * len(content)), 20):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        keep_times(tokens / file, flipped)
        with pytest.raises(UserError, match=f"{file} has changed since it was written"):
            TokenDataset.open(tokens)
    keep_times(tokens / file, content)
    TokenDataset.open(tokens)


def test_a_shard_exchanged_for_another_of_its_size_is_named(tokens):
    TokenDataset.open(tokens)
    for suffix in (".bin", ".lengths.npy"):
        path = tokens / f"val_000000{suffix}"
        other = tokens / "other"
        other.write_bytes(path.read_bytes()[:-2] + b"\1\2")
        times = path.stat()
        os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
        path.rename(tokens / "kept")
        other.rename(path)
        with pytest.raises(UserError, match=f"val_000000{suffix} has changed"):
            TokenDataset.open(tokens)
        (tokens / "kept").rename(path)
    TokenDataset.open(tokens)


def test_every_bit_of_a_manifest(tokens):
    path = tokens / "manifest.json"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 1 if EVERY_BIT else 11):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        put(path, flipped)
        with pytest.raises(UserError, match="manifest.json"):
            TokenDataset.open(tokens)


def test_checked_once_and_again_after_a_copy(tokens, monkeypatch):
    from nanochat import dataset
    digests = []
    monkeypatch.setattr(dataset, "file_digest", lambda path, *rest: digests.append(path.name) or file_digest(path, *rest))
    TokenDataset.open(tokens)
    assert len(digests) == 4, "a copy is not what was checked"
    TokenDataset.open(tokens)
    assert len(digests) == 4, "what was checked is not read again"
    TokenDataset.open(tokens).verify()
    assert len(digests) == 8


@pytest.mark.slow
def test_a_run_on_a_damaged_shard_does_not_start(plain, base, tmp_path):
    elsewhere = tmp_path / "base"
    shutil.copytree(base, elsewhere, ignore=shutil.ignore_patterns("base_checkpoints"))
    tokens = Path(json.loads((step_dir(plain, 2) / "state.json").read_text())["tokens"])
    shard = elsewhere / tokens / "train_000000.bin"
    content = bytearray(shard.read_bytes())
    content[1001] ^= 2
    shard.write_bytes(content)
    done = train_process(elsewhere, "damaged", f"--data={base / 'text'}")
    assert done.returncode == 2 and f"{shard} has changed" in done.stderr and "Traceback" not in done.stderr


# ---- row 7: difficult text

@pytest.mark.parametrize("content, message", [
    ("Größe".encode("latin-1") * 2000, "byte 2 is not UTF-8"),
    (b"", "no text in"), (b" \n\t" * 1000, "no text in"), (b"too short", "one row needs"),
    (b"a few words, " * 7, "one step needs"),
])
def test_text_that_cannot_be_trained_on_is_explained(plain, base, tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        train(base, "bad-text", f"--data={path}")
    assert not (base / "base_checkpoints/bad-text").exists()


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"\0" * 50_000, b"nul\0in\0words " * 5000, b"one line without an end " * 40_000],
                         ids=["nuls", "nul", "line"])
def test_odd_text_is_trained_on(plain, base, tmp_path, content):
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    assert train(base, "odd-text", "--overwrite", f"--data={path}", "--num-iterations=2")[1] == 0


# ---- row 13: the machine

@pytest.mark.skipif(sys.platform == "win32", reason="/dev/null")
def test_a_base_directory_that_cannot_be(base):
    done = python_m("scripts.base_train", *argv(base, "nowhere"), NANOCHAT_BASE_DIR="/dev/null/base")
    assert done.returncode == 2 and "/dev/null/base" in done.stderr and "NANOCHAT_BASE_DIR" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_a_read_only_base_directory(plain, base, tmp_path):
    """What is there can be used, nothing can be added, and the message says so."""
    with small_disk(tmp_path / "base", "50m"):
        shutil.copytree(base, tmp_path / "base", dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "base")], check=True)
        done = train_process(tmp_path / "base", "unwritten", f"--data={base / 'text'}")
        assert done.returncode == 2 and "write to" in done.stderr and "Traceback" not in done.stderr
        done = python_m("scripts.sample", "--model-tag=plain", "--max-tokens=4", "-p", "def", "--device-type=cpu",
                        NANOCHAT_BASE_DIR=str(tmp_path / "base"))
        assert done.returncode == 0 and done.stdout.startswith("def"), done.stderr


def test_a_base_directory_that_vanishes(plain, base, tmp_path, monkeypatch, capfd):
    """Checkpoints from then on make it anew, so what is trained is not lost."""
    elsewhere = tmp_path / "base"
    shutil.copytree(base, elsewhere, ignore=shutil.ignore_patterns("base_checkpoints"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(elsewhere))
    run = build_run(parse_config(FEATURES, argv(base, "vanished")))
    forward = run.trainer.forward

    def vanishing(*args, **kwargs):
        if run.state.step == 3 and elsewhere.exists():
            shutil.rmtree(elsewhere)
        return forward(*args, **kwargs)
    run.trainer.forward = vanishing
    fit(run)
    assert "Traceback" not in capfd.readouterr().err
    assert list_steps(run.plan.run_dir) == [4, 6] and final_bytes(run.plan.run_dir) == final_bytes(plain)


def test_a_clock_that_jumps_back_has_no_effect(plain, base, monkeypatch):
    now = iter(range(2_000_000_000, 0, -86_400))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run_dir, status = train(base, "backwards")
    assert status == 0 and final_bytes(run_dir) == final_bytes(plain)
    assert all(row["train_time_sec"] >= 0 and (row["dt_ms"] or 1) > 0 for row in read_metrics(run_dir / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces")
def test_no_shared_memory(plain, base):
    """/dev/shm holds not one byte, as in small containers."""
    fill = "mount -t tmpfs -o size=4k tmpfs /dev/shm && cat /dev/zero >/dev/shm/full"
    wrapper = ["unshare", "-m", "sh", "-c", f'{fill}; exec "$@"', "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True).stderr.find(b"No space") < 0:
        pytest.skip("no mount namespace can be made here (needs root)")
    done = subprocess.run([*wrapper, sys.executable, "-m", "scripts.base_train", *argv(base, "shm")], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env=os.environ | {"NANOCHAT_BASE_DIR": str(base)})
    assert done.returncode == 0, done.stderr
    assert final_bytes(base / "base_checkpoints/shm") == final_bytes(plain)


# ---- everything that decides the future

class Dice(Feature):
    """Throws dice of every generator at each step, scales the loss by them, and starts the suffix at one of them."""
    name = "dice"

    @dataclass
    class Config:
        """Dice"""
        dice: bool = flag(False, "throw them")

    @classmethod
    def enabled(cls, config):
        return config.features[cls.name].dice

    def before_step(self, step):
        self.thrown = [torch.rand(()).item(), random.random(), np.random.rand()]
        return {"active_start": int(sum(self.thrown) * 7) % 2}

    def step_columns(self):
        return {"thrown": self.thrown}


@pytest.mark.slow
def test_features_that_draw_at_random_go_on_with_the_same_draws(base):
    features = (*FEATURES, Dice)
    random.seed(1)
    np.random.seed(1)
    whole, status = train(base, "dice", "--dice", features=features)
    assert status == 0
    resumed = shutil.copytree(whole, whole.with_name("dice-resumed"))
    for step in (4, 6):
        shutil.rmtree(step_dir(resumed, step))
    assert train(base, resumed.name, "--dice", "--resume-from-step=latest", features=features)[1] == 0
    thrown = [[row.get("thrown") for row in read_metrics(folder / "metrics.jsonl")] for folder in (whole, resumed)]
    assert thrown[0] == thrown[1] and len({str(t) for t in thrown[0]}) > STEPS // 2
    assert final_bytes(resumed) == final_bytes(whole)


@pytest.mark.slow
def test_other_flags_are_refused_or_said(plain, base, copy, capsys):
    """What is free changes no bit; what is not is refused with the old value, or, if wanted, starts another future."""
    with pytest.raises(UserError, match=r"not go on with the same run:\n  --matrix-lr 0.02 -> 0.03\n.*--allow-change"):
        train(base, copy.name, "--resume-from-step=2", "--matrix-lr=0.03")
    with pytest.raises(UserError, match="--num-iterations 6 -> 9"):
        train(base, copy.name, "--resume-from-step=2", "--num-iterations=9")
    assert losses(copy) == losses(plain) and list_steps(copy) == [2, 4]
    free = ["--eval-every=1", "--save-every=1", "--keep-last=2", "--sample-every=-1", "--seed=42", "--max-train-seconds=900"]
    assert train(base, copy.name, "--resume-from-step=2", *free)[1] == 0
    assert final_bytes(copy) == final_bytes(plain) and len(list_steps(copy)) in (2, 3)
    assert "the bits may differ" not in capsys.readouterr().out and not list(copy.glob("*~*"))
    assert train(base, copy.name, "--resume-from-step=5", "--device-batch-size=1", "--save-every=1")[1] == 0
    assert "the bits may differ from here on: rows per micro-batch 2 -> 1" in capsys.readouterr().out
    assert (copy / "step_000006~1").exists(), "of the run with the old rows"
    assert train(base, copy.name, "--resume-from-step=5", "--num-iterations=7", "--allow-change")[1] == 0
    assert "changed: --num-iterations 6 -> 7" in capsys.readouterr().out and list_steps(copy)[-1] == 7


@pytest.mark.slow
def test_text_that_changed_beneath_a_run_is_refused(base, tmp_path):
    text = shutil.copytree(base / "text", tmp_path / "text")
    data = f"--data={text}"
    run_dir, _ = train(base, "text", data)
    with (text / "0.txt").open("a", encoding="utf-8") as file:
        file.write("One line more.\n")
    with pytest.raises(UserError, match=r"the tokens [0-9a-f]{32} -> [0-9a-f]{32}\n.*--allow-change"):
        train(base, "text", data, "--resume-from-step=4")
    assert train(base, "text", data, "--resume-from-step=4", "--allow-change")[1] == 0
    os.utime(text / "0.txt", (1, 1))  # prepared again, but the same text
    assert train(base, "text", data, "--resume-from-step=6")[1] == 0


def test_a_checkpoint_is_whole_before_evaluation_begins(base, monkeypatch):
    seen = []
    run = build_run(parse_config(FEATURES, argv(base, "first", "--eval-every=2", "--save-every=2")))

    def bits_per_byte():
        step = run.state.step
        seen.append((step, step == 0 or load_checkpoint(run.plan.run_dir, step)[2]["step"] == step))
    monkeypatch.setattr(run.evaluator, "bits_per_byte", bits_per_byte)
    assert fit(run) == 0
    assert seen == [(step, True) for step in (0, 2, 4, 6)]


def test_a_checkpoint_from_a_stranger_builds_nothing_huge(plain, base, copy):
    """A state that says what cannot be: refused before any memory is taken."""
    folder = step_dir(copy, 4)
    state, manifest = (folder / STATE).read_bytes(), (folder / MANIFEST).read_bytes()
    shape = json.loads(state)["model_config"]
    for change in ({"n_layer": 10**9}, {"n_embd": 2**24, "n_head": 2**20, "n_kv_head": 2**20}, {"vocab_size": 2**24},
                   {"n_layer": 0}, {"n_head": 3}, {"n_head": "2"}, {"window_pattern": ""}, {"more": 1}, {"n_kv_head": True}):
        (folder / STATE).write_text(json.dumps(json.loads(state) | {"model_config": shape | change}))
        entry = {STATE: {"bytes": (folder / STATE).stat().st_size, "sha256": file_digest(folder / STATE)}}
        reseal(folder / MANIFEST, files=json.loads(manifest)["files"] | entry)
        with pytest.raises(UserError, match="what its model is like|another shape"):
            load_model("base", torch.device("cpu"), "eval", copy.name, 4)
    (folder / STATE).write_bytes(state)
    (folder / MANIFEST).write_bytes(manifest)
    assert load_model("base", torch.device("cpu"), "eval", copy.name, 4)[2]["step"] == 4
