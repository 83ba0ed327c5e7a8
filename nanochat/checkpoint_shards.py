"""How the ranks of a run write one checkpoint together, each its own part of the optimizer's state, beside training.

The threads that write take no part in collectives, which belong to training, but meet in files:

    .NAME.saving                        beside the run's folder: which save is under way. Rank 0 writes it
    .step_000600.writing/               the checkpoint, until all of it is there
      optimizer-00002-of-00004.safetensors.ATTEMPT.part     a rank's part, named for this save alone
      optimizer-00002-of-00004.safetensors.ATTEMPT.told     made empty by rank 0; its rank writes size and checksum into it when
                                                            the part is synced, or why it could not be written

All ranks save at the same steps, so they number their saves alike, and together with an id of the run's start this names an
attempt: nothing that an earlier one has left, or a process of it that still lives, is taken for a part of this one. Files that
are read again and again exist from the beginning: a network file system may hide a new file for a minute, but shows what is in
one that is opened.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from nanochat.checkpoint_names import optimizer_name, saving_path
from nanochat.common import UserError, format_duration
from nanochat.runtime.files import read_json, write_atomic, write_hashed

PATIENCE = 180.0   # seconds without a sign of life, after which another rank is not waited for
IN_TROUBLE = 60.0  # the same after an error that the other ranks may not have met: they then save nothing
GONE = 4.0         # the same where one is known to be gone: the launcher ends the others within some seconds
POLL = 0.05        # seconds
SHARED = "All nodes must share the base directory"


class RankFailed(Exception):
    """Another rank has not written its part."""


class RankMissing(RankFailed):
    """Nothing came from it."""


class SharedSaves:
    """One rank's side of the saves of a run.

    launch: hexadecimal digits, the same on all ranks, others at each start of the run. Rank 0 must be constructed first.
    patience: seconds without a sign of life, after which another rank is not waited for; a save under way heeds a change.
    Raises: UserError where the ranks do not share a folder.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, launch: str):
        self.path, self.rank, self.world_size, self.launch = saving_path(run_dir), rank, world_size, launch
        self.number = 0  # of the save, from 1
        self.others = 0  # bytes of the other ranks' parts, as far as they have told in this save or the one before
        self.patience = PATIENCE
        self.seen: dict = {}
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._announce(is_open=False)
        elif not self._wait_for(lambda: self._announced().get("launch") == launch):
            raise UserError(f"cannot see {self.path}, which rank 0 has just written. {SHARED}: set NANOCHAT_BASE_DIR to a folder "
                            "on a file system that all of them mount.")

    def next(self) -> None:
        """The save that begins now, on every rank."""
        self.number += 1

    # ---- rank 0

    def begin(self, folder: Path) -> None:
        """Let the others write their parts into `folder`."""
        for rank in range(1, self.world_size):
            self._file(folder, rank, "told").touch()
        self._announce(is_open=True)

    def collect(self, folder: Path) -> dict[str, dict]:
        """Wait for the other ranks' parts; manifest entries by name. Raises: RankFailed."""
        told, waiting = {}, set(range(1, self.world_size))

        def look() -> bool:
            for rank in sorted(waiting):
                with suppress(ValueError):  # nothing yet, or not all of it
                    told[rank] = read_json(self._file(folder, rank, "told"))
                    waiting.remove(rank)
                    if reason := told[rank].pop("failed", None):
                        self.others = max(self.others, sum(report["bytes"] for report in told.values()))
                        raise RankFailed(f"rank {rank}: {reason}")
            return not waiting

        if not self._wait_for(look, folder):
            ranks = f"rank{'s' * (len(waiting) > 1)} {', '.join(map(str, sorted(waiting)))}"
            raise RankMissing(f"nothing came from {ranks} in {format_duration(self.patience)}")
        files, self.others = {}, sum(report["bytes"] for report in told.values())
        for rank in range(1, self.world_size):
            name = optimizer_name(rank, self.world_size)
            os.rename(self._file(folder, rank, "part"), folder / name)
            self._file(folder, rank, "told").unlink()
            files[name] = told[rank]
        return files

    def end(self) -> None:
        """Tell the others that the checkpoint is there, or given up."""
        with suppress(OSError):  # they lose patience
            self._announce(is_open=False)

    def close(self) -> None:
        """There will be no other save."""
        if self.rank == 0:
            self.path.unlink(missing_ok=True)

    # ---- the other ranks

    def contribute(self, folder: Path, blocks: Iterable, size: int, free: Callable[[], int]) -> None:
        """Write this rank's part, of about `size` bytes, and wait until rank 0 is done with the checkpoint.

        free: free bytes of the disk. A failure is reported to rank 0, which tells it.
        """
        if not self._wait_for(lambda: self._phase() != "before") or self._phase() == "over":
            return
        part, told = (self._file(folder, self.rank, kind) for kind in ("part", "told"))
        try:
            if free() < size:
                raise OSError("there is no room")
            report = write_hashed(part, blocks)
        except Exception as e:
            with suppress(OSError):
                part.unlink()  # also makes room for the report
            report = {"bytes": size, "failed": getattr(e, "strerror", None) or str(e) or repr(e)}
        with suppress(OSError):  # rank 0 has given up and deleted the folder
            with open(told, "r+", encoding="utf-8") as file:
                json.dump(report, file)
                file.flush()
                os.fsync(file.fileno())
        self._wait_for(lambda: self._phase() == "over", folder)
        for path in (part, told):  # of a folder that was deleted while this rank wrote
            with suppress(OSError):
                path.unlink()

    def _phase(self) -> str:
        """How this save stands: `before`, `open` or `over`."""
        announced = self._announced()
        if announced.get("launch") != self.launch or announced["number"] > self.number:
            return "over"  # the run has ended, or been started again
        if announced["number"] < self.number:
            return "before"
        return "open" if announced["open"] else "over"

    def _announce(self, is_open: bool) -> None:
        write_atomic(self.path, json.dumps({"launch": self.launch, "number": self.number, "open": is_open}))

    def _announced(self) -> dict:
        """What rank 0 has announced last; {} where it has taken that back, as its run has ended."""
        try:
            self.seen = read_json(self.path)
        except ValueError:
            self.seen = {}
        except OSError:
            pass  # a network's trouble, which may pass
        return self.seen

    def _file(self, folder: Path, rank: int, kind: str) -> Path:
        return folder / f"{optimizer_name(rank, self.world_size)}.{self.launch}-{self.number}.{kind}"

    def _wait_for(self, ready: Callable[[], bool], folder: Path | None = None) -> bool:
        """Wait until `ready`; False where it is not, and nothing has changed in `folder`, for `patience`."""
        seen, since = None, time.monotonic()
        while not ready():
            if folder and (now := _sizes(folder)) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > self.patience:
                return False
            time.sleep(POLL)
        return True


def _sizes(folder: Path) -> dict[str, int]:
    """Sizes of the files in a folder; {} where it is gone."""
    try:
        return {path.name: path.stat().st_size for path in folder.iterdir()}
    except OSError:
        return {}
