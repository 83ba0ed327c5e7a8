"""Names of the files of a checkpoint. No torch.

One process writes the optimizer's state into `optimizer.safetensors`. Of N ranks, each writes its own part (a shard) into
`optimizer-00001-of-0000N.safetensors`, and so on.
"""

import re
from collections.abc import Iterable
from pathlib import Path

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
SHARD = re.compile(r"optimizer-(\d{5})-of-(\d{5})\.safetensors")
WRITING = re.compile(r"(?P<name>.+)\.[0-9a-f]+-\d+\.(part|told)")  # of a rank in a save under way, see checkpoint_shards.py


def optimizer_name(rank: int, world_size: int) -> str:
    """The file that a rank writes its part of the optimizer's state into."""
    return OPTIMIZER if world_size == 1 else f"optimizer-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def optimizer_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that hold optimizer state, in the order of the ranks."""
    return sorted(name for name in names if name == OPTIMIZER or SHARD.fullmatch(name))


def complete_optimizer_names(names: Iterable[str]) -> list[str]:
    """`optimizer_names`. ValueError where these are not all that one save has written."""
    found = optimizer_names(names)
    shard = SHARD.fullmatch(found[0]) if found else None
    world_size = int(shard[2]) if shard else 1
    if len(found) != world_size or any(optimizer_name(rank, world_size) not in found for rank in range(world_size)):
        raise ValueError(f"its files of optimizer state are not those of one save ({', '.join(found[:3]) or 'none'})")
    return found


def optimizer_files(checkpoint: Path) -> list[Path]:
    """The files of optimizer state in a checkpoint's folder, in the order of the ranks; none where only weights were kept."""
    return [checkpoint / name for name in optimizer_names(path.name for path in checkpoint.glob("optimizer*.safetensors"))]


def saving_path(run_dir: Path) -> Path:
    """Where rank 0 of several tells the others which save is under way."""
    return run_dir.with_name(f".{run_dir.name}.saving")


def remove_saving_file(run_dir: Path) -> None:
    """Remove it, and what a kill in the midst of writing it has left. Only for who holds the run's lock."""
    path = saving_path(run_dir)
    for leftover in (path, *path.parent.glob(f".{path.name}.*.tmp")):
        leftover.unlink(missing_ok=True)


def is_part_of_checkpoint(name: str) -> bool:
    """Whether a file in a checkpoint's folder has one of our names, those of a save under way among them."""
    if writing := WRITING.fullmatch(name):
        name = writing["name"]
    return name in (MODEL, STATE, MANIFEST) or bool(optimizer_names([name]))
