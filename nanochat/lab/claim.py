"""Who works on what in a shared folder: a claim is a file that only one worker can have made.

A file is made with O_EXCL, which also holds over NFS, where flock(2) may not. Its owner touches it every second or so. A claim
may be taken over when its owner has died, on this machine, or has been silent for two minutes, on another; ages are measured
by the folder's clock, not by the worker's.
"""

import json
import os
import platform
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

SILENCE = 120.0  # seconds without a touch after which a worker on another machine is taken for ended


class Claim:
    """A claim that is held. `beat()` now and then, `release()` at the end."""

    def __init__(self, path: Path, token: str):
        self.path, self.token = path, token

    @classmethod
    def take(cls, path: Path) -> "Claim | None":
        """The claim on `path`, or None where a live worker has it."""
        if claim := cls._make(path):
            return claim
        if not _abandoned(path):
            return None
        takeover = cls._make(path.with_name(path.name + ".takeover"))  # two that find it abandoned: one may replace it
        if not takeover:
            with suppress(FileNotFoundError):
                if _age(guard := path.with_name(path.name + ".takeover")) > SILENCE:
                    guard.unlink()
            return None
        try:
            if not _abandoned(path):
                return None
            path.unlink(missing_ok=True)
            return cls._make(path)
        finally:
            takeover.release()

    @classmethod
    def _make(cls, path: Path) -> "Claim | None":
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return None
        token = uuid.uuid4().hex
        with os.fdopen(fd, "w") as f:
            f.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "birth": _birth(os.getpid()), "token": token}))
        return cls(path, token)

    def beat(self) -> bool:
        """A sign of life. False where another worker has taken over, this one having been silent for too long."""
        if _read(self.path).get("token") != self.token:
            return False
        with suppress(FileNotFoundError):
            os.utime(self.path)
        return True

    def release(self) -> None:
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)


@contextmanager
def held(path: Path, poll: float = 0.05):
    """Wait for the claim on `path`, hold it inside, give it back. For what takes seconds."""
    while not (claim := Claim.take(path)):
        time.sleep(poll)
    try:
        yield claim
    finally:
        claim.release()


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _abandoned(path: Path) -> bool:
    owner = _read(path)
    if owner.get("host") == platform.node():
        return not _alive(owner["pid"], owner["birth"])
    try:
        return _age(path) > SILENCE
    except FileNotFoundError:
        return False


def _alive(pid: int, birth: str) -> bool:
    """Whether the process is there, and is not another that got its number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _birth(pid) == birth


def _birth(pid: int) -> str:
    """When the process began, in the kernel's ticks; nothing where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _age(path: Path) -> float:
    """Seconds since the file was touched, by the clock of the machine that keeps the folder."""
    probe = path.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
