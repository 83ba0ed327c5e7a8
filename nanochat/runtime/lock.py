"""One run, one folder: a lock that the system releases when its holder ends, however it ends.

`.NAME.lock` lies beside the run's folder, which a new run of the name replaces. It is locked by flock(2) and says who holds
it. A lock file without a lock was left by a process that was killed, or by one on another machine, whose locks do not always
reach here: that one counts as alive while its run has written anything in the last quarter of an hour.
"""

import json
import os
import platform
import time
from datetime import datetime
from io import FileIO
from pathlib import Path

from nanochat.common import UserError, print0

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # mypy has no other way to say that a module may be missing

SILENCE = 15 * 60  # seconds without a sign of life after which a run on another machine is taken for ended


class RunLock:
    """The lock of the run folder `run_dir`, taken by the constructor. UserError, naming the holder, where it is taken."""

    file: FileIO

    def __init__(self, run_dir: Path):
        self.path = lock_path(run_dir)
        try:
            run_dir.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as e:
            raise UserError(f"cannot lock {self.path}: {e.strerror}. Choose a base directory that you can write to, with "
                            "NANOCHAT_BASE_DIR.") from None
        try:
            self._replace_holder(run_dir)
        except BaseException:
            self.file.close()
            raise

    def release(self) -> None:
        """Give the lock back; may be called twice."""
        if not self.file.closed:
            self.path.unlink(missing_ok=True)  # while it is locked: nobody else's file can be hit
            self.file.close()

    def _take(self) -> None:
        """Open and lock the file; again if its last holder removed it in between."""
        while True:
            self.file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)
            if not _flock(self.file.fileno()):
                with self.file:
                    holder = _read(self.file)
                raise UserError(f"another run of this name is training: {_describe(holder)}. Wait for it, stop it, or choose "
                                "another --model-tag.")
            try:
                if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path)):
                    return
            except FileNotFoundError:
                pass
            self.file.close()

    def _replace_holder(self, run_dir: Path) -> None:
        before = _read(self.file)
        if before:
            quiet = _quiet(run_dir)
            if _is_elsewhere(before) and quiet < SILENCE:
                raise UserError(f"another run of this name may be training on another machine: {_describe(before)}; its last "
                                f"sign of life is {max(0, quiet) / 60:.0f} minutes old. If it has ended, delete {self.path}.")
            print0(f"recovered the lock of a run that ended without giving it back: {_describe(before)}")
        self.file.truncate(0)
        self.file.seek(0)
        self.file.write(json.dumps(_here()).encode())


def lock_path(run_dir: Path) -> Path:
    """The lock file of a run. It is there while the run trains, and after a process that was killed."""
    return run_dir.with_name(f".{run_dir.name}.lock")


def lock_holder(run_dir: Path) -> str | None:
    """Who trains in a run's folder, in words; None where nobody does, also where a process left its lock when it was killed.

    The lock file is not changed, but shared for some microseconds, to find out whether that is possible.
    """
    holder: dict = {}
    try:
        with open(lock_path(run_dir), "rb", buffering=0) as file:
            holder = _read(file)
            if fcntl:
                fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _describe(holder)
    except OSError:
        pass  # there is none, or it is somebody else's, or on a file system without locks
    return _describe(holder) if holder and _is_elsewhere(holder) and _quiet(run_dir) < SILENCE else None


def _is_elsewhere(holder: dict) -> bool:
    """Whether a holder is on another machine, whose locks do not always reach here."""
    here = _here()
    return holder.get("host") != here["host"] and holder.get("boot") != here["boot"]


def _quiet(run_dir: Path) -> float:
    """Seconds since the last sign of life of a run."""
    return time.time() - max(_modified(p) for p in (lock_path(run_dir), run_dir, run_dir / "metrics.jsonl"))


def _flock(fd: int) -> bool:
    """Whether the file could be locked. A file system without locks counts as locked: there is nothing to ask."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as e:
        print0(f"note: no lock here ({e.strerror}). Make sure that no other run uses this name")
    return True


def _here() -> dict:
    """This process, as a lock file names it. Containers of a machine share the boot, and its locks, under many host names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = platform.node()
    return {"pid": os.getpid(), "host": platform.node(), "boot": boot, "since": time.time()}


def _read(file) -> dict:
    """What a lock file says; nothing where it is empty or damaged."""
    try:
        holder = json.loads(file.read(4096))
        return holder if isinstance(holder, dict) else {}
    except ValueError:
        return {}


def _describe(holder: dict) -> str:
    if not isinstance(holder.get("since"), (int, float)):
        return "a process that did not say its name"
    since = datetime.fromtimestamp(holder["since"]).strftime("%Y-%m-%d %H:%M:%S")
    return f"process {holder.get('pid')} on {holder.get('host')}, since {since}"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
