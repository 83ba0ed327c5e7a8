"""Local files: which files a path, folder or glob means, and how their documents are read.

    text        .txt .md .py .rst .tex .html .htm            a file is a document
    rows        .json .jsonl .ndjson .csv .tsv .parquet .arrow .feather      a row is a document
    compressed  any of these followed by .gz .zst .xz .bz2
    archives    .zip .tar .tgz, and a compressed .tar: their members, by the same rules

Text is UTF-8, or UTF-16 or UTF-32 if it begins with their byte-order mark. Folders are searched recursively; links to folders
are followed, and each folder is read once. Files that are not read (hidden, of an unknown kind, empty, a dead link, ...) are
counted by kind in `Counts.left_out`.

A file that should be readable but is not (damaged, another encoding, no text column) is bad: a UserError that names the place,
or with --skip-bad it is skipped and counted; documents before the damage are used. Two kinds of files are not bad but of an
unknown kind, unless the user named them: a .json, .csv or .tsv that nowhere has the text column (a program's settings, a table),
and a file that is not compressed although its suffix says so.
"""

import glob
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nanochat.common import UserError, resolve, user_dir
from nanochat.data.compression import DAMAGE, DECOMPRESS, seekable, split_compression
from nanochat.data.formats import FORMATS, UnexpectedKind, encoding_of, read_text
from nanochat.data.reading import Counts, Reading, describe_left_out


class File(NamedTuple):
    """A file to read."""
    path: Path
    size: int  # bytes
    mtime_ns: int
    named: bool  # by the user; False if found in a folder or by a glob


# ---- which files

def find_files(source: str, counts: Counts | None = None) -> list[File]:
    """The readable files of a path, glob or folder, sorted by path. The others are counted in `counts.left_out`.

    Raises: UserError if there are none.
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
    here = user_dir()  # not a part of the pattern, as its name may contain brackets
    names = glob.iglob(str(resolve(pattern)) if absolute else pattern, root_dir=here, recursive=True)
    for path in {str(here / name) for name in names}:
        file = _regular_file(path, os.path.basename(path), counts)
        if file is FOLDER and "**" not in pattern:
            counts.leave_out("folder", path)
        elif isinstance(file, File):
            yield file


def _files_of_folder(root: Path, counts: Counts) -> Iterator[File]:
    above = {_inode(folder) for folder in root.resolve().parents}  # a link to one would add files outside of the root
    seen: set[tuple[int, int]] = set()
    folders, links = [str(root)], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: of two names of a folder its own is better
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
    """A File of a known kind, FOLDER, or None for what is not read, which is counted."""
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
        counts.leave_out(_kind_label(name), path)
    elif not found.st_size:
        counts.leave_out("empty file", path)
    else:
        return File(Path(path), found.st_size, found.st_mtime_ns, named=False)
    return None


def _inode(path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _kind_label(name: str) -> str:
    """Label of a file's kind for the counts of files that are not read: its suffix, if it has a sensible one."""
    stem, compression = split_compression(name)
    suffix = os.path.splitext(stem)[1].lower()
    return suffix + compression if 1 < len(suffix) <= 12 and suffix.isprintable() else f"no known suffix{compression}"


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
            yield from _until_damage(_read(stream, file.path.name, str(file.path), reading), str(file.path), reading, file.named)


def _read(stream: BinaryIO, name: str, where: str, reading: Reading) -> Iterator[str]:
    """The documents of one file or member of an archive: by the format of its suffix, else as text."""
    kind, compression = kind_of(name), split_compression(name)[1]
    if compression:
        decompressed = DECOMPRESS[compression](stream, where)
        try:
            decompressed.peek(1)
        except DAMAGE as e:
            raise UnexpectedKind(f"not packed as {compression}", f"cannot read {where}: {e or type(e).__name__}") from None
        stream = decompressed
    yield from (READERS[kind] if kind else _read_unknown)(stream, where, reading)


def _until_damage(texts: Iterator[str], where: str, reading: Reading, named: bool = False) -> Iterator[str]:
    """Pass on `texts` up to a damage, which is reported as bad."""
    try:
        yield from texts
    except UnexpectedKind as e:
        if named:
            reading.bad(str(e), e.hint)
        else:
            reading.counts.leave_out(e.kind, str(e))
    except DAMAGE as e:
        reading.bad(f"cannot read {where}: {getattr(e, 'strerror', None) or e or type(e).__name__}")


def kind_of(name: str) -> str | None:
    """The suffix that selects the reader, without that of the compression; None if it is unknown."""
    suffix = os.path.splitext(split_compression(name)[0])[1].lower()
    return ".tar" if suffix == ".tgz" else suffix if suffix in READERS else None


def is_plain_text(file: File) -> bool:
    """Whether a file is uncompressed text, so that its size is that of its text."""
    name = file.path.name
    return not split_compression(name)[1] and READERS.get(kind_of(name) or "", read_text) is read_text


def _read_unknown(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    """A file of unknown suffix that the user named: text, or a UserError."""
    content = stream.read()
    try:
        text = content.decode(encoding_of(content))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{where} is not text, and of no known kind. Known: {KINDS}.")
    yield text


# ---- archives

def _read_zip(stream: BinaryIO, where: str, reading: Reading) -> Iterator[str]:
    stream, damage = seekable(stream)
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
    stream, damage = seekable(stream)
    members: list[tarfile.TarInfo] = []
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        try:
            for member in archive:
                members.append(member)
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile stops silently at a header that it cannot read
                raise tarfile.ReadError("a damaged header")
        except tarfile.TarError as e:  # members before the damage can be read
            damage = damage or e
        for member in sorted(members, key=lambda member: member.name):
            if member.isreg():
                yield from _read_member(partial(archive.extractfile, member), member.name, member.size, where, reading)
            elif not member.isdir():
                reading.counts.leave_out("link or device in an archive", f"{where}/{member.name}")
    if damage:
        raise damage


def _read_member(open_member: Callable, name: str, size: int, archive: str, reading: Reading) -> Iterator[str]:
    """The documents of one member of an archive, by the same rules as files of a folder."""
    where, kind = f"{archive}/{name}", kind_of(name)
    if any(part.startswith(".") for part in name.split("/") if part not in (".", "..")):
        reading.counts.leave_out("hidden", where)
    elif kind is None:
        reading.counts.leave_out(_kind_label(name), where)
    elif kind in (".zip", ".tar"):
        reading.counts.leave_out("archive within an archive", where)
    elif not size:
        reading.counts.leave_out("empty file", where)
    else:
        reading.counts.files += 1

        def texts():
            with open_member() as member:
                yield from _read(member, name, where, reading)
        yield from _until_damage(texts(), where, reading)


READERS = FORMATS | {".zip": _read_zip, ".tar": _read_tar}
KINDS = f"{' '.join(READERS)} .tgz, each also with {' '.join(DECOMPRESS)}"
