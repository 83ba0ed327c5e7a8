"""Decompression of .gz, .bz2, .xz and .zst while a file is read, and which errors mean that a file is damaged."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from nanochat.common import UserError

CHUNK = 2**20  # bytes copied at once


class Damaged(Exception):
    """The content of a file is not what its format says."""


# What the libraries raise for damaged content. NotImplementedError is zipfile's for an unknown compression method.
DAMAGE = (Damaged, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError,
          struct.error, NotImplementedError)


class _ZstdFile(io.RawIOBase):
    """A zstd file as a stream. Raises: EOFError if it ends within a frame, which zstandard's own reader ignores."""

    def __init__(self, packed: BinaryIO, zstandard):
        self.packed, self.zstandard = packed, zstandard
        self.frame: Any = None  # zstandard's decompressor of the current frame
        self.buffer = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
        while not self.buffer:
            if data := self.packed.read(CHUNK // 8):
                self.buffer = memoryview(self._decompress(data))
            elif self.frame:
                raise EOFError("it ends within a compressed frame")
            else:
                return 0
        count = min(len(into), len(self.buffer))
        into[:count], self.buffer = self.buffer[:count], self.buffer[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        decompressed = []
        while data:
            if not self.frame:  # `zstd --long` uses windows of up to 2 GiB
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                decompressed.append(self.frame.decompress(data))
            except self.zstandard.ZstdError as e:
                raise Damaged(str(e)) from None
            data = self.frame.unused_data
            if self.frame.eof:
                self.frame = None
        return b"".join(decompressed)


def _open_zstd(stream: BinaryIO, where: str) -> BinaryIO:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"reading {where} needs zstandard: pip install zstandard (it is in the extra `data`)") from None
    return io.BufferedReader(_ZstdFile(stream, zstandard), CHUNK // 8)


# suffix -> function from (compressed stream, path for messages) to a decompressed stream with peek and read1
DECOMPRESS: dict[str, Callable[[BinaryIO, str], Any]] = {
    ".gz": lambda stream, where: gzip.GzipFile(fileobj=stream), ".bz2": lambda stream, where: bz2.BZ2File(stream),
    ".xz": lambda stream, where: lzma.LZMAFile(stream), ".zst": _open_zstd}


def seekable(stream: Any) -> tuple[BinaryIO, Exception | None]:
    """Make a stream seekable: the stream itself, or a temporary file with its decompressed content.

    Where the content is damaged, the file has what comes before the damage, and the error is returned beside it.
    stream: a file, or what DECOMPRESS returns for one.
    Raises: UserError if the temporary folder is full.
    """
    if isinstance(stream, io.BufferedReader) and stream.seekable():
        return stream, None
    copy = tempfile.TemporaryFile()
    damage: Exception | None = None
    while True:
        try:
            chunk = stream.read1(CHUNK)  # read1 returns what it has, so little before a damage is lost
        except DAMAGE as e:
            damage = e
            break
        if not chunk:
            break
        try:
            copy.write(chunk)
        except OSError as e:
            raise UserError(f"cannot decompress an archive or a table in {tempfile.gettempdir()} ({e.strerror}): free some "
                            "space, or set TMPDIR to another folder.") from None
    copy.seek(0)
    return copy, damage


def split_compression(name: str) -> tuple[str, str]:
    """Split a file name into (name without the suffix of its compression, that suffix in lower case or "").

    `.tgz` keeps its name and counts as `.gz`.
    """
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == ".tgz":
        return name, ".gz"
    return (stem, suffix.lower()) if suffix.lower() in DECOMPRESS else (name, "")
