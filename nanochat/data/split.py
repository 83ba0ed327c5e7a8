"""Which text trains and which validates: a rule that holds for a README beside a novel and for a hundred million pages.

The rule is one pass over the documents, and each decision depends on nothing but the text before it. So text that is
appended, to the corpus or to its last document, changes no earlier decision. T is the characters decided so far, V those
of them that validate.

Units. A document of up to max(s, T/200) characters is decided as a whole; a longer one is cut into sections of about
s = T/20 characters, at least 500 and at most 4000, at a paragraph, a line or a word. Neighbouring sections that train are
one document again, so that the validation sections are holes in it.

Choice. A document validates if the hash of its text is divisible by 20; of every 20 sections of a document one does, which of
them is decided by the hash of the first. So files that come between others hardly change what happens to those.

Bounds. wanted(T) is T/20, at least 4000 (a quarter of T below 16 000) and at most VAL_CHARS. A chosen unit trains all the
same where V would exceed twice that, or VAL_CHARS; one that was not chosen validates where V would stay below half of it, if
it is not longer than all that trains so far. What comes first trains. So from 1500 characters on

    wanted(T)/2 <= V <= 2 wanted(T), and V <= VAL_CHARS

that is 2000 to 8000 characters, from 80 000 on 2.5 to 10 %, from 160 million on at least 4 million. Once fewer than 4000
characters are missing to VAL_CHARS, all that comes trains.

Copies. A document that equals a unit in validation, or a document that was cut, is dropped; one that equals a unit that
trains never validates (T leaves such copies out above). So no validation document is trained on. A section that equals one in
validation is dropped, too, as long as such sections are at most a twentieth of T: a document that repeats itself more often
(a line a million times) is kept as it is from there on, on both sides.

Small corpora. Nothing is given out before there are 1000 characters and V is at least wanted(T)/2, which takes 2000 at most. If
the text ends before and V is less, the last quarter of the longest document validates instead.
"""

from collections.abc import Iterable, Iterator

from nanochat.common import UserError
from nanochat.data.sources import Counts, text_digest

VAL_EVERY = 20  # one unit in so many goes to validation ...
VAL_CHARS = 8_000_000  # ... until validation holds this many characters
SHORT, LONG = 500, 4000  # characters of a section


def split_documents(texts: Iterable[str], counts: Counts | None = None) -> Iterator[tuple[str, str]]:
    """("train" | "val", text) for each document or part of one, by the rule in the module's docstring; a stream, so at any
    scale. `counts.duplicates` counts what is dropped. UserError where the whole text is one character."""
    split = _Split(Counts() if counts is None else counts)
    held, documents = [], []  # parts not given out yet, and the documents that they are of
    for text in texts:
        digest = _number(text)
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
    if split.enough:
        yield from held
    elif documents:
        longest = max(documents, key=len)
        for text in documents:
            yield "train", text[:_last_quarter(text)] if text is longest else text
        yield "val", longest[_last_quarter(longest):]


def separate_documents(train: Iterable[str], val: Iterable[str], counts: Counts) -> Iterator[tuple[str, str]]:
    """Like `split_documents` for an explicit validation source, whose documents come first."""
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
    """Characters of validation that so much text should have."""
    return min(max(total / VAL_EVERY, min(LONG, total / 4)), VAL_CHARS)


class _Split:
    """What has been decided so far."""

    def __init__(self, counts: Counts):
        self.counts = counts
        self.total = self.val = self.dropped = 0  # characters; `dropped`: of sections
        self.holding = True  # until there is enough validation to begin with
        self.in_val: set[int] = set()  # digests of units
        self.in_train: set[int] = set()  # of those that train while validation can grow
        self.cut: set[int] = set()  # of documents that were cut
        self.repeats = False  # whether the document that is being cut repeats itself too much to drop its copies

    def is_copy(self, digest: int) -> bool:
        """Whether a document must neither train nor validate, as it was there before. It is counted."""
        copy = digest in self.in_val or digest in self.cut or self.holding and digest in self.in_train
        self.counts.duplicates += copy
        return copy

    def parts(self, text: str, digest: int) -> Iterator[tuple[str, str]]:
        """The sides of a document's parts; it is no copy."""
        if self.full or len(text) <= max(self.section(), self.total / 200):
            yield self._decide(text, digest, digest % VAL_EVERY == 0), text
            return
        self.cut.add(digest)
        self.repeats = False
        begin = start = index = 0  # of what trains and is not given out yet; of the section; which one it is
        while start < len(text):
            end = section_end(text, start, self.section())
            section = text[start:end]
            digest = _number(section)
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
        """Characters of a section that begins here."""
        return min(max(self.total // VAL_EVERY, SHORT), LONG)

    @property
    def enough(self) -> bool:
        return self.val >= wanted(self.total) / 2

    @property
    def full(self) -> bool:
        return self.val + LONG > VAL_CHARS

    def _decide(self, unit: str, digest: int, chosen: bool, is_section: bool = False) -> str:
        """"train", "val" or, for a section, "dropped"."""
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
    """Where a section of at most `size` characters ends: behind a paragraph, else a line, else in front of white space,
    if there is one in its second half. Text behind `start + size` does not change that."""
    end, middle = start + size, start + size // 2
    if end >= len(text):
        return len(text)
    for mark in ("\n\n", "\n\r\n", "\n"):
        if (found := text.rfind(mark, middle, end)) >= 0:
            return found + len(mark)
    words = text[middle:end].rsplit(None, 1)
    return middle + len(words[0]) if len(words) == 2 else end


def _number(text: str) -> int:
    return int.from_bytes(text_digest(text), "little")


def _last_quarter(text: str) -> int:
    """Where about the last quarter of a text begins: at a line's start if one is near."""
    quarter = max(1, len(text) // 4)
    cut = len(text) - quarter
    if cut == 0:
        raise UserError("the whole corpus is one character: give more text.")
    return text.rfind("\n", cut - quarter // 2, cut) + 1 or cut
