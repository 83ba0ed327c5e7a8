"""Where text comes from: a source is a stream of documents, always in the same order.

    python              the .py files of this interpreter's standard library and installed packages: real text on
                        every machine, without a network
    PATH, GLOB, FOLDER  .txt .md .py (a file is a document), .jsonl .jsonl.gz .parquet (a row is a document)
    hf:NAME[:CONFIG][:SPLIT][:COLUMN]   a dataset of the Hugging Face hub, streamed; hf:climbmix, hf:fineweb-edu and
                        hf:tinystories are short for well-known ones

Nothing is left out in silence: what cannot be decoded is an error that names the place, or, on request, is counted.
"""

import glob
import gzip
import hashlib
import json
import sys
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError
from nanochat.flags import flag
from nanochat.tokenizer import replace_lone_surrogates

HUB_CHARS = 1_000_000_000  # what is read of a dataset on the hub unless --max-chars says otherwise
HUB_PRESETS = {  # name: (repository, config, split, column)
    "climbmix": ("karpathy/climbmix-400b-shuffle", None, "train", "text"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
    "tinystories": ("roneneldan/TinyStories", None, "train", "text"),
}


@dataclass
class SourceFlags:
    """The text"""
    data: str = flag("python", "python (this interpreter's own sources), a path, glob or folder, or "
                               "hf:NAME[:CONFIG][:SPLIT][:COLUMN]", metavar="SOURCE")
    text_column: str = flag("text", "column of .jsonl and .parquet files that holds the text", metavar="NAME")
    max_chars: int = flag(-1, "read at most this many characters; -1 is all (1e9 of hf:)")
    skip_bad: bool = flag(False, "leave out, and count, what is not valid UTF-8 or JSON instead of stopping at it")

    def validate(self) -> list[str]:
        return [] if self.max_chars == -1 or self.max_chars > 0 else ["--max-chars must be positive, or -1 for all"]

    def reading(self) -> dict:
        """The keyword arguments that readers of text share."""
        return dict(text_column=self.text_column, max_chars=self.max_chars, skip_bad=self.skip_bad)


@dataclass
class Counts:
    """What was met while reading."""
    files: int = 0
    documents: int = 0
    empty: int = 0  # documents of nothing but white space, left out
    unreadable: int = 0  # files or rows left out because they could not be decoded
    duplicates: int = 0  # exact copies left out


@dataclass
class _Reading:
    """How rows are read, for the readers of each file type."""
    text_column: str
    skip_bad: bool
    counts: Counts

    def bad(self, problem: str) -> None:
        """Refuse something unreadable, or count it and go on where the user asked for that."""
        if not self.skip_bad:
            raise UserError(f"{problem} Mend it, or leave out what cannot be read with --skip-bad.")
        self.counts.unreadable += 1

    def check_column(self, where: str, columns: Iterable[str]) -> None:
        columns = list(columns)
        if self.text_column not in columns:
            there = ", ".join(map(repr, columns)) or "none"
            raise UserError(f"{where} has no column {self.text_column!r}; it has {there}. Name the one with the text: "
                            "--text-column NAME.")


def iter_documents(source: str, *, text_column: str = "text", skip_bad: bool = False, max_chars: int = -1,
                   counts: Counts | None = None) -> Iterator[str]:
    """The documents of a source, those of nothing but white space left out; at most `max_chars` characters (-1: all).

    `skip_bad` leaves out undecodable files and rows, which are otherwise a UserError that names file and place.
    `counts` is filled along the way. UserError also where there is no text at all.
    """
    counts = Counts() if counts is None else counts
    reading = _Reading(text_column, skip_bad, counts)
    left = max_chars if max_chars >= 0 else HUB_CHARS if source.startswith("hf:") else sys.maxsize
    if source == "python":
        texts = _read_python(counts)
    elif source.startswith("hf:"):
        texts = _read_hub(source, reading)
    else:
        texts = _read_files(local_files(source), reading)
    for text in texts:
        if not text.strip():
            counts.empty += 1
            continue
        counts.documents += 1
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return
    if not counts.documents:
        found = f"{counts.files} file(s) read" + (f", {counts.empty} empty document(s)" if counts.empty else "") \
            + (f", {counts.unreadable} unreadable" if counts.unreadable else "")
        raise UserError(f"no text in {source} ({found}). Point --data at files with text in them, or at python.")


def local_files(source: str) -> list[Path]:
    """The files a path, glob or folder stands for, sorted; a folder is searched to any depth, hidden names aside."""
    path, kinds = Path(source).expanduser(), " ".join(READERS)
    if path.is_file():
        if not _kind(path):
            raise UserError(f"{path}: do not know how to read a file of this type. Known: {kinds}.")
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    elif glob.has_magic(source):
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    else:
        raise UserError(f"{source}: no such file or folder. --data takes python, a path, a glob, a folder or hf:NAME.")
    files = sorted((p for p in found if _kind(p) and p.is_file()), key=Path.as_posix)
    if not files:
        raise UserError(f"{source}: none of the {len(found)} name(s) found there is a file of a known type ({kinds}).")
    return files


def python_files() -> list[Path]:
    """The interpreter's own Python sources, sorted by their path relative to where they are installed."""
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    this_package = Path(__file__).resolve().parent
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


def _read_files(files: list[Path], reading: _Reading) -> Iterator[str]:
    for path in files:
        reading.counts.files += 1
        try:
            yield from READERS[_kind(path)](path, reading)
        except (OSError, EOFError, zlib.error) as e:  # the latter two: a damaged .gz
            raise UserError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}.") from None


def _read_text(path: Path, reading: _Reading) -> Iterator[str]:
    try:
        yield path.read_bytes().decode()
    except UnicodeDecodeError as e:
        reading.bad(f"{path}: byte {e.start} is not UTF-8.")


def _read_jsonl(path: Path, reading: _Reading) -> Iterator[str]:
    offset = 0
    with gzip.open(path, "rb") if _kind(path) == ".jsonl.gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            where, begin = f"{path}, line {number}", offset
            offset += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as e:
                reading.bad(f"{where}: byte {begin + e.start} of the file is not UTF-8.")
                continue
            except (ValueError, RecursionError) as e:
                reading.bad(f"{where} is not valid JSON: {e}.")
                continue
            if not isinstance(row, dict):
                reading.bad(f"{where} is not a JSON object.")
                continue
            reading.check_column(where, row)
            yield from _as_text(row[reading.text_column], where, reading)


def _read_parquet(path: Path, reading: _Reading) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as table:
            reading.check_column(str(path), table.schema_arrow.names)
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[reading.text_column]):
                for value in batch.column(0):
                    row, where = row + 1, f"{path}, row {row + 1}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as e:
                        reading.bad(f"{where}: byte {e.start} of its text is not UTF-8.")
                    else:
                        yield from _as_text(text, where, reading)
    except pyarrow.ArrowException as e:
        raise UserError(f"cannot read {path}: {e}") from None


READERS = {".txt": _read_text, ".md": _read_text, ".py": _read_text, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl,
           ".parquet": _read_parquet}


def _kind(path: Path) -> str | None:
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def _as_text(value, where: str, reading: _Reading) -> Iterator[str]:
    """The text of one row: nothing is empty text, anything but a string is refused."""
    if value is None or isinstance(value, str):
        yield replace_lone_surrogates(value or "")
    else:
        reading.bad(f"{where}: column {reading.text_column!r} holds {type(value).__name__}, not text.")


def _read_hub(source: str, reading: _Reading) -> Iterator[str]:
    name, config, split, column = hub_address(source, reading.text_column)
    reading.text_column = column
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the datasets library: pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            reading.check_column(source, row)
            yield from _as_text(row[column], f"{source}, row {number}", reading)
    except UserError:
        raise
    except Exception as e:  # what fails on the way to a hub is of too many kinds to list
        first_line = (str(e).splitlines() or [""])[0]
        raise UserError(f"cannot read {source} from the Hugging Face hub ({type(e).__name__}: {first_line[:200]}). "
                        "Check the name and the network, or use local text: --data PATH or --data python.") from None


def hub_address(source: str, text_column: str = "text") -> tuple[str, str | None, str, str]:
    """(repository, config, split, column) of `hf:NAME[:CONFIG][:SPLIT][:COLUMN]`; an empty part takes its default."""
    parts = source.removeprefix("hf:").split(":")
    if not parts[0] or len(parts) > 4:
        raise UserError(f"{source!r}: expected hf:NAME[:CONFIG][:SPLIT][:COLUMN], or a preset: "
                        + ", ".join(f"hf:{name}" for name in HUB_PRESETS) + ".")
    defaults = HUB_PRESETS.get(parts[0], (parts[0], None, "train", text_column))
    given = [None, *parts[1:], *[None] * (4 - len(parts))]
    return tuple(part or default for part, default in zip(given, defaults))


def text_digest(text: str) -> bytes:
    """16 bytes that tell a text from others."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def expected_bytes(source: str, max_chars: int) -> int | None:
    """About how much text a source has, for an ETA; None where files are compressed or binary."""
    if source.startswith("hf:"):
        return HUB_CHARS if max_chars < 0 else max_chars
    files = python_files() if source == "python" else local_files(source)
    if any(READERS[_kind(path)] is not _read_text for path in files):
        return None if max_chars < 0 else max_chars
    total = sum(path.stat().st_size for path in files)
    return total if max_chars < 0 else min(total, max_chars)


def source_identity(source: str) -> list:
    """What tells one content of a source from another, as far as that can be seen without reading it."""
    if source == "python":
        return [sys.version, sys.prefix]
    if source.startswith("hf:"):
        return list(hub_address(source))
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in local_files(source)]
