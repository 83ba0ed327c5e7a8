"""Readers of files and command lines, given what nobody would write: a clear UserError or a correct result, never a
traceback, a hang or something else than was written.

`NANOCHAT_FUZZ=50` tries fifty times as many inputs.
"""

import gzip
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from nanochat.checkpoint_manager import MANIFEST, MODEL, OPTIMIZER, STATE, load_checkpoint, save_checkpoint, saved_shape, step_dir
from nanochat.cli.flags import build_parser
from nanochat.common import UserError
from nanochat.data.sources import iter_documents
from nanochat.dataset import CHECKED, TokenDataset, prepare_tokens
from nanochat.features import FEATURES
from nanochat.runtime.files import file_digest, seal
from nanochat.tokenizer import Tokenizer
from nanochat.training.config import Config, parse_config
from nanochat.training.records import ROW_COLUMNS, MetricsFile, read_metrics

TIMES = int(os.environ.get("NANOCHAT_FUZZ", "1"))


def fuzz(examples):
    return settings(max_examples=examples * TIMES, deadline=20_000, suppress_health_check=list(HealthCheck))


def mutated(content: bytes, data) -> bytes:
    """`content` after a few changes: bits flipped, bytes exchanged, removed, repeated or put in, an end cut off, a number or a
    word exchanged for another."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        length = data.draw(st.sampled_from([1, 1, 2, 8, 64]))
        kind = data.draw(st.sampled_from(["flip", "set", "remove", "repeat", "insert", "cut", "digits", "word"]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            content[at:at + length] = data.draw(st.binary(min_size=length, max_size=length))
        elif kind == "remove":
            del content[at:at + length]
        elif kind == "repeat":
            content[at:at] = content[at:at + length] * data.draw(st.sampled_from([1, 3, 2000]))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(max_size=9))
        elif kind == "cut":
            del content[at:]
        else:
            start = next((i for i in range(at, len(content)) if chr(content[i]).isdigit() == (kind == "digits")), at)
            content[start:start + length] = data.draw(st.sampled_from(
                [b"-1", b"0", b"1e999", b"99999999999999999999", b"0.5"] if kind == "digits" else
                [b"null", b"{}", b"[]", b'""', b"true", b"[" * 3000, b'"\\ud800"', b"NaN", b"../../x", b"\xff"]))
    return bytes(content)


def put(path: Path, content: bytes) -> None:
    """Write a file anew: ext4 takes its time to overwrite one in place."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


# ---- checkpoints

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    config = {"sequence_len": 16, "vocab_size": 64, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 32,
              "window_pattern": "L"}
    save_checkpoint(run_dir, 1, {"w": torch.randn(4, 3), "b": torch.zeros(2).bfloat16()}, {"w/step": torch.tensor(3)},
                    {"model_config": config, "clock": {"train": 1.25}, "tokenizer": "abc"})
    return run_dir


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE, MANIFEST])
@fuzz(100)
@given(data=st.data())
def test_a_checkpoint_with_changed_bytes_is_never_loaded(checkpoint, name, data):
    path = step_dir(checkpoint, 1) / name
    content = path.read_bytes()
    try:
        put(path, changed := mutated(content, data))
        if changed == content:
            return
        with pytest.raises(UserError, match=name):
            load_checkpoint(checkpoint, 1)
    finally:
        put(path, content)


@pytest.mark.parametrize("name", [MODEL, STATE])
@fuzz(150)
@given(data=st.data())
def test_a_stranger_who_seals_what_he_changed(checkpoint, name, data):
    """The checksums fit, the content is anything: refused, or tensors and a JSON object of the step."""
    folder = step_dir(checkpoint, 1)
    before = {p: p.read_bytes() for p in (folder / name, folder / MANIFEST)}
    try:
        put(folder / name, mutated(before[folder / name], data))
        manifest = json.loads(before[folder / MANIFEST])
        del manifest["sha256"]
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)}
        put(folder / MANIFEST, seal(manifest).encode())
        weights, _, state = load_checkpoint(checkpoint, 1, with_optimizer=False)
        assert all(isinstance(t, torch.Tensor) for t in weights.values()) and state["step"] == 1
        shape = saved_shape(state, checkpoint)
        sizes = vars(shape) | {"short_conv": shape.short_conv or 2, "exclusive_attention": True}
        assert type(shape.exclusive_attention) is bool
        assert sizes["short_conv"] > 1 and all(1 <= n <= 2**24 for n in sizes.values() if isinstance(n, int))
    except UserError:
        pass
    finally:
        for path, content in before.items():
            put(path, content)


# ---- tokens and tokenizer

@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train_from_iterator(["the cat sat on the mat. " * 20], vocab_size=270)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, tok):
    text = tmp_path_factory.mktemp("text")
    for i in range(30):
        (text / f"{i}.txt").write_text(f"{i} cats sat on the mat. " * (i + 1))
    before, os.environ["NANOCHAT_BASE_DIR"] = os.environ["NANOCHAT_BASE_DIR"], str(tmp_path_factory.mktemp("base"))
    yield prepare_tokens(str(text), tok)
    os.environ["NANOCHAT_BASE_DIR"] = before


def read_all(folder):
    dataset = TokenDataset.open(folder)
    dataset.summary()
    return [[split.doc(i).tolist() for i in range(split.num_docs)] for split in map(dataset.split, ("train", "val"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "train_000000.bin", "val_000000.lengths.npy", CHECKED])
@fuzz(100)
@given(data=st.data())
def test_tokens_with_changed_bytes(tokens, name, data):
    """Named, or, where only the notes on what was checked have changed, of no effect."""
    expected, path = read_all(tokens), tokens / name
    content = path.read_bytes()
    try:
        put(path, changed := mutated(content, data))
        if name == CHECKED or changed == content:
            assert read_all(tokens) == expected
        else:
            with pytest.raises(UserError, match=name):
                read_all(tokens)
    finally:
        put(path, content)


@pytest.mark.parametrize("name", ["manifest.json", "val_000000.lengths.npy", "val_000000.bin"])
@fuzz(100)
@given(data=st.data())
def test_tokens_of_a_stranger_who_seals_what_he_changed(tokens, name, data):
    """Refused in words, or read: no other error, nothing that hangs."""
    path, manifest_path = tokens / name, tokens / "manifest.json"
    before = {p: p.read_bytes() for p in (path, manifest_path)}
    try:
        if name == "manifest.json":
            plain = json.loads(before[path])
            del plain["sha256"]
            try:
                manifest = json.loads(mutated(json.dumps(plain).encode(), data))
                put(path, seal(manifest).encode())
            except (ValueError, TypeError, RecursionError):
                return
        else:
            put(path, mutated(before[path], data))
            manifest = json.loads(before[manifest_path])
            del manifest["sha256"]
            for file in manifest["splits"]["val"]["shards"][0]:
                file |= {"bytes": (tokens / file["name"]).stat().st_size, "sha256": file_digest(tokens / file["name"])}
            put(manifest_path, seal(manifest).encode())
        read_all(tokens)
    except UserError:
        pass
    finally:
        for p, content in before.items():
            put(p, content)


@fuzz(150)
@given(data=st.data())
def test_a_tokenizer_with_changed_bytes(tok, tmp_path_factory, data):
    """Refused, or one that says of itself that it is another, or the same."""
    folder = tmp_path_factory.mktemp("tok")
    path = tok.save(folder)
    put(path, mutated(path.read_bytes(), data))
    try:
        other = Tokenizer.from_directory(folder)
    except UserError as e:
        assert str(path) in str(e)
        return
    if other.fingerprint() == tok.fingerprint():
        assert other.encode("the cat sat 12\n") == tok.encode("the cat sat 12\n")


# ---- text

SOURCES = {".txt": b"some words, and more.\n" * 9, ".jsonl": b'{"text": "some words"}\n{"text": "more", "n": [1, 2]}\n' * 4,
           ".jsonl.gz": gzip.compress(b'{"text": "some words"}\n' * 9, mtime=0)}


@pytest.mark.parametrize("kind", sorted(SOURCES))
@fuzz(100)
@given(data=st.data(), skip_bad=st.booleans())
def test_text_with_changed_bytes(tmp_path_factory, kind, data, skip_bad):
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    put(path, mutated(SOURCES[kind], data))
    try:
        assert all(text.encode() and text.strip() for text in iter_documents(str(path), skip_bad=skip_bad))
    except UserError as e:
        assert str(path) in str(e)


@fuzz(60)
@given(data=st.data())
def test_parquet_with_changed_bytes(tmp_path_factory, data):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    parquet.write_table(pa.table({"text": [f"words {i}" for i in range(20)]}), path)
    put(path, mutated(path.read_bytes(), data))
    try:
        assert all(text.strip() for text in iter_documents(str(path)))
    except UserError as e:
        assert str(path) in str(e)


# ---- records

@fuzz(150)
@given(data=st.data())
def test_records_with_changed_bytes(tmp_path_factory, data):
    """What is whole is read; a resume keeps that and nothing of the steps that it will do again; and it can be plotted."""
    from nanochat.training.plot import plot_run
    folder = tmp_path_factory.mktemp("records")
    path = folder / "metrics.jsonl"
    rows = [dict.fromkeys(ROW_COLUMNS) | {"step": i, "loss": 5.0 - i} for i in range(4)]
    whole = [json.dumps(row) for row in rows]
    put(path, mutated("".join(line + "\n" for line in whole).encode(), data))
    there = path.read_bytes().decode(errors="replace").split("\n")[:-1]
    read = read_metrics(path)
    assert all(set(ROW_COLUMNS) <= set(row) for row in read)
    assert all(row in read for row in rows if json.dumps(row) in there)
    MetricsFile(path, resume_step=2).close()
    kept = read_metrics(path)
    assert all(row["step"] < 2 for row in kept) and all(row in kept for row in rows[:2] if json.dumps(row) in there)
    if data.draw(st.integers(0, 30)) == 0:  # a second each
        assert isinstance(plot_run(folder), str)


# ---- command lines

GROUPS = [f.type for f in fields(Config) if f.name != "features"] + [feature.Config for feature in FEATURES]
FLAGS = sorted(option for action in build_parser(GROUPS)._actions for option in action.option_strings)
VALUES = st.one_of(st.integers(-2, 2**70).map(str), st.floats().map(str), st.text(max_size=5), st.sampled_from(
    ["", "-1", "latest", "cpu", "cuda", "inf", "1e400", "none", "(", "../x", "\0", "0", "SSSL", "float16", "skip", "auto"]))


@fuzz(400)
@given(argv=st.lists(st.one_of(st.sampled_from([f for f in FLAGS if f not in ("-h", "--help")]), VALUES,
                               st.tuples(st.sampled_from(FLAGS), VALUES).map("=".join)), max_size=6))
def test_any_command_line_is_a_run_or_advice(argv):
    try:
        config = parse_config(FEATURES, argv)
    except UserError as e:
        assert str(e)
    except SystemExit as e:
        assert e.code == 0 and any(a.startswith(("-h", "--help")) for a in argv)
    else:
        assert parse_config(FEATURES, argv).flat() == config.flat() or "nan" in argv
        assert config.changed_since(json.loads(json.dumps(config.flat()))) == []
