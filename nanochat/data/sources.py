"""Sources of text: a source is a stream of documents, always in the same order.

    python              the .py files of this interpreter's standard library and installed packages: real text on
                        every machine, without a network
    PATH, GLOB, FOLDER  files of text (a file is a document) or of rows (a row is a document), also compressed or in archives:
                        nanochat/data/files.py
    hf:NAME[:CONFIG][:SPLIT][:COLUMN]   a dataset of the Hugging Face hub, streamed: nanochat/data/hub.py. hf:climbmix,
                        hf:fineweb-edu and hf:tinystories are short names of well-known ones

Everything that is skipped is counted. Text that cannot be read is an error that names the place, or is counted with --skip-bad.
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
    text_column: str = flag("text", "name of the column (JSON key) with the text, in files of rows", metavar="NAME")
    max_chars: int = flag(-1, "read at most this many characters; -1 is all (1e9 of hf:)")
    skip_bad: bool = flag(False, "skip and count rows and files that cannot be read, instead of stopping at the first")

    def validate(self) -> list[str]:
        problems = [] if self.max_chars == -1 or self.max_chars > 0 else ["--max-chars must be positive, or -1 for all"]
        return problems if self.data.strip() else [*problems, "--data must name a source of text"]

    def reading(self) -> dict:
        """The keyword arguments that readers of text share."""
        return dict(text_column=self.text_column, max_chars=self.max_chars, skip_bad=self.skip_bad)


@dataclass
class TokenizerFlags(SourceFlags):
    """The text, and the vocabulary to learn from it"""
    vocab_size: int = flag(32768, "tokens of a newly trained tokenizer: 256 bytes, the merges, 9 special tokens", low=265,
                           high=2**24, affects_results=False)
    doc_cap: int = flag(10_000, "characters per document that the tokenizer learns from; more of long documents if the text "
                        "is small", low=1, affects_results=False)


def iter_documents(source: str, *, text_column: str = "text", skip_bad: bool = False, max_chars: int = -1,
                   counts: Counts | None = None) -> Iterator[str]:
    """The documents of a source, without those of white space only.

    text_column: the column of the text, in files of rows.   skip_bad: skip bad files and rows.
    max_chars: stop after this many characters; -1 reads all (from the hub HUB_CHARS).   counts: filled while reading.
    Raises: UserError for a bad file or row, unless `skip_bad`, and for a source without any text.
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
        text = text.replace("\ufeff", "")  # byte-order marks, which joined files have in the middle
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
    """The interpreter's Python sources: the standard library, torch, then other packages, each sorted by path.

    A source that is cut after some text (`--max-chars`) is so the same for the same versions of Python and torch, whatever
    else is installed. This package is left out.
    """
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    this_package = Path(__file__).resolve().parents[1]
    found = []
    for root in sorted(roots):
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            nested = relative.parts[0] in ("site-packages", "dist-packages")  # a root of its own
            own = this_package in path.parents or path.name.startswith("__editable__")
            if not (nested or own or "__pycache__" in relative.parts):
                installed = root.name in ("site-packages", "dist-packages")
                order = 0 if not installed else 1 if relative.parts[0] == "torch" else 2
                found.append((order, relative.as_posix(), path))
    return [path for _, _, path in sorted(found)]


def _read_python(counts: Counts) -> Iterator[str]:
    """The documents of the source `python`, without exact copies."""
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
    """A hash of a text, 16 bytes, to find exact copies."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def expected_bytes(source: str, max_chars: int) -> int | None:
    """Approximate bytes of text in a source, for a progress bar; None if file sizes do not tell."""
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
    """A key of a source's content that is known without reading it: paths, sizes and modification times of its files."""
    if source == "python":
        return [sys.version, sys.prefix, "standard library first"]
    if source.startswith("hf:"):
        return list(hub_address(source))
    return [(str(file.path), file.size, file.mtime_ns) for file in find_files(source)]
