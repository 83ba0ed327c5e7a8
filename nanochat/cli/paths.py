"""Where things lie, said once: paths that the user typed, the base directory, runs and their checkpoints. No torch.

A relative path is meant from where the user stands. A program that starts others from the root of the checkout (the runners,
the lab, the proof of resuming) tells them where that is in $NANOCHAT_CWD, which counts nowhere else than there.

What a record says of a place inside the base directory is relative to it (`portable`), so that a base directory that was
moved, copied to another machine or mounted elsewhere goes on working.
"""

import os
import re
import tempfile
from pathlib import Path

from nanochat.common import BASE, HERE, UserError, get_base_dir, is_main_rank, print0, resolve, user_dir

NOTED = ".home-nanochat"  # in the default base directory: that others use it too has been said


# ---- what the user typed

def portable_source(source: str) -> str:
    """A source of text (`--data`) as records keep it: one inside the base directory relative to that, others as typed."""
    if source == "python" or source.startswith("hf:"):
        return source
    inside = portable(resolve(source))
    return source if os.path.isabs(inside) else f"${BASE}/{inside}"


def output_problem(path: str | os.PathLike, make_folders: bool = False) -> str | None:
    """Why no file can be written at `path`, in words, found before the work that it is to hold; None where one can.

    make_folders: folders that are missing will be made, so that the nearest one that exists counts.
    """
    target = resolve(path)
    if target.is_dir():
        return f"{path} is a folder: name a file in it"
    if not target.parent.is_dir() and not make_folders:
        return f"{path}: there is no folder {target.parent}. Make it first, or choose another"
    if trouble := folder_problem(target.parent):
        return f"{path}: {trouble}"
    if target.exists() and not os.access(target, os.W_OK):
        return f"{path} cannot be written: it is protected. Choose another place"
    return None


def folder_problem(path: str | os.PathLike) -> str | None:
    """Why a folder cannot be made, or be written in if it is there, in words; None where it can."""
    target = resolve(path)
    nearest = next(place for place in (target, *target.parents) if place.exists())
    trouble = unwritable_reason(nearest)
    return trouble and f"{trouble}. Choose another place"


def unwritable_reason(folder: Path) -> str | None:
    """Why nothing can be written in a folder that exists, tried; None where it can."""
    try:
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as e:
        return f"cannot write in {folder} ({e.strerror})"
    return None


# ---- the base directory

def writable_base_dir() -> Path:
    """The base directory, for who is about to write there: UserError, before any work, where that is not possible.

    Once, in the default place: a line that the public nanochat uses it too.
    """
    base = get_base_dir()
    if trouble := unwritable_reason(base):
        raise UserError(f"{trouble}. Set {BASE} to a folder you can write to.")
    if is_main_rank() and not os.environ.get(BASE) and not (base / NOTED).exists():
        (base / NOTED).touch()
        print0(f"note: {base} is shared with the public nanochat: its runs and tokenizer lie there too, and stay as they are. "
               f"{BASE}=FOLDER keeps them apart")
    return base


def portable(path: Path) -> str:
    """A path for a record: relative to the base directory if it lies there, else absolute. `located` undoes it."""
    path, base = Path(path).absolute(), get_base_dir()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)


def located(record: str) -> Path:
    """The place that `portable` wrote down, from where the base directory is now."""
    return get_base_dir() / record


def child_environment(base: Path | None = None) -> dict[str, str]:
    """The environment of a program that is started from elsewhere: relative paths in its flags mean what they mean here.

    base: its base directory, by default this one.
    """
    return os.environ | {HERE: str(user_dir()), BASE: str(base or get_base_dir())}


# ---- runs and their checkpoints

def runs_dir() -> Path:
    return get_base_dir() / "base_checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:06d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint, ascending. Whether it is sound, `load_checkpoint` finds out."""
    matches = (re.fullmatch(r"step_(\d+)", p.name) for p in run_dir.glob("step_*"))
    return sorted(int(m[1]) for m in matches if m)


def list_tags(folder: Path, set_aside: bool = False) -> list[str]:
    """Runs that have a checkpoint, the most recently trained last; with `set_aside` also those whose name ends in ~1, ~2, ..."""
    runs = [p for p in folder.glob("*") if (set_aside or "~" not in p.name) and list_steps(p)]
    return [p.name for p in sorted(runs, key=lambda p: step_dir(p, list_steps(p)[-1]).stat().st_mtime)]


def main() -> None:
    """For the runners: where the base directory is."""
    print(get_base_dir())


if __name__ == "__main__":
    from nanochat.cli.program import cli
    cli(main)
