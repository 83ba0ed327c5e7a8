"""What can be deleted: a run as a whole, or parts of runs that nothing depends on. torch is loaded only to repair a folder.

Everything here is done by who holds the run's lock, so that nothing of a run that trains is touched.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_names import complete_optimizer_names, optimizer_files, remove_saving_file
from nanochat.cli.paths import runs_dir, step_dir
from nanochat.common import UserError, print0
from nanochat.runtime.files import check_file, read_json
from nanochat.runtime.lock import RunLock, lock_holder
from nanochat.training import run_folder
from nanochat.training.run_facts import best_checkpoint
from nanochat.training.run_index import FOREIGN, RUNNING, SET_ASIDE, StoredRun, folder_bytes, list_runs

DELETING = "~deleting"  # `.NAME~deleting` is a run that is being deleted, which `list_tags` does not take for one
OLD = 3600  # seconds after which the temporary file of a small record is taken for a leftover
LEFTOVERS = {  # `.step_N.KIND`: checkpoints that a save or a deletion has not finished
    "writing": "a save was cut short", "deleting": "a deletion was cut short",
    "replaced": "a save was cut short: put back if the new one is missing, kept if its weights differ, else deleted"}
OPTIMIZER_STATE, INTERRUPTED, PREDECESSOR = "optimizer state", "interrupted save", "replaced run"


@dataclass(frozen=True)
class Item:
    """Something that can go without loss, and why."""
    run: str
    kind: str
    path: Path
    why: str


# ---- a whole run

def delete_run(run: StoredRun) -> int:
    """Delete a run; returns its bytes. One that was to be replaced by it gets its name back. Raises: UserError where the run
    trains, or the folder is not this program's alone."""
    if problem := deletion_problem(run):
        raise UserError(problem)
    locks = [RunLock(run.folder)]
    try:
        if run.status == SET_ASIDE:
            locks.append(RunLock(run.folder.with_name(original_name(run.folder))))
        size, was_to_replace = run.size(), (run.folder / run_folder.REPLACES).exists()
        if was_to_replace:
            run_folder.restore_replaced(run.folder)
        if not was_to_replace or (run.folder / run_folder.REPLACES).exists():
            hidden = run.folder.with_name(f".{run.name}{DELETING}")
            shutil.rmtree(hidden, ignore_errors=True)
            os.rename(run.folder, hidden)  # from here on it does not look like a run
            shutil.rmtree(hidden)
            remove_saving_file(run.folder)  # of ranks that were killed
        return size
    except OSError as e:
        raise UserError(f"could not delete {run.folder}: {e.strerror or e}") from None
    finally:
        for lock in locks:
            lock.release()


def deletion_problem(run: StoredRun) -> str | None:
    """Why a run cannot be deleted, in words; None where it can."""
    if run.folder.is_symlink():
        return f"{run.folder} is a link to {os.path.realpath(run.folder)}: delete it by hand"
    if run.status == FOREIGN:
        names = ", ".join(run_folder.foreign_files(run.folder)[:3])
        return f"{run.folder} holds files of another program ({names}), which are left alone: delete it by hand"
    if run.holder:
        return f"{run.name} is training: {run.holder}. Stop it first"
    if run.status == SET_ASIDE and (holder := lock_holder(run.folder.with_name(original_name(run.folder)))):
        return f"{run.name} is kept for {original_name(run.folder)}, which is training: {holder}. Wait for it, or stop it first"
    return None


def original_name(folder: Path) -> str:
    """The name that a run had before --overwrite renamed it."""
    return folder.name.rpartition("~")[0]


# ---- parts of runs

def find_items() -> list[Item]:
    """All that can go without loss, of runs that do not train."""
    found = [Item(path.name[1:].removesuffix(DELETING), INTERRUPTED, path, "its deletion was cut short")
             for path in sorted(runs_dir().glob(f".*{DELETING}")) if path.is_dir()]
    for run in list_runs():
        if run.status not in (FOREIGN, RUNNING, SET_ASIDE):
            found += _items_of(run)
    return found


def _items_of(run: StoredRun) -> list[Item]:
    return [*_interrupted(run), *_predecessor(run), *_optimizer_states(run)]


def _interrupted(run: StoredRun) -> list[Item]:
    """What saves, deletions and small records that were cut short have left."""
    found = [Item(run.name, INTERRUPTED, path, why) for kind, why in LEFTOVERS.items()
             for path in sorted(run.folder.glob(f".step_*.{kind}"))]
    return found + [Item(run.name, INTERRUPTED, path, "a record was cut short") for path in sorted(run.folder.glob(".*.tmp"))
                    if path.is_file() and time.time() - path.stat().st_mtime > OLD]


def _predecessor(run: StoredRun) -> list[Item]:
    """The run that this one has replaced under --overwrite, where its process was killed before it could delete it."""
    try:
        replaced = run.folder.with_name((run.folder / run_folder.REPLACES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [Item(run.name, PREDECESSOR, replaced, f"--overwrite has replaced it: {run.name} has weights of its own")] \
        if original_name(replaced) == run.name and replaced.is_dir() and run_folder.has_weights(run.folder) else []


def _optimizer_states(run: StoredRun) -> list[Item]:
    """Optimizer states of a run that has ended as planned: of the checkpoints that it wrote, but for the best and the last.

    Their weights stay. None where it is not known which is the best, or where the best or the last is not whole.
    """
    best, own = best_checkpoint(run), run.state.get("own_steps")
    if run.status != "ok" or best is None or not isinstance(own, list):
        return []
    kept = {best, run.checkpoints[-1]}
    found = [Item(run.name, OPTIMIZER_STATE, path, "an older checkpoint of a run that has ended: its weights stay")
             for step in run.checkpoints if step in own and step not in kept
             for path in optimizer_files(step_dir(run.folder, step))]
    return found if found and all(is_whole(step_dir(run.folder, step), checksums=False) for step in kept) else []


def is_whole(checkpoint: Path, checksums: bool = True) -> bool:
    """Whether every file of a checkpoint is as its manifest says: of that size and, about a second per GB, with that checksum."""
    try:
        files = read_json(checkpoint / "manifest.json")["files"]
        for name, expected in files.items():
            if checksums:
                check_file(checkpoint / name, expected)
            elif (checkpoint / name).stat().st_size != expected["bytes"]:
                return False
        return bool(complete_optimizer_names(files))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def delete_items(found: list[Item]) -> int:
    """Delete what `find_items` has found and can still go; returns the bytes freed. A run that has begun to train meanwhile is
    left out, with a line."""
    freed = 0
    for name in dict.fromkeys(item.run for item in found):
        paths = {item.path for item in found if item.run == name}
        try:
            freed += _delete_of(runs_dir() / name, paths)
        except (UserError, OSError) as e:
            print0(f"{name} is left as it is: {e}")
    return freed


def _delete_of(folder: Path, wanted: set[Path]) -> int:
    """Delete what can go of the run in a folder, of `wanted`, holding its lock; returns the bytes freed."""
    lock = RunLock(folder)
    try:
        places = [folder, *(path for path in wanted if not path.is_relative_to(folder))]
        before = sum(map(bytes_of, places))
        hidden, run = folder.with_name(f".{folder.name}{DELETING}"), StoredRun(folder, is_ours=True)
        if hidden in wanted:
            shutil.rmtree(hidden)
        still = [item for item in _items_of(run) if item.path in wanted]
        kinds = {item.kind for item in still}
        if PREDECESSOR in kinds:
            run_folder.delete_replaced(folder)
        if INTERRUPTED in kinds:
            from nanochat.checkpoint_manager import recover_interrupted_writes  # loads torch
            recover_interrupted_writes(folder)
            for item in still:
                if item.path.suffix == ".tmp":
                    item.path.unlink(missing_ok=True)
        kept = {best_checkpoint(run) or 0, *run.checkpoints[-1:]}
        if OPTIMIZER_STATE in kinds and all(is_whole(step_dir(folder, step)) for step in kept):
            for item in still:
                if item.kind == OPTIMIZER_STATE:
                    item.path.unlink()
        return before - sum(map(bytes_of, places))
    finally:
        lock.release()


def bytes_of(path: Path) -> int:
    """Bytes of a file or of all files of a folder; 0 where it is gone."""
    try:
        return folder_bytes(path) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0
