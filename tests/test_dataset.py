"""Text and tokens on disk: sources, what a tokenizer learns from, nothing half-written taken, bad input named and harmless."""

import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.common import ROOT, UserError, get_base_dir
from nanochat.data.sources import Counts, hub_address, iter_documents, python_files
from nanochat.dataset import TokenDataset, learning_sample, prepare_tokens, split_documents, train_tokenizer
from nanochat.tokenizer import Tokenizer


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return get_base_dir()


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train_from_iterator([story(i) for i in range(50)], vocab_size=400)


def story(i: int) -> str:
    return f"Story {i}. " + f"The {i * 7919 % 1000} bears went to town {i % 13} and back.\n" * (1 + i % 40)


def write_jsonl(path: Path, rows: list) -> Path:
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def texts_of(dataset: TokenDataset, tok: Tokenizer, split: str) -> list[str]:
    part = dataset.split(split)
    docs = [part.doc(i) for i in range(part.num_docs)]
    assert all(doc[0] == dataset.bos for doc in docs)
    return [tok.decode(doc[1:].tolist()) for doc in docs]


# ---- sources (files: test_files.py; the hub: test_hub.py)

def test_files_of_all_types_in_a_folder_are_read_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.txt").write_text("text")
    (tmp_path / "a.md").write_text("markdown")
    (tmp_path / "c.py").write_text("print('python')")
    write_jsonl(tmp_path / "d.jsonl", [{"text": "row 1"}, {"text": "   "}, {"text": None}, {"text": "row 2", "id": 3}])
    write_jsonl(tmp_path / "e.jsonl.gz", [{"text": "packed"}])
    counts = Counts()
    assert list(iter_documents(str(tmp_path), counts=counts)) == [
        "markdown", "text", "print('python')", "row 1", "row 2", "packed"]
    assert (counts.files, counts.documents, counts.empty) == (5, 6, 2)


@pytest.mark.slow
def test_python_source_is_this_interpreters_own_text():
    files = python_files()
    assert len(files) > 500 and not any("__pycache__" in p.parts for p in files)
    assert Path(json.__file__).resolve() in files  # the standard library
    assert any("hypothesis" in p.parts for p in files)  # an installed package
    assert not any(p.is_relative_to(ROOT / part) for part in ("nanochat", "tests") for p in files)  # not what is being written
    site = Path(torch.__file__).resolve().parents[1]  # torch next, then the rest: the same text, whatever else is installed
    groups = [0 if not p.is_relative_to(site) else 1 if p.is_relative_to(site / "torch") else 2 for p in files]
    assert groups == sorted(groups) and set(groups) == {0, 1, 2}
    counts = Counts()
    first = list(iter_documents("python", max_chars=3_000_000, counts=counts))
    assert first == list(iter_documents("python", max_chars=3_000_000))
    assert sum(map(len, first)) == 3_000_000 and len(set(first)) == len(first) and counts.duplicates


def test_max_chars_is_exact(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "abcdef"}] * 3)
    assert list(iter_documents(str(path), max_chars=8)) == ["abcdef", "ab"]


def test_nuls_and_broken_surrogates_are_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    (tmp_path / "b.jsonl").write_text('{"text": "\\ud800x"}\n')
    assert list(iter_documents(str(tmp_path))) == ["a\0b", "\ufffdx"]


def test_hub_addresses():
    assert hub_address("hf:tinystories") == ("roneneldan/TinyStories", None, "train", "text")
    assert hub_address("hf:tinystories::validation") == ("roneneldan/TinyStories", None, "validation", "text")
    assert hub_address("hf:me/mine:small:test:body") == ("me/mine", "small", "test", "body")
    assert hub_address("hf:me/mine", "content") == ("me/mine", None, "train", "content")
    for source in ("hf:", "hf:a:b:c:d:e"):
        with pytest.raises(UserError, match="hf:NAME"):
            hub_address(source)


def test_hub_without_the_library():
    code = ("import sys; sys.modules['datasets'] = None\n"  # what Python does where an import must fail
            "from nanochat.cli.program import cli\nfrom nanochat.data.sources import iter_documents\n"
            "cli(lambda: next(iter_documents('hf:climbmix')) and 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install datasets" in done.stderr and "Traceback" not in done.stderr


# ---- tokens on disk

def shares(texts):
    labelled = list(split_documents(texts))
    return [[t for name, t in labelled if name == split] for split in ("train", "val")]


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "stories.jsonl", [{"text": story(i)} for i in range(300)])


def test_tokens_are_the_text(base, tok, corpus):
    folder = prepare_tokens(str(corpus), tok)
    dataset = TokenDataset.open(folder)
    dataset.verify()
    train, val = texts_of(dataset, tok, "train"), texts_of(dataset, tok, "val")
    assert [train, val] == shares([story(i) for i in range(300)])
    assert sum(map(len, train + val)) == sum(len(story(i)) for i in range(300))
    manifest = dataset.manifest
    assert folder.parent == base / "tokens" and folder.name.startswith("stories-")
    assert manifest["dtype"] == "uint16" and dataset.tokenizer_fingerprint == tok.fingerprint()
    assert dataset.vocab_size == tok.get_vocab_size() and dataset.bos == tok.get_bos_token_id()
    assert manifest["splits"]["train"]["text_bytes"] == sum(len(t.encode()) for t in train)
    part = dataset.split("train")
    assert part.num_tokens == sum(part.doc_lengths) == manifest["splits"]["train"]["tokens"]
    assert part.tokens(3, 1, 2).tolist() == part.doc(3)[1:3].tolist()


def test_several_shards_read_like_one(base, tok, corpus, monkeypatch):
    in_one = texts_of(TokenDataset.open(prepare_tokens(str(corpus), tok)), tok, "train")
    monkeypatch.setattr("nanochat.dataset.SHARD_TOKENS", 3000)
    monkeypatch.setattr("nanochat.dataset.ENCODE_CHARS", 1000)
    shards = TokenDataset.open(prepare_tokens(str(corpus), tok, force=True))
    assert len(shards.manifest["splits"]["train"]["shards"]) > 5
    assert texts_of(shards, tok, "train") == in_one


def test_large_vocabularies_take_four_bytes(base, corpus, tok):
    large = Tokenizer(tok.pattern, tok.ranks, {"<|bos|>": 70_000})
    dataset = TokenDataset.open(prepare_tokens(str(corpus), large))
    assert dataset.split("val").doc(0).dtype == np.uint32 and dataset.split("val").doc(0)[0] == 70_000


def test_prepared_once_per_content_tokenizer_and_arguments(base, tok, corpus):
    folder = prepare_tokens(str(corpus), tok)
    changed = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare_tokens(str(corpus), tok) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == changed
    assert prepare_tokens(str(corpus), tok, max_chars=9000) != folder
    assert prepare_tokens(str(corpus), Tokenizer.train_from_iterator([story(1)], 300)) != folder
    assert prepare_tokens(str(corpus), tok, force=True) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns != changed
    write_jsonl(corpus, [{"text": story(i)} for i in range(301)])
    assert prepare_tokens(str(corpus), tok) != folder
    assert not [p for p in (base / "tokens").iterdir() if ".tmp" in p.name or ".old" in p.name]


def test_explicit_validation_text(base, tok, corpus, tmp_path):
    val = write_jsonl(tmp_path / "val.jsonl", [{"text": story(i)} for i in (5, 6, 1000)])
    dataset = TokenDataset.open(prepare_tokens(str(corpus), tok, val_source=str(val)))
    assert texts_of(dataset, tok, "val") == [story(5), story(6), story(1000)]
    assert texts_of(dataset, tok, "train") == [story(i) for i in range(300) if i not in (5, 6)]
    assert dataset.manifest["counts"]["duplicates"] == 2
    with pytest.raises(UserError, match="no document is left for train"):
        prepare_tokens(str(corpus), tok, val_source=str(corpus))


def test_one_large_document(base, tok, tmp_path):
    text = "".join(f"Line {i}: the bears went to town and back again.\n" + "\n" * (i % 9 == 0) for i in range(100_000))  # 5 MB
    (tmp_path / "large.txt").write_text(text)
    dataset = TokenDataset.open(prepare_tokens(str(tmp_path / "large.txt"), tok))
    train, val = texts_of(dataset, tok, "train"), texts_of(dataset, tok, "val")
    assert sum(map(len, train + val)) == len(text) and all(part in text and part.endswith("\n\n") for part in val)
    assert 0.04 < sum(map(len, val)) / len(text) < 0.06
    assert "1 documents in 1 files" in dataset.summary() and not dataset.left_out()


def test_what_was_left_out_is_said(base, tok, corpus, tmp_path):
    (tmp_path / "x.png").write_text("a")
    corpus.write_text(corpus.read_text() * 2 + '{"text": " "}\n{oops\n')
    dataset = TokenDataset.open(prepare_tokens(str(tmp_path / "[sx]*"), tok, skip_bad=True))
    assert re.fullmatch("left out: 1 empty, 1 unreadable \\(.*stories.jsonl, line 602 is not valid JSON: .*\\), "
                        "\\d+ duplicates, 1 .png \\(.*x.png\\)", dataset.left_out())
    assert dataset.left_out() in dataset.summary().splitlines()


@pytest.mark.parametrize("file", ["train_000000.bin", "val_000000.lengths.npy", "manifest.json"])
def test_truncated_and_missing_files_are_named(base, tok, corpus, file):
    folder = prepare_tokens(str(corpus), tok)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[:-2])
    with pytest.raises(UserError, match=f"{file}.*--force"):
        TokenDataset.open(folder)
    with pytest.raises(UserError, match=file):
        prepare_tokens(str(corpus), tok)
    (folder / file).unlink()
    with pytest.raises(UserError, match=file):
        TokenDataset.open(folder)
    TokenDataset.open(prepare_tokens(str(corpus), tok, force=True)).verify()


def test_changed_bytes_fail_verification(base, tok, corpus):
    folder = prepare_tokens(str(corpus), tok)
    path = folder / "val_000000.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="val_000000.bin has changed"):
        TokenDataset.open(folder).verify()


def test_failure_leaves_nothing(base, tok, tmp_path):
    rows = "".join(json.dumps({"text": story(i)}) + "\n" for i in range(300))
    (tmp_path / "x.jsonl").write_text(rows + "{oops\n")
    with pytest.raises(UserError, match="line 301"):
        prepare_tokens(str(tmp_path / "x.jsonl"), tok)
    assert list((base / "tokens").iterdir()) == []


# ---- the tokenizer's text

def words(number: int, first: int = 0) -> str:
    """Text in which no word occurs twice."""
    numbers = range(first, first + number)
    return "".join(f"{hashlib.md5(str(i).encode()).hexdigest()[:8]}{' ' if i % 10 else chr(10)}" for i in numbers)


def test_tokenizer_learns_from_training_text_only(base, tmp_path):
    texts = [story(i) + f" Word{i}" * 9 for i in range(200)]
    train, _ = shares(texts)
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": t} for t in texts])
    expected = Tokenizer.train_from_iterator(train, 350).fingerprint()
    assert train_tokenizer(str(path), 350).fingerprint() == expected
    assert Tokenizer.train_from_iterator(texts, 350).fingerprint() != expected


def test_one_long_document_is_learned_from_whole(tmp_path, capsys):
    (tmp_path / "x.txt").write_text(words(40_000))
    assert Tokenizer.train_from_iterator([words(40_000)[:10_000]], 2500).get_vocab_size() < 2500
    sizes = [train_tokenizer(str(tmp_path / "x.txt"), 2500, doc_cap=cap).get_vocab_size() for cap in (1, 700, 10_000, 10**9)]
    assert sizes == [2500] * 4
    train_tokenizer(str(tmp_path / "x.txt"), 10**6)
    assert "the text has pairs for a vocabulary of" in capsys.readouterr().out


@pytest.mark.parametrize("cap", [1, 50, 999, 1000, 1001, 20_000, 10**9])
def test_the_sample_is_taken_from_all_over(cap, monkeypatch):
    texts = [words(9000), words(5, 10**6), words(3000, 2 * 10**6)]
    everything = list(learning_sample(texts, cap))
    assert sorted("".join(everything)) == sorted("".join(texts))  # there is little: all of it, each character once
    assert list(learning_sample(texts, cap)) == everything
    monkeypatch.setattr("nanochat.dataset.LEARNED_CHARS", 1)
    few = list(learning_sample(texts, cap))
    assert abs(sum(map(len, few)) - sum(min(cap, len(text)) for text in texts)) <= 3 * max(100, cap / 10)  # a piece each
    where = [texts[0].index(piece) / len(texts[0]) for piece in few if len(piece) > 8 and piece in texts[0]]
    if 900 < cap < len(texts[2]):
        assert all(any(low <= at < low + 0.2 for at in where) for low in (i / 5 for i in range(5)))


@pytest.mark.parametrize("enough", [20_000, 60_000, 200_000])
def test_the_reserve_is_bounded_and_thinned_evenly(enough, monkeypatch):
    monkeypatch.setattr("nanochat.dataset.LEARNED_CHARS", enough)
    texts = [words(9000, i * 10**6) for i in range(20)]  # 81 000 characters each
    taken = list(learning_sample(iter(texts), 500))
    assert 0.5 * enough < sum(map(len, taken)) < 1.1 * enough + 1000
    of = [sum(len(piece) for piece in taken if piece in text) for text in texts]
    assert min(of) >= 500 and max(of) < 3 * min(of) + 2000


def test_words_are_not_cut(monkeypatch):
    text = words(20_000)
    known = set(text.split())
    pieces = list(learning_sample([text], 10_000))
    assert len(pieces) > 50
    assert all(word in known for piece in pieces for word in piece.split())


@pytest.mark.parametrize("options, flags", [
    (dict(doc_cap=2000), {"--doc-cap"}), (dict(max_chars=20_000), {"--max-chars"}),
    (dict(max_chars=20_000, doc_cap=2000), {"--doc-cap", "--max-chars"}), ({}, set())])
def test_why_a_vocabulary_is_small(tmp_path, monkeypatch, capsys, options, flags):
    if "doc_cap" in options:
        monkeypatch.setattr("nanochat.dataset.LEARNED_CHARS", 3000)
    (tmp_path / "x.txt").write_text(words(4000))
    train_tokenizer(str(tmp_path / "x.txt"), 1_000_000, **options)
    printed = capsys.readouterr().out
    assert "not 1000000" in printed and set(re.findall("--[a-z-]+", printed)) == flags


# ---- command line

def run(base, *argv, **kwargs):
    return subprocess.run([sys.executable, "-m", "nanochat.dataset", *map(str, argv)], capture_output=True, text=True,
                          timeout=120, env=os.environ | {"NANOCHAT_BASE_DIR": str(base)}, **kwargs)


def snapshot(folder: Path) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_command_line(base, tok, corpus):
    tok.save(base / "tokenizer")
    done = run(base, "--data", corpus, "--verify")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout and "val" in done.stdout and "bytes/token" in done.stdout and str(base) in done.stdout


@pytest.mark.slow
def test_command_line_bad_input(base, tok, corpus, tmp_path):
    done = run(base, "--data", corpus)
    assert done.returncode == 2 and "tok_train" in done.stderr and "Traceback" not in done.stderr
    tok.save(base / "tokenizer")
    folder = prepare_tokens(str(corpus), tok)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    before = snapshot(base)
    for argv, message in [
        (["--data", tmp_path / "nowhere"], "no such file or folder"),
        (["--data", tmp_path / "empty.txt"], "no text in"),
        (["--data", tmp_path / "latin.txt"], "latin.txt: byte 2 is not UTF-8"),
        (["--data", corpus, "--text-column", "body"], "no column 'body'; it has 'text'"),
        (["--data", corpus, "--val-data", tmp_path / "empty.txt"], "no text in"),
        (["--max-chars", "0"], "--max-chars must be"),
        (["--dat", "python"], "did you mean --data"),
    ]:
        done = run(base, *argv)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, (argv, done.stderr)
    assert snapshot(base) == before
    shard = folder / "train_000000.bin"
    shard.write_bytes(shard.read_bytes()[:-10])
    done = run(base, "--data", corpus)
    assert done.returncode == 2 and "train_000000.bin" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_killed_preparation_is_not_taken(base, tok, tmp_path):
    tok.save(base / "tokenizer")
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": story(i)} for i in range(40_000)])
    process = subprocess.Popen([sys.executable, "-m", "nanochat.dataset", "--data", str(path)],
                               stderr=subprocess.DEVNULL, env=os.environ | {"NANOCHAT_BASE_DIR": str(base)})
    while process.poll() is None and not list(base.glob("tokens/*/train_000000.bin")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = list((base / "tokens").iterdir())
    assert left and all(".tmp-" in p.name for p in left), "killed too late to test anything"
    folder = prepare_tokens(str(path), tok)
    assert folder not in left
    TokenDataset.open(folder).verify()
