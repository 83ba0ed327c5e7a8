"""The split: both sides of any corpus, in the right proportion, nothing lost, nothing on both, and stable as it grows."""

import random
import time

import pytest
from hypothesis import example, given, settings, strategies as st

from nanochat.common import UserError
from nanochat.data import split as splitting
from nanochat.data.sources import Counts
from nanochat.data.split import section_end, split_documents, wanted

SECTION = 4000  # the longest
GAPS = {"paragraphs": [" ", " ", "\n", "\n\n"], "windows": [" ", "\r\n", "\r\n\r\n"], "lines": [" ", " ", "\n"],
        "one line": [" "], "no gaps": [""]}


def text_of(seed: int, length: int, kind: str) -> str:
    """So many characters that no other seed gives."""
    rng, gaps = random.Random(seed), GAPS[kind]
    parts = [chr(0x4E00 + seed)]
    while sum(map(len, parts)) < length:
        parts += [f"{rng.getrandbits(40):x}{rng.choice(gaps)}" for _ in range(length // 12 + 1)]
    return "".join(parts)[:length]


LENGTHS = st.one_of(st.integers(1, 30), st.integers(1, 1500), st.integers(400, 30_000))
DOCUMENTS = st.lists(st.tuples(LENGTHS, st.sampled_from(sorted(GAPS))), min_size=1, max_size=40)
UNITS = st.sampled_from(["a", "word ", "a line\n", "one\n\n"])
REPEATS = st.builds(lambda unit, times: unit * times, UNITS, st.integers(1, 9000))


def unlike(documents) -> list[str]:
    """Texts that have nothing in common."""
    return [text_of(1000 + i, length, kind) for i, (length, kind) in enumerate(documents)]


def sides(texts, counts=None):
    parts = list(split_documents(texts, counts))
    return parts, [t for side, t in parts if side == "train"], [t for side, t in parts if side == "val"]


@settings(max_examples=200)
@given(DOCUMENTS)
def test_any_lengths(documents):
    texts = unlike(documents)
    total = sum(map(len, texts))
    if total == 1:
        with pytest.raises(UserError, match="one character"):
            sides(texts)
        return
    counts = Counts()
    parts, train, val = sides(texts, counts)
    assert all(train) and all(val) and not counts.duplicates and not set(val) & set(train)
    size = sum(map(len, val))
    if total < 1500:
        assert total / 20 < size <= 0.6 * total + 1 and size + sum(map(len, train)) == total
        return
    assert wanted(total) / 2 <= size <= 2 * wanted(total) and (size >= 2000 or total < 16_000)
    assert "".join(text for _, text in parts) == "".join(texts)
    assert all(len(text) <= max(SECTION, total / 200) for text in val)


@settings(max_examples=100)
@example([text_of(1, 309, "lines"), text_of(0, 9, "lines"), "word " * 961, "word " * 1305, text_of(1, 309, "lines")])
@given(st.lists(st.one_of(REPEATS, st.integers(0, 5).map(lambda i: text_of(i, 300 * i + 9, "lines"))), min_size=1, max_size=30))
def test_copies_and_text_that_repeats_itself(texts):
    """Validation has its share all the same. No document of it is trained on, but for such as others consist of."""
    if len("".join(texts)) == 1 or set(map(len, texts)) == {1} and len(set(texts)) == 1:
        return
    counts = Counts()
    _, train, val = sides(texts, counts)
    assert train and val
    kept, copies = sum(map(len, train + val)), sum(map(len, texts)) - sum(map(len, set(texts)))
    if kept - copies >= 1500:
        assert wanted(kept - copies) / 2 <= sum(map(len, val)) <= 2 * wanted(kept)
        assert not {text for text in set(val) & set(train) if ord(text[0]) >= 0x4E00}
    lost = sum(map(len, set(texts))) - kept
    held = min(kept, 2000)  # at the start, a document that equals a section of an earlier one is left out too
    assert lost <= kept / 19 + held, "a document that is no copy is kept, but for a twentieth"


def test_what_validates_is_not_trained_on_in_a_second_copy():
    """Neither in a copy of a long document nor in a later version of one."""
    first = [text_of(i, 30_000, "paragraphs") for i in range(20)]
    counts = Counts()
    _, train, val = sides(first + first, counts)
    assert counts.duplicates == 20 and sum(map(len, train + val)) == 600_000
    versions = [text + text_of(100 + i, 5000, "lines") for i, text in enumerate(first)]
    _, train, val = sides(first + versions)
    late = [t for t in val if any(t in text for text in first[4:])]  # sections are of one size from 80 000 characters on
    assert len(late) > 5 and not [t for t in late if any(t in part for part in train)]


@pytest.mark.slow
@settings(max_examples=100)
@given(DOCUMENTS, DOCUMENTS)
def test_appended_documents_change_nothing(documents, more):
    texts = unlike(documents + more)
    if sum(map(len, texts[:len(documents)])) >= 1500:
        before, after = sides(texts[:len(documents)])[0], sides(texts)[0]
        assert after[:len(before)] == before


@settings(max_examples=200)
@given(DOCUMENTS, st.integers(1, 50_000), st.sampled_from(sorted(GAPS)))
def test_text_appended_to_the_last_document_changes_nothing_before_it(documents, length, kind):
    texts = unlike(documents)
    if sum(map(len, texts)) < 1500:
        return
    longer = [*texts[:-1], texts[-1] + text_of(7, length, kind)]
    before, after = ("".join(side[0] * len(text) for side, text in sides(t)[0]) for t in (texts, longer))
    last = len(texts[-1])
    was_cut = last > SECTION and last > len(before) / 200
    unchanged = len(before) - (SECTION if was_cut else last)
    assert after[:unchanged] == before[:unchanged]


def test_files_that_come_between_change_hardly_anything():
    texts = [text_of(i, 200 + 37 * i % 3000, "lines") for i in range(1000)]
    new = [text_of(5000 + i, 900, "lines") for i in range(20)]
    _, _, val = sides(texts)
    _, _, val_after = sides(texts[:300] + new + texts[300:])
    assert len(set(val) ^ (set(val_after) - set(new))) <= len(val) / 5


def test_the_cap(monkeypatch):
    monkeypatch.setattr(splitting, "VAL_CHARS", 20_000)
    texts = [text_of(i, 50 + 61 * i % 4000, "paragraphs") for i in range(600)]
    _, train, val = sides(texts)
    assert 16_000 <= sum(map(len, val)) <= 20_000
    _, more_train, more_val = sides(texts + texts)
    assert more_val == val and len(more_train) > 1.8 * len(train) and not set(more_val) & set(more_train)


def test_full_validation_leaves_documents_whole(monkeypatch):
    monkeypatch.setattr(splitting, "VAL_CHARS", 20_000)
    novels = [text_of(i, 300_000, "paragraphs") for i in range(4)]
    parts, _, _ = sides(novels)
    assert parts[-2:] == [("train", novels[2]), ("train", novels[3])]


# ---- corpora of all shapes

def test_a_readme_beside_a_novel():
    readme, novel = "# My corpus\n\nOne novel, plain text.\n", text_of(1, 400_000, "paragraphs")
    for texts in ([readme, novel], [novel, readme], [novel]):
        _, train, val = sides(texts)
        assert 15_000 < sum(map(len, val)) < 30_000 and readme not in val
        assert all(t in novel and t.endswith("\n\n") for t in val[:-1])
        assert len(train) < 30, "neighbouring sections are one document again"


@pytest.mark.parametrize("kind", sorted(GAPS))
def test_one_huge_document(kind):
    text = text_of(3, 2_000_000, kind)
    started = time.perf_counter()
    parts, train, val = sides([text])
    assert time.perf_counter() - started < 5
    assert "".join(t for _, t in parts) == text
    assert 0.045 < sum(map(len, val)) / len(text) < 0.055, "one section of twenty, not one in twenty on average"


def test_a_hundred_thousand_tiny_documents():
    started = time.perf_counter()
    _, train, val = sides(f"tiny file {i}\n" for i in range(100_000))
    assert time.perf_counter() - started < 10
    assert len(train) + len(val) == 100_000 and 0.04 < len(val) / 100_000 < 0.06


def test_nothing_is_held_for_long():
    """The hostile order: what comes is always longer than all that trains, then always the shortest."""
    read = 0
    for lengths in ([1, 2, 4, 8, 16, 32, 64, 128, 244, 500], [499, 500], [500], [51, 500]):
        def texts(lengths=lengths):
            nonlocal read
            for i, length in enumerate([*lengths, *[5] * 500]):
                read += length
                yield text_of(100 + i, length, "no gaps")
        read = 0
        next(split_documents(texts()))
        assert read <= 2200


def test_tiny_corpora_have_both_parts():
    assert sides(["only\n" * 100])[1:] == (["only\n" * 75], ["only\n" * 25])
    assert sides(["a" * 100])[1:] == (["a" * 75], ["a" * 25])
    assert sides(["ab"])[1:] == (["a"], ["b"])
    assert sides(["x" * 501])[1:] == (["x" * 376], ["x" * 125]), "not a section of one character"
    assert sides(["a readme", "a text that is longer\n"])[1:] == (["a readme", "a text that is lo"], ["nger\n"])
    for corpus in (["a"], ["a", "a"]):
        with pytest.raises(UserError, match="one character"):
            sides(corpus)
    assert sides([])[0] == []


# ---- sections

@given(st.text(st.sampled_from("ab \n\r\t\u3000"), max_size=300), st.integers(0, 299), st.integers(1, 100), st.text(max_size=9))
def test_a_section_ends_within_its_size_whatever_follows(text, start, size, more):
    if start >= len(text):
        return
    end = section_end(text, start, size)
    assert start < end <= min(start + size, len(text))
    if start + size < len(text):
        assert section_end(text + more, start, size) == end == section_end(text[:start + size] + "x", start, size)


def test_where_sections_end():
    assert section_end("one two\n\nthree\nfour five", 0, 14) == 9
    assert section_end("one two\r\n\r\nthree\nfour five", 0, 16) == 11
    assert section_end("one two, three\nfour five", 0, 17) == 15
    assert section_end("one two, three  four", 0, 18) == 14, "in front of white space, which belongs to the next word"
    assert section_end("o" * 30, 0, 18) == 18
