"""Text of local files: which ones a path, a folder or a glob stands for, and how each kind is read.

    text      .txt .md .py .rst .tex .html .htm            a file is a document, as it is
    rows      .json .jsonl .ndjson .csv .tsv .parquet .arrow .feather      a row is a document
    packed    any of these with .gz .zst .xz .bz2 behind it
    archives  .zip .tar .tgz, and a .tar packed as above: their members, by the same rules

Text is UTF-8, or UTF-16 or UTF-32 if it begins with their byte-order mark. A folder is searched to any depth; links to folders
are followed, each folder being read once. What is not read (hidden, of another kind, empty, a dead link, ...) is counted
by kind in `Counts.left_out`. What should be readable and is not (damaged, in another encoding, without the column) is bad:
a UserError that names the place, or, with --skip-bad, left out and counted; what came before a damage is taken. Beside other
files a .json, .csv or .tsv that nowhere has the column (a program's settings, a table) and a file that was never packed as
its suffix says are of another kind, not bad; named by the user, they are.
"""

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import stat
import struct
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nanochat.common import UserError, resolve, user_dir
from nanochat.data.reading import COLUMN_HINT, Counts, Reading, describe_left_out

CHUNK = 2**20  # bytes copied at once


class Damaged(Exception):
    """The bytes of a file are not what its name says."""


class OfAnotherKind(Exception):
    """A file holds something else than its name lets expect."""

    def __init__(self, kind: str, problem: str, hint: str = "Mend it"):
        super().__init__(problem)
        self.kind, self.hint = kind, hint


def without_column(where: str, columns: list[str], reading: Reading) -> OfAnotherKind:
    """A table, or a file of objects, that nowhere has the column with the text."""
    problem = reading.missing_column(where, columns)
    return OfAnotherKind(f"without a column {reading.text_column!r}", problem, COLUMN_HINT)


# What the libraries raise for damaged bytes. NotImplementedError is zipfile's for a compression that it does not know.
DAMAGE = (Damaged, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError,
          struct.error, NotImplementedError)


class File(NamedTuple):
    path: Path
    size: int  # bytes
    mtime_ns: int
    named: bool  # by the user, not found in a folder or by a glob


# ---- which files

def find_files(source: str, counts: Counts | None = None) -> list[File]:
    """The files a path, glob or folder stands for, sorted by path; UserError where there is none.

    `counts.left_out` is filled with the others.
    """
    counts, path = counts or Counts(), resolve(source)
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        if not glob.has_magic(source):
            why = "" if isinstance(e, (FileNotFoundError, NotADirectoryError, ValueError)) else f" ({e.strerror})"
            raise UserError(f"{source}: no such file or folder{why}. --data takes python, a path, a glob, a folder or "
                            "hf:NAME.") from None
        candidates = _files_of_glob(source, counts)
    else:
        if stat.S_ISREG(found.st_mode):
            return [File(path, found.st_size, found.st_mtime_ns, named=True)]
        if not stat.S_ISDIR(found.st_mode):
            raise UserError(f"{source} is a pipe or a device: it can be read only once, and text is read several times (for "
                            "the tokenizer, then for the tokens). Write it to a file first, and name that.")
        candidates = _files_of_folder(path, counts)
    files = sorted(candidates, key=lambda file: file.path.as_posix())
    if not files:
        others = describe_left_out(asdict(counts))
        raise UserError(f"{source}: no file of a known kind is there ({others and 'left out: '}{others or 'nothing was found'}). "
                        f"Known: {KINDS}.")
    return files


def _files_of_glob(pattern: str, counts: Counts) -> Iterator[File]:
    absolute = os.path.isabs(pattern) or pattern.startswith("~")
    here = user_dir()  # may have brackets in its name, so it must not become a part of the pattern
    names = glob.iglob(str(resolve(pattern)) if absolute else pattern, root_dir=here, recursive=True)
    for path in {str(here / name) for name in names}:
        file = _regular_file(path, os.path.basename(path), counts)
        if file is FOLDER and "**" not in pattern:
            counts.leave_out("folder", path)
        elif isinstance(file, File):
            yield file


def _files_of_folder(root: Path, counts: Counts) -> Iterator[File]:
    above = {_inode(folder) for folder in root.resolve().parents}  # a link to one would lead to all that lies beside the root
    seen: set[tuple[int, int]] = set()
    folders, links = [str(root)], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # where a folder has two names, its own is better than a link's
        try:
            inode = _inode(folder)
            entries = [] if inode in seen or inode in above else sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            counts.leave_out("folder that cannot be read", folder)
            continue
        if inode in above:
            counts.leave_out("link to a folder above", folder)
        seen.add(inode)
        for entry in entries:
            if entry.name.startswith("."):
                counts.leave_out("hidden", entry.path)
                continue
            file = _regular_file(entry.path, entry.name, counts)
            if file is FOLDER:
                (links if entry.is_symlink() else folders).append(entry.path)
            elif file:
                yield file


FOLDER = object()


def _regular_file(path: str, name: str, counts: Counts):
    """A File of a known kind, FOLDER, or None for what is left out."""
    try:
        found = os.stat(path)
    except OSError as e:
        counts.leave_out("dead link" if os.path.islink(path) else e.strerror or type(e).__name__, path)
        return None
    if stat.S_ISDIR(found.st_mode):
        return FOLDER
    if not stat.S_ISREG(found.st_mode):
        counts.leave_out("pipe or device", path)
    elif not kind_of(name):
        counts.leave_out(_suffix(name), path)
    elif not found.st_size:
        counts.leave_out("empty file", path)
    else:
        return File(Path(path), found.st_size, found.st_mtime_ns, named=False)
    return None


def _inode(path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _suffix(name: str) -> str:
    """What kind of file a name seems to be of, for the count of those left out."""
    stem, packed = _unpacked(name)
    suffix = os.path.splitext(stem)[1].lower()
    return suffix + packed if 1 < len(suffix) <= 12 and suffix.isprintable() else f"no known suffix{packed}"


# ---- reading a file

def read_files(files: list[File], reading: Reading) -> Iterator[str]:
    """The documents of these files."""
    for file in files:
        try:
            stream = open(file.path, "rb")
        except PermissionError:
            if file.named:
                raise UserError(f"{file.path} may not be read (permission denied).") from None
            reading.counts.leave_out("not permitted to be read", str(file.path))
            continue
        except OSError as e:
            reading.bad(f"cannot read {file.path}: {e.strerror}")
            continue
        reading.counts.files += 1
        with stream:
            yield from _checked(_read(stream, file.path.name, str(file.path), reading), str(file.path), reading, file.named)


def _read(stream: BinaryIO, name: str, where: str, reading: Reading) -> Iterator[str]:
    """The documents of one file or member of an archive, read by what its name says; of another name, as text."""
    kind, packed = kind_of(name), _unpacked(name)[1]
    if packed:
        unpacked = UNPACK[packed](stream, where)
        try:
            unpacked.peek(1)
        except DAMAGE as e:
            raise OfAnotherKind(f"not packed as {packed}", f"cannot read {where}: {e or type(e).__name__}") from None
        stream = unpacked
    yield from (READERS[kind] if kind else _read_unknown)(stream, where, reading)


def _checked(texts: Iterator[str], where: str, reading: Reading, named: bool = False) -> Iterator[str]:
    """`texts`, up to a damage, which is bad."""
    try:
        yield from texts
    except OfAnotherKind as e:
        if named:
            reading.bad(str(e), e.hint)
        else:
            reading.counts.leave_out(e.kind, str(e))
    except DAMAGE as e:
        reading.bad(f"cannot read {where}: {getattr(e, 'strerror', None) or e or type(e).__name__}")


def kind_of(name: str) -> str | None:
    """The suffix by which a file is read, without that of its compression; None for one that is not known."""
    suffix = os.path.splitext(_unpacked(name)[0])[1].lower()
    return ".tar" if suffix == ".tgz" else suffix if suffix in READERS else None


def is_plain_text(file: File) -> bool:
    """Whether a file's size is about that of its text."""
    name = file.path.name
    return not _unpacked(name)[1] and READERS.get(kind_of(name) or "", _read_text) is _read_text


def _unpacked(name: str) -> tuple[str, str]:
    """(name without the suffix of a compression, that suffix or "")"""
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == ".tgz":
        return name, ".gz"
    return (stem, suffix.lower()) if suffix.lower() in UNPACK else (name, "")


# ---- compression

class _ZstdFile(io.RawIOBase):
    """zstd, unpacked while it is read. EOFError where a file ends within a frame, which zstandard's own reader passes over."""

    def __init__(self, packed: BinaryIO, zstandard):
        self.packed, self.zstandard = packed, zstandard
        self.frame: Any = None  # a decompressor of zstandard's while a frame is open
        self.buffer = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        while not self.buffer:
            if data := self.packed.read(CHUNK // 8):
                self.buffer = memoryview(self._unpack(data))
            elif self.frame:
                raise EOFError("it ends within a compressed frame")
            else:
                return 0
        count = min(len(into), len(self.buffer))
        into[:count], self.buffer = self.buffer[:count], self.buffer[count:]
        return count

    def _unpack(self, data: bytes) -> bytes:
        unpacked = []
        while data:
            if not self.frame:  # files packed with --long name windows of up to 2 GiB
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                unpacked.append(self.frame.decompress(data))
            except self.zstandard.ZstdError as e:
                raise Damaged(str(e)) from None
            data = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        return b"".join(unpacked)


def _unpack_zstd(stream: BinaryIO, where: str) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {where} needs zstandard: pip install zstandard (it is in the extra `data`)") from None
    return io.BufferedReader(_ZstdFile(stream, zstandard), CHUNK // 8)


# Any: files with peek and read1, of classes that have no common type.
UNPACK: dict[str, Callable[[BinaryIO, str], Any]] = {
    ".gz": lambda stream, where: gzip.GzipFile(fileobj=stream), ".bz2": lambda stream, where: bz2.BZ2File(stream),
    ".xz": lambda stream, where: lzma.LZMAFile(stream), ".zst": _unpack_zstd}


def _seekable(stream: Any) -> tuple[BinaryIO, Exception | None]:
    """What can be read in any order: the stream, or a temporary file with all that could be unpacked of it, and the damage
    that ended it. `stream`: a BinaryIO, or what UNPACK makes of one."""
    if isinstance(stream, io.BufferedReader) and stream.seekable():
        return stream, None
    copy = tempfile.TemporaryFile()
    damage: Exception | None = None
    while True:
        try:
            chunk = stream.read1(CHUNK)  # not all of what was asked for, so that little in front of a damage is lost
        except DAMAGE as e:
            damage = e
            break
        if not chunk:
            break
        try:
            copy.write(chunk)
        except OSError as e:
            raise UserError(f"no room to unpack an archive or a table in {tempfile.gettempdir()} ({e.strerror}): make some, or "
                            "set TMPDIR to another folder.") from None
    copy.seek(0)
    return copy, damage


# ---- text

_MARKS = [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")]  # UTF-32's begins like UTF-16's


def _encoding(start: bytes) -> str:
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


def _decode(content: bytes, where: str, reading: Reading) -> Iterator[str]:
    """The text as the only item, or none where it is bad."""
    encoding = _encoding(content)
    try:
        yield content.decode(encoding)
    except UnicodeDecodeError as e:
        reading.bad(f"{where}: byte {e.start} is not {encoding.upper()}")


def _read_text(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    yield from _decode(stream.read(), where, reading)


def _read_unknown(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    content = stream.read()
    try:
        text = content.decode(_encoding(content))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{where} is not text, and of no known kind. Known: {KINDS}.")
    yield text


# ---- rows

def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of UTF-8 with their ends, without a byte-order mark. UTF-16 and UTF-32 are decoded as a whole."""
    lines = iter(stream)
    first = next(lines, b"")
    if (encoding := _encoding(first)) != "utf-8":
        lines = io.BytesIO((first + stream.read()).decode(encoding).encode())
    elif first:
        yield first.removeprefix(codecs.BOM_UTF8)
    yield from lines


def _read_jsonl(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(_lines(stream), 1):
        place, begin = f"{where}, line {number}", offset
        offset += len(line)
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as e:
            reading.bad(f"{place}: byte {begin + e.start} of the file is not UTF-8")
        except (ValueError, RecursionError) as e:
            reading.bad(f"{place} is not valid JSON: {e}")
        else:
            yield from reading.row(row, place)


def _read_json(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """An array of rows, one at a time; one row; or lines of JSON under another name."""
    content = stream.read()
    for text in _decode(content, where, reading):
        text = text.lstrip("\ufeff")
        rows_of_text = text.lstrip("[" + _JSON_SPACE).startswith('"')
        if not rows_of_text and json.dumps(reading.text_column) not in text:
            raise without_column(where, _first_keys(text), reading)
        if text.lstrip(_JSON_SPACE).startswith("["):
            yield from _read_json_array(text, where, reading)
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            yield from _read_jsonl(io.BytesIO(text.encode()), where, reading)
        else:
            yield from reading.row(row, where)


_JSON_SPACE = " \t\r\n"


def _first_keys(text: str) -> list[str]:
    """The keys of the first object in a JSON text, where it begins with one."""
    try:
        first, _ = json.JSONDecoder().raw_decode(text.lstrip("[" + _JSON_SPACE))
        return list(first) if isinstance(first, dict) else []
    except (ValueError, RecursionError):
        return []


def _read_json_array(text: str, where: str, reading: Reading) -> Iterator[str]:
    decode, number, at = json.JSONDecoder().raw_decode, 0, _skip_space(text, 0) + 1
    try:
        more = text[(at := _skip_space(text, at)):at + 1] != "]"
        while more:
            row, at = decode(text, _skip_space(text, at))
            number, at = number + 1, _skip_space(text, at)
            yield from reading.row(row, f"{where}, row {number}")
            more = text[at:at + 1] == ","
            at += more
        if text[at:at + 1] != "]" or _skip_space(text, at + 1) != len(text):
            raise ValueError("the array does not end where it should")
    except (ValueError, RecursionError) as e:
        reading.bad(f"{where} is not valid JSON after row {number}: {e}")


def _skip_space(text: str, at: int) -> int:
    while text[at:at + 1] and text[at] in _JSON_SPACE:
        at += 1
    return at


def _read_csv(stream: BinaryIO, where: str, reading: Reading, delimiter: str = ",") -> Iterator[str]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 kB is less than a long document
    rows, header = csv.reader(_csv_lines(stream), delimiter=delimiter), None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            reading.bad(f"{where}, line {rows.line_num}: {e}")
            continue
        if not row:
            continue
        place = f"{where}, line {rows.line_num}"
        if header is None:
            header = row
            if reading.text_column not in header:
                raise without_column(where, header, reading)
            column = header.index(reading.text_column)
        elif len(row) <= column or any(row[len(header):]):  # the text may have been cut at a comma
            reading.bad(f"{place} has {len(row)} fields, and the header {len(header)}")
        else:
            try:
                row[column].encode()
            except UnicodeEncodeError:
                reading.bad(f"{place}: its text is not UTF-8")
            else:
                yield row[column]


def _csv_lines(stream: BinaryIO) -> Iterator[str]:
    for line in _lines(stream):
        text = line.decode("utf-8", "surrogateescape")  # so that bytes that are not UTF-8 spoil one row, not the file
        yield from re.split(r"(?<=\r)(?!\n|\Z)", text) if "\r" in text else (text,)  # some programs end lines with \r alone


def _read_tsv(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    return _read_csv(stream, where, reading, delimiter="\t")


def _pyarrow(where: str):
    try:
        import pyarrow
        return pyarrow
    except ImportError:
        raise UserError(f"reading {where} needs pyarrow: pip install pyarrow (it is in the extra `data`)") from None


def _read_parquet(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    def columns(stream):
        from pyarrow import parquet
        with parquet.ParquetFile(stream) as table:
            if reading.check_column(where, table.schema_arrow.names):
                for batch in table.iter_batches(batch_size=1024, columns=[reading.text_column]):
                    yield batch.column(0)
    return _read_columns(columns, stream, where, reading)


def _read_arrow(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """Arrow's IPC formats: of files (feather is one), and of streams, as `datasets` writes them."""
    def columns(stream):
        from pyarrow import ipc
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        table = ipc.open_file(stream) if is_file else ipc.open_stream(stream)
        names = table.schema.names
        if reading.check_column(where, names):
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
            for batch in batches:
                yield batch.column(names.index(reading.text_column))
    return _read_columns(columns, stream, where, reading)


def _read_columns(columns: Callable, stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """`columns`: seekable stream -> arrays of the text column."""
    pyarrow, number = _pyarrow(where), 0
    stream, damage = _seekable(stream)
    try:
        for column in columns(stream):
            column.validate()
            if pyarrow.types.is_string(column.type):  # as bytes, so that one that is not UTF-8 is one bad row
                column = column.cast(pyarrow.binary())
            elif pyarrow.types.is_large_string(column.type):
                column = column.cast(pyarrow.large_binary())
            column.validate(full=True)  # values outside of a damaged file's bytes must not be touched
            is_text = pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type)
            for value in column:
                number, place = number + 1, f"{where}, row {number + 1}"
                try:
                    value = value.as_py()
                    value = value.decode() if is_text and value is not None else value
                except UnicodeDecodeError as e:
                    reading.bad(f"{place}: byte {e.start} of its text is not UTF-8")
                else:
                    yield from reading.text(value, place)
    except pyarrow.ArrowException as e:
        raise Damaged(damage or e) from None
    if damage:
        raise damage


# ---- archives

def _read_zip(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    stream, damage = _seekable(stream)
    with zipfile.ZipFile(stream) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in sorted(members, key=lambda member: member.filename):
            if member.flag_bits & 1:
                reading.bad(f"{where}/{member.filename} is encrypted")
            else:
                yield from _read_member(partial(archive.open, member), member.filename, member.file_size, where, reading)
    if damage:
        raise damage


def _read_tar(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    stream, damage = _seekable(stream)
    members: list[tarfile.TarInfo] = []
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        try:
            for member in archive:
                members.append(member)
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile ends without a word at a header that it cannot read
                raise tarfile.ReadError("a damaged header")
        except tarfile.TarError as e:  # the members before the damage are there
            damage = damage or e
        for member in sorted(members, key=lambda member: member.name):
            if member.isreg():
                yield from _read_member(partial(archive.extractfile, member), member.name, member.size, where, reading)
            elif not member.isdir():
                reading.counts.leave_out("link or device in an archive", f"{where}/{member.name}")
    if damage:
        raise damage


def _read_member(open_member: Callable, name: str, size: int, archive: str, reading: Reading) -> Iterator[str]:
    where, kind = f"{archive}/{name}", kind_of(name)
    if any(part.startswith(".") for part in name.split("/") if part not in (".", "..")):
        reading.counts.leave_out("hidden", where)
    elif kind is None:
        reading.counts.leave_out(_suffix(name), where)
    elif kind in (".zip", ".tar"):
        reading.counts.leave_out("archive within an archive", where)
    elif not size:
        reading.counts.leave_out("empty file", where)
    else:
        reading.counts.files += 1

        def texts():
            with open_member() as member:
                yield from _read(member, name, where, reading)
        yield from _checked(texts(), where, reading)


READERS = {".txt": _read_text, ".md": _read_text, ".py": _read_text, ".rst": _read_text, ".tex": _read_text,
           ".html": _read_text, ".htm": _read_text, ".json": _read_json, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl,
           ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet, ".arrow": _read_arrow, ".feather": _read_arrow,
           ".zip": _read_zip, ".tar": _read_tar}
KINDS = f"{' '.join(READERS)} .tgz, each also with {' '.join(UNPACK)}"
