"""Where text comes from: a source is a stream of documents, always in the same order.

    python              the .py files of this interpreter's standard library and installed packages: real text on
                        every machine, without a network
    PATH, GLOB, FOLDER  files of text (a file is a document) or of rows (a row is one), also compressed or in archives:
                        nanochat/data/files.py
    hf:NAME[:CONFIG][:SPLIT][:COLUMN]   a dataset of the Hugging Face hub, streamed; hf:climbmix, hf:fineweb-edu and
                        hf:tinystories are short for well-known ones: nanochat/data/hub.py

Nothing is left out in silence: what cannot be read is an error that names the place, or, on request, is counted; files of
other kinds are counted.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.cli.flags import flag
from nanochat.common import UserError
from nanochat.data.files import find_files, is_plain_text, read_files
from nanochat.data.hub import HUB_CHARS, hub_address, read_hub
from nanochat.data.reading import Counts, Reading, describe_left_out


@dataclass
class SourceFlags:
    """The text"""
    data: str = flag("python", "python (this interpreter's own sources), a path, glob or folder, or "
                               "hf:NAME[:CONFIG][:SPLIT][:COLUMN]", metavar="SOURCE")
    text_column: str = flag("text", "column (key, field) that holds the text, in files of rows", metavar="NAME")
    max_chars: int = flag(-1, "read at most this many characters; -1 is all (1e9 of hf:)")
    skip_bad: bool = flag(False, "leave out, and count, every bad row or file instead of stopping at it")

    def validate(self) -> list[str]:
        problems = [] if self.max_chars == -1 or self.max_chars > 0 else ["--max-chars must be positive, or -1 for all"]
        return problems if self.data.strip() else [*problems, "--data must name a source of text"]

    def reading(self) -> dict:
        """The keyword arguments that readers of text share."""
        return dict(text_column=self.text_column, max_chars=self.max_chars, skip_bad=self.skip_bad)


@dataclass
class TokenizerFlags(SourceFlags):
    """The text, and the vocabulary to learn from it"""
    vocab_size: int = flag(32768, "tokens of a tokenizer that is to be trained: 256 bytes, the merges, 9 special ones", low=265,
                           high=2**24, free=True)
    doc_cap: int = flag(10_000, "characters to learn from of a document, taken from all over it; more only where the text "
                        "has little else", low=1, free=True)


def iter_documents(source: str, *, text_column: str = "text", skip_bad: bool = False, max_chars: int = -1,
                   counts: Counts | None = None) -> Iterator[str]:
    """The documents of a source, those of nothing but white space left out; at most `max_chars` characters (-1: all).

    `skip_bad` leaves out bad files and rows, which are otherwise a UserError that names file and place.
    `counts` is filled along the way. UserError also where there is no text at all.
    """
    counts = Counts() if counts is None else counts
    reading = Reading(text_column, skip_bad, counts)
    left = max_chars if max_chars >= 0 else HUB_CHARS if source.startswith("hf:") else sys.maxsize
    if source == "python":
        texts = _read_python(counts)
    elif source.startswith("hf:"):
        texts = read_hub(source, reading)
    else:
        texts = read_files(find_files(source, counts), reading)
    for text in texts:
        text = text.replace("\ufeff", "")  # a byte-order mark, also where files were joined, is no text
        if not text.strip():
            counts.empty += 1
            continue
        counts.documents += 1
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
    if not counts.documents:
        found = f"{counts.files} file(s) read"
        if left_out := describe_left_out(asdict(counts)):
            found += f"; left out: {left_out}"
        raise UserError(f"no text in {source} ({found}). Point --data at files with text in them, or at python.")


def python_files() -> list[Path]:
    """The interpreter's own Python sources, sorted by their path relative to where they are installed."""
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    this_package = Path(__file__).resolve().parents[1]
    found = []
    for root in sorted(roots):
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            nested = relative.parts[0] in ("site-packages", "dist-packages")  # a root of its own
            own = this_package in path.parents or path.name.startswith("__editable__")
            if not (nested or own or "__pycache__" in relative.parts):
                found.append((relative.as_posix(), path))
    return [path for _, path in sorted(found)]


def _read_python(counts: Counts) -> Iterator[str]:
    seen = set()
    for path in python_files():
        counts.files += 1
        try:
            text = path.read_bytes().decode()
        except (UnicodeDecodeError, OSError):  # the standard library's tests include files in broken encodings
            counts.unreadable += 1
            continue
        if (digest := text_digest(text)) in seen and text.strip():
            counts.duplicates += 1
            continue
        seen.add(digest)
        yield text


def text_digest(text: str) -> bytes:
    """16 bytes that tell a text from others."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def expected_bytes(source: str, max_chars: int) -> int | None:
    """About how much text a source has, for an ETA; None where that cannot be seen from the sizes of its files."""
    if source.startswith("hf:"):
        return HUB_CHARS if max_chars < 0 else max_chars
    if source == "python":
        total = sum(path.stat().st_size for path in python_files())
    elif all(map(is_plain_text, files := find_files(source))):
        total = sum(file.size for file in files)
    else:
        return None if max_chars < 0 else max_chars
    return total if max_chars < 0 else min(total, max_chars)


def source_identity(source: str) -> list:
    """What tells one content of a source from another, as far as that can be seen without reading it."""
    if source == "python":
        return [sys.version, sys.prefix]
    if source.startswith("hf:"):
        return list(hub_address(source))
    return [(str(file.path), file.size, file.mtime_ns) for file in find_files(source)]
