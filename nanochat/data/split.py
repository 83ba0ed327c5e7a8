"""Split text into training and validation: one rule for a few files and for a hundred million pages.

The documents are split in one pass, and each decision depends only on the text before it. So text that is appended, to the
corpus or to its last document, changes no earlier decision. T is the number of characters decided so far, V the number of
those in validation.

Units. A document of up to max(s, T/200) characters is one unit. A longer one is cut into sections of about s = T/20
characters, at least 500 and at most 4000, at the end of a paragraph, a line or a word. Neighbouring training sections are
joined again, so the validation sections are holes in the document.

Selection. A document is selected for validation if the hash of its text is divisible by 20. Of every 20 sections of a document
one is selected, by the hash of the first. So inserting files hardly changes the decisions about others.

Bounds. wanted(T) is T/20, at least 4000 (a quarter of T below 16 000) and at most VAL_CHARS. A selected unit goes to training
where V would exceed twice that, or VAL_CHARS. A unit that was not selected goes to validation where V would stay below half of
it, if it is not longer than all training text so far. The first unit goes to training. So from 1500 characters on

    wanted(T)/2 <= V <= 2 wanted(T), and V <= VAL_CHARS

that is 2000 to 8000 characters, from 80 000 on 2.5 to 10 %, from 160 million on at least 4 million. Once V is within 4000
characters of VAL_CHARS, everything goes to training.

Duplicates. A document that equals a validation unit, or a document that was cut, is dropped; one that equals a training unit
never goes to validation (T above does not count such copies). So the model never trains on a validation document. A section
that equals a validation section is dropped too, as long as such sections are at most a twentieth of T: a document that repeats
itself more often (a line a million times) is kept as it is from there on, on both sides.

Small corpora. Output starts when there are 1000 characters and V is at least wanted(T)/2, which takes at most 2000. If the text
ends before, and V is less, the last quarter of the longest document becomes the validation text instead.
"""

from collections.abc import Iterable, Iterator

from nanochat.common import UserError
from nanochat.data.sources import Counts, text_digest

VAL_EVERY = 20  # one unit in 20 is selected for validation
VAL_CHARS = 8_000_000  # characters of validation text at most
SHORT, LONG = 500, 4000  # bounds of the length of a section, in characters


def split_documents(texts: Iterable[str], counts: Counts | None = None) -> Iterator[tuple[str, str]]:
    """Yield ("train" | "val", text) for each document or part of one, by the rule at the top of this file.

    counts: `duplicates` counts what is dropped.
    Raises: UserError if the whole corpus is one character.
    """
    split = _Split(Counts() if counts is None else counts)
    held, documents = [], []  # parts that are held back at the start, and their documents
    for text in texts:
        digest = _hash(text)
        if split.is_copy(digest):
            continue
        if not split.holding:
            yield from split.parts(text, digest)
            continue
        documents.append(text)
        for part in split.parts(text, digest):
            held.append(part)
            if split.total >= 2 * SHORT and split.enough:
                split.holding = False
                yield from held
                held.clear()
    if not split.holding:
        return
    if split.enough:
        yield from held
    elif documents:
        longest = max(documents, key=len)
        for text in documents:
            yield "train", text[:_last_quarter(text)] if text is longest else text
        yield "val", longest[_last_quarter(longest):]


def separate_documents(train: Iterable[str], val: Iterable[str], counts: Counts) -> Iterator[tuple[str, str]]:
    """Like `split_documents`, for a separate validation source. Its documents come first; copies of them are not trained on."""
    val_digests = set()
    for text in val:
        val_digests.add(text_digest(text))
        yield "val", text
    for text in train:
        if text_digest(text) in val_digests:
            counts.duplicates += 1
        else:
            yield "train", text


def wanted(total: int) -> float:
    """Desired characters of validation text out of `total`."""
    return min(max(total / VAL_EVERY, min(LONG, total / 4)), VAL_CHARS)


class _Split:
    """The state of the split: what has been decided so far."""

    def __init__(self, counts: Counts):
        self.counts = counts
        self.total = self.val = self.dropped = 0  # characters: T, V, and those of dropped sections
        self.holding = True  # parts are held back until there is enough validation text
        self.in_val: set[int] = set()  # hashes of validation units
        self.in_train: set[int] = set()  # hashes of training units; empty once validation is full
        self.cut: set[int] = set()  # hashes of documents that were cut
        self.repeats = False  # the document being cut repeats itself too often to drop its copies

    def is_copy(self, digest: int) -> bool:
        """Whether to drop a document because it occurred before; counts it."""
        copy = digest in self.in_val or digest in self.cut or self.holding and digest in self.in_train
        self.counts.duplicates += copy
        return copy

    def parts(self, text: str, digest: int) -> Iterator[tuple[str, str]]:
        """Yield (side, text) for the parts of a document that is no copy."""
        if self.full or len(text) <= max(self.section(), self.total / 200):
            yield self._decide(text, digest, digest % VAL_EVERY == 0), text
            return
        self.cut.add(digest)
        self.repeats = False
        begin = start = index = 0  # start of the pending training text, start and number of the section
        while start < len(text):
            end = section_end(text, start, self.section())
            section = text[start:end]
            digest = _hash(section)
            if index % VAL_EVERY == 0:
                chosen = digest % VAL_EVERY
            side = self._decide(section, digest, index % VAL_EVERY == chosen, is_section=True)
            if side != "train":
                if begin < start:
                    yield "train", text[begin:start]
                if side == "val":
                    yield "val", section
                begin = end
            index, start = index + 1, end
        if begin < start:
            yield "train", text[begin:]

    def section(self) -> int:
        """Length of the next section in characters."""
        return min(max(self.total // VAL_EVERY, SHORT), LONG)

    @property
    def enough(self) -> bool:
        """Whether validation has at least half of the desired text."""
        return self.val >= wanted(self.total) / 2

    @property
    def full(self) -> bool:
        """Whether validation takes no more text."""
        return self.val + LONG > VAL_CHARS

    def _decide(self, unit: str, digest: int, chosen: bool, is_section: bool = False) -> str:
        """Decide about a unit: "train", "val" or, for a section, "dropped"."""
        size, train = len(unit), self.total - self.val
        if digest in self.in_val and not self.holding and not self.repeats:
            if self.dropped + size <= self.total / VAL_EVERY:
                self.dropped += size
                self.counts.duplicates += 1
                return "dropped"
            self.repeats = True
        self.total += size
        if self.full:
            self.in_train.clear()
            return "train"
        known, goal = digest in self.in_val or digest in self.in_train, wanted(self.total)
        short = self.val < goal / 2 and size <= train and (is_section or not known)
        fits = chosen and train and not known and self.val + size <= min(2 * goal, VAL_CHARS)
        if short or fits:
            self.val += size
            self.in_val.add(digest)
            return "val"
        self.in_train.add(digest)
        return "train"


def section_end(text: str, start: int, size: int) -> int:
    """End of a section of at most `size` characters: after a paragraph, else after a line, else before white space, if there is
    one in its second half. Text after `start + size` has no influence."""
    end, middle = start + size, start + size // 2
    if end >= len(text):
        return len(text)
    for mark in ("\n\n", "\n\r\n", "\n"):
        if (found := text.rfind(mark, middle, end)) >= 0:
            return found + len(mark)
    words = text[middle:end].rsplit(None, 1)
    return middle + len(words[0]) if len(words) == 2 else end


def _hash(text: str) -> int:
    return int.from_bytes(text_digest(text), "little")


def _last_quarter(text: str) -> int:
    """Start of about the last quarter of a text: the start of a line if one is near."""
    quarter = max(1, len(text) // 4)
    cut = len(text) - quarter
    if cut == 0:
        raise UserError("the whole corpus is one character: give more text.")
    return text.rfind("\n", cut - quarter // 2, cut) + 1 or cut
