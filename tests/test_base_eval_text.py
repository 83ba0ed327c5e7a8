"""`base_eval --text`: bits per byte of any text, every byte of it once, whatever the batch."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from nanochat.checkpoint_manager import build_model
from nanochat.cli.flags import parse
from nanochat.common import UserError
from nanochat.recipe.shape import GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts.base_eval import EvalFlags, evaluate_texts, main, run_evaluations, tables, text_batches, text_rows

DOCUMENTS = ["one", "a longer document, of several rows: grüße 漢字", "b " * 40]
ONE_RANK = SimpleNamespace(rank=0, world_size=1)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_iterator(DOCUMENTS * 3, 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    shape = GPTConfig(sequence_len=12, vocab_size=tokenizer.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = build_model(shape, torch.float32, "cpu").eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=random))
    return model


def state(rows):
    return {"tokens": "", "user_config": {"device_batch_size": rows, "data": ""}, "numerics_environment": {}}


@torch.no_grad()
def expected_bpb(model, tokenizer, documents):
    """One row at a time, one token at a time."""
    nats = 0.0
    for text in documents:
        ids = tokenizer(text)
        for start in range(0, len(ids), 12):
            row = [tokenizer.get_bos_token_id(), *ids[start:start + 12]]
            predicted = model(torch.tensor([row[:-1]]))[0].log_softmax(-1)
            nats -= sum(predicted[i, token].item() for i, token in enumerate(row[1:]))
    return nats / math.log(2) / sum(len(text.encode()) for text in documents)


def test_text_of_any_source_in_batches_of_any_size(model, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in DOCUMENTS))
    (tmp_path / "ü one.txt").write_text(DOCUMENTS[1], encoding="utf-8")
    flags, = parse([EvalFlags], ["--text", str(tmp_path / "rows.jsonl"), str(tmp_path / "ü one.txt"), "--text-column=body"])[:1]
    for rows in (1, 3, 64):
        both, one = evaluate_texts(flags, model, tokenizer, state(rows), ONE_RANK)
        assert both["bpb"] == pytest.approx(expected_bpb(model, tokenizer, DOCUMENTS), rel=1e-5)
        assert one["bpb"] == pytest.approx(expected_bpb(model, tokenizer, DOCUMENTS[1:2]), rel=1e-5)
        assert (both["documents"], one["documents"]) == (3, 1) and one["bytes"] == len(DOCUMENTS[1].encode())
    shown = tables({"text": {"sources": [both, one]}})
    assert "bits per byte" in shown.splitlines()[0] and "ü one.txt" in shown.splitlines()[2]


def test_every_token_is_a_target_once(tokenizer):
    counts = dict(documents=0, bytes=0, tokens=0)
    batches = list(text_batches(text_rows(DOCUMENTS, tokenizer, 5, counts), 4, "cpu"))
    targets = sorted(token for _, y in batches for token in y[y >= 0].tolist())
    assert targets == sorted(token for text in DOCUMENTS for token in tokenizer(text)) and counts["tokens"] == len(targets)
    assert all((x[:, 0] == tokenizer.get_bos_token_id()).all() and x.min() >= 0 for x, _ in batches)


def test_text_alone_evaluates_nothing_else(model, tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    flags = parse([EvalFlags], ["--text", str(tmp_path)])[0]
    assert set(run_evaluations(flags, model, tokenizer, state(2), ONE_RANK)) == {"text"}
    assert parse([EvalFlags], [])[0].kinds == ["core", "bpb", "sample"]


def test_an_imported_model_asks_for_a_text(model, tokenizer):
    with pytest.raises(UserError, match="--data or --text"):
        run_evaluations(parse([EvalFlags], ["--eval=bpb"])[0], model, tokenizer, state(2), ONE_RANK)


def test_a_local_folder_of_the_core_metric(model, tokenizer, tmp_path):
    flags = parse([EvalFlags], ["--eval=core", f"--core-bundle={tmp_path}"])[0]
    with pytest.raises(UserError, match="has no core.yaml.*should hold"):
        run_evaluations(flags, model, tokenizer, state(2), ONE_RANK)


@pytest.mark.parametrize("argv, words", [
    (["--text", "{tmp}/nothing.txt"], "nothing.txt.*--text takes"),
    (["--text", ""], "--text must name"),
    (["--text", "{tmp}", "--max-chars=0"], "--max-chars"),
    (["--core-bundle={tmp}", "--eval=bpb"], "--core-bundle would do nothing"),
])
def test_wrong_texts_are_answered_before_the_model_is_loaded(tmp_path, argv, words):
    with pytest.raises(UserError, match=words):
        main([word.format(tmp=tmp_path) for word in argv])


def test_an_empty_text_is_named(model, tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    flags = parse([EvalFlags], ["--text", str(tmp_path / "empty.txt")])[0]
    with pytest.raises(UserError, match="no text in .*empty.txt"):
        evaluate_texts(flags, model, tokenizer, state(2), ONE_RANK)
