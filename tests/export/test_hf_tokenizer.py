"""The exported tokenizer.json encodes and decodes as our tokenizer does, whatever the text."""

import json
import random

import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from nanochat.export.hf_tokenizer import tokenizer_json
from nanochat.tokenizer import MAX_RUN, Tokenizer

ODD = ["'s", "'S", "'\u017f", "'LL", "don't", "ß", "\u212a", "\ufb01", "²", "Ⅷ", "٣", "12345", "  ", "\t", "\r\n", "\n\n",
       "\u00a0", "\u2003", "\u200b", "\x85", "\x1c", "\x0b", "\ufeff", "\x00", "e\u0301", "漢字", "👩\u200d👧", "\U000e0001",
       "<|bos|>", "<|", "|>", "_", "def ", "é", "aaaa"]


@pytest.fixture(scope="module")
def exported(tokenizer):
    exported = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    exported.encode_special_tokens = True  # names of special tokens are text, as `split_special_tokens` does in transformers
    return exported


def ids(exported, text):
    return exported.encode(text, add_special_tokens=False).ids


@settings(max_examples=100)
@given(text=st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(ODD), st.text("ab \n", max_size=9))).map("".join)))
def test_any_text(tokenizer, exported, text):
    assert ids(exported, text) == tokenizer(text)
    assert exported.decode(tokenizer(text), skip_special_tokens=False) == tokenizer.decode(tokenizer(text))


def test_characters_of_all_of_unicode(tokenizer, exported):
    characters = [chr(c) for c in range(0, 0x110000, 211) if not 0xD800 <= c <= 0xDFFF]
    texts = [f"a{c}{c} {c}'{c}\n{c}1" for c in characters]
    assert [e.ids for e in exported.encode_batch(texts, add_special_tokens=False)] == tokenizer(texts)


@pytest.mark.parametrize("unit", ["x", " ", "\n", "漢", "ab-", "\t "])
def test_long_runs_are_cut_alike(tokenizer, exported, unit):
    for length in (MAX_RUN, MAX_RUN + 1, 2 * MAX_RUN + 1):
        text = f"hello  {(unit * length)[:length]} end"
        assert ids(exported, text) == tokenizer(text)


def test_merges_of_repetitive_text():
    """Tokens that can be cut in two in many ways: their order decides."""
    rng = random.Random(0)
    ours = Tokenizer.train_from_iterator([" ".join("".join(rng.choices("ab", k=30)) for _ in range(300))], 400)
    exported = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(ours)))
    for _ in range(300):
        text = "".join(rng.choice("ab") * rng.choice([1, 1, 2, 5]) for _ in range(rng.randint(1, 40)))
        assert ids(exported, text) == ours(text)


def test_any_tokens_decode_alike(tokenizer, exported):
    rng = random.Random(0)
    for _ in range(300):
        some = rng.choices(range(tokenizer.get_vocab_size()), k=rng.randint(0, 9))
        assert exported.decode(some, skip_special_tokens=False) == tokenizer.decode(some)


def test_special_tokens_have_their_ids(tokenizer, exported):
    assert {name: exported.token_to_id(name) for name in tokenizer.get_special_tokens()} == tokenizer.special_tokens
    assert exported.get_vocab_size() == tokenizer.get_vocab_size()
    assert exported.encode("x").ids == tokenizer("x", prepend="<|bos|>")
