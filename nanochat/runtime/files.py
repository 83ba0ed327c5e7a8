"""Files whose damage is noticed: checksums written beside the bytes, and JSON that vouches for itself. No torch.

A checksum finds what a disk, a cable or a half-finished copy did to a file. It is no signature: who can write the file
can write its checksum too. So nothing that is read here is executed, and what it says is checked before it is used.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from nanochat.common import Progress

CHUNK = 2**22  # bytes read at once


def write_atomic(path: Path, text: str) -> None:
    """Write a small text file so that readers see the old one or the new one whole, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def set_aside(path: Path, name: str | None = None) -> Path:
    """Rename a file or folder to the first free one of NAME~1, NAME~2, ..., by default of its own name; returns where it is."""
    aside = next(aside for n in count(1) if not os.path.lexists(aside := path.with_name(f"{name or path.name}~{n}")))
    os.rename(path, aside)
    return aside


def write_hashed(path: Path, blocks: Iterable) -> dict:
    """Write bytes-like blocks to a file and sync it; its entry for a manifest: {"bytes": size, "sha256": 64 hex digits}."""
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        for block in blocks:
            f.write(block)
            digest.update(block)
        f.flush()
        os.fsync(f.fileno())
        return {"bytes": f.tell(), "sha256": digest.hexdigest()}


def file_digest(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file, in hex; about a second per GB."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK):
            digest.update(chunk)
            if progress:
                progress.update(len(chunk))
    return digest.hexdigest()


def check_file(path: Path, expected: dict) -> None:
    """ValueError that names the file unless it has the size and the checksum of its manifest entry."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise ValueError(f"{path.name} has {size:,} bytes instead of {expected['bytes']:,}")
    if file_digest(path) != expected["sha256"]:
        raise ValueError(f"{path.name} does not match its checksum")


def seal(content: dict) -> str:
    """JSON of `content` and of a checksum over it."""
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1) + "\n"


def read_sealed(path: Path, schema_version: int) -> dict:
    """What `seal` was given. ValueError that names the file unless every byte is as written and it has this version."""
    content = read_json(path)
    found = content.pop("sha256", None)
    if (version := content.get("schema_version")) != schema_version:
        raise ValueError(f"{path.name} has schema version {version!r}, and {schema_version} is read here")
    if found is None or seal(content).encode() != path.read_bytes():
        raise ValueError(f"{path.name} does not match its own checksum")
    return content


def read_json(path: Path) -> dict:
    """A JSON object from a file. ValueError that names the file where it holds anything else, or is not there."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path.name} is not JSON ({e})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut. Windows cannot open folders, and needs not."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
