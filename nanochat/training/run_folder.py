"""The folder of a run: who may begin in it, and what becomes of the run that was there. No torch.

Nothing trained is removed by a start. Where a folder holds weights, a new run of its name is refused: whoever typed the same
line twice rarely means to train again what is there, and an interrupted run is gone on with by --resume-from-step. Under
--overwrite the run that was there is renamed, and deleted only when the new one has written a checkpoint of its own; if it
never does, the old one gets its name back. Records of a run that has no weights are deleted. A folder with files that this
program does not write, such as those of the public nanochat, which uses the same names in the same place, is left alone.
"""

import json
import os
import re
import shutil
from pathlib import Path

from nanochat.checkpoint_names import is_part_of_checkpoint
from nanochat.cli.launch_environment import launch_id, restarts
from nanochat.cli.paths import list_steps
from nanochat.common import UserError, print0
from nanochat.runtime.files import set_aside, write_atomic

REPLACES = "replaces.txt"  # in a run under --overwrite, until it has weights: the name that the run before it has now
OWN = re.compile(r"(config|result|trackers|eval_\d+)\.json|metrics\.jsonl|loss\.png|report\.html|replaces\.txt|tokenizer|"
                 r"tensorboard|wandb|trackio|\..+\.tmp|\.DS_Store|Thumbs\.db|desktop\.ini")
# The last three are file managers' own.

CHECKPOINT = re.compile(r"step_\d+(~\d+)?|\.step_\d+\.(?P<change>writing|replaced|deleting)")


def foreign_files(folder: Path) -> list[str]:
    """Names in a run's folder that this program does not write."""
    return sorted(p.name for p in folder.glob("*") if not OWN.fullmatch(p.name) and not _is_checkpoint(p))


def _is_checkpoint(path: Path) -> bool:
    """Whether this is a folder as checkpoints have it, whole or not."""
    return bool(CHECKPOINT.fullmatch(path.name)) and path.is_dir() \
        and all(is_part_of_checkpoint(p.name) for p in path.iterdir())


def has_weights(folder: Path) -> bool:
    """Whether any weights lie in a run's folder: checkpoints, also those set aside, but for one that was only being written or
    deleted when its process was killed."""
    return any(found and found["change"] in (None, "replaced") and (path / "model.safetensors").exists()
               for path in folder.glob("*step_*") if (found := CHECKPOINT.fullmatch(path.name)))


def start_problem(folder: Path, overwrite: bool) -> str | None:
    """Why no new run may begin in `folder`, in words; None where one may."""
    if folder.exists() and not folder.is_dir():
        return f"{folder} is not a folder. Choose another --model-tag"
    if others := foreign_files(folder):
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        return f"{folder} holds files of another program ({names}), which are left alone. Choose another --model-tag"
    if has_weights(folder) and not overwrite:
        steps = list_steps(folder)
        trained = f"trained to step {steps[-1]}" if steps else "with checkpoints that were set aside"
        return (f"there is a run of this name, {trained}: {folder}. Go on with it (--resume-from-step=latest), choose another "
                "name (--model-tag=NAME), or replace it (--overwrite)")
    return None


def step_to_resume(folder: Path, wanted: str) -> str:
    """What --resume-from-step comes to for who holds the folder's lock: "-1" for a new run, a step, or "latest".

    With "auto" a run goes on from its last checkpoint if it has one: the same command starts it and, after a preemption, goes
    on. So does, whatever the flag, a run that torchrun has started again (--max-restarts) in a folder that it began itself.
    """
    again = restarts() > 0 and launch_id() and _launched_by(folder) == launch_id()
    if wanted != "auto" and not again:
        return wanted
    return "latest" if list_steps(folder) else "-1"


def _launched_by(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("launch")
    except (OSError, ValueError):
        return None


def begin(folder: Path, overwrite: bool) -> None:
    """Make `folder` ready for a new run; only for who holds its lock. UserError where it may not begin there."""
    restore_replaced(folder)
    if problem := start_problem(folder, overwrite):
        raise UserError(f"{problem}.")
    replaced = set_aside(folder) if has_weights(folder) else None
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():  # records of an attempt that has no weights
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if replaced:
        write_atomic(folder / REPLACES, replaced.name)
        print0(f"--overwrite: the run of this name is {replaced} until the new one has a checkpoint, and deleted then")


def delete_replaced(folder: Path) -> None:
    """Delete the run that this one replaces, now that it has weights of its own."""
    if replaced := _replaced(folder):
        shutil.rmtree(replaced, ignore_errors=True)
        (folder / REPLACES).unlink()


def restore_replaced(folder: Path) -> None:
    """Give the run that was to be replaced its name back, where the new one never came to have weights."""
    replaced = _replaced(folder)
    if not replaced or has_weights(folder) or foreign_files(folder):
        return
    shutil.rmtree(folder)
    os.rename(replaced, folder)
    print0(f"the run that was to be replaced is {folder} again: the new one has trained nothing")


def _replaced(folder: Path) -> Path | None:
    try:
        replaced = folder.with_name((folder / REPLACES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return replaced if re.fullmatch(re.escape(folder.name) + r"~\d+", replaced.name) and has_weights(replaced) else None
