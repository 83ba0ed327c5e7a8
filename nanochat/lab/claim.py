"""Claims: lock files by which several workers share the work of one folder.

A claim is created with O_EXCL, which is atomic over NFS too, where flock(2) may not be. Its owner touches it about once a second
(a heartbeat). Another worker may take a claim over when its owner's process has ended, on this machine, or has not touched it for
two minutes, on another one. Ages are measured by the clock of the file server, not by the worker's.
"""

import json
import os
import platform
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

LEASE_SECONDS = 120.0  # without a heartbeat for so long, a worker on another machine counts as ended


class Claim:
    """A claim that this process holds: call `heartbeat()` about once a second, `release()` at the end."""

    def __init__(self, path: Path, token: str):
        self.path, self.token = path, token

    @classmethod
    def take(cls, path: Path) -> "Claim | None":
        """Take the claim on `path`; None where a live worker holds it."""
        if claim := cls._make(path):
            return claim
        if not _abandoned(path):
            return None
        guard = path.with_name(path.name + ".takeover")  # of two workers that find a claim abandoned, one may replace it
        if not (takeover := cls._make(guard)):
            with suppress(FileNotFoundError):
                if _age(guard) > LEASE_SECONDS:
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
            pid = os.getpid()
            f.write(json.dumps({"host": platform.node(), "pid": pid, "started": _start_time(pid), "token": token}))
        return cls(path, token)

    def heartbeat(self) -> bool:
        """Show that this worker is alive. False where another has taken the claim over, as the last heartbeat was too old."""
        if _read(self.path).get("token") != self.token:
            return False
        with suppress(FileNotFoundError):
            os.utime(self.path)
        return True

    def release(self) -> None:
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)


@contextmanager
def hold_claim(path: Path, poll: float = 0.05):
    """Wait for the claim on `path`, and hold it inside the `with` block, which should take seconds at most without heartbeats.

    poll: seconds between attempts.
    """
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
        return not _is_running(owner["pid"], owner["started"])
    try:
        return _age(path) > LEASE_SECONDS
    except FileNotFoundError:
        return False


def _is_running(pid: int, started: str) -> bool:
    """Whether this very process runs, and not a later one that was given the same id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_time(pid) == started


def _start_time(pid: int) -> str:
    """When the process started, in clock ticks since boot; "" where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _age(path: Path) -> float:
    """Seconds since the file was touched, by the clock of the machine that stores the folder."""
    probe = path.with_name(f".clock-{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
