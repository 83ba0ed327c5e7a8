"""Reading and writing the files of one checkpoint: safetensors and JSON, every byte compared with its checksum.

An optimizer's state is read whole, however many ranks have written it. Each of their files holds the state of pieces: keys are
`NAME/SLOT` for a whole parameter and `NAME[a:b]/SLOT` for its rows a to b.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from nanochat.checkpoint_names import MANIFEST, MODEL, STATE, complete_optimizer_names
from nanochat.runtime.files import check_file, read_json, read_sealed

SCHEMA_VERSION = 2
ROWS = re.compile(r"(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]/(?P<slot>[^/]+)")
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
                      torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
                      torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


def total_bytes(tensors: dict) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def safetensors_blocks(tensors: dict) -> Iterator[bytes | memoryview]:
    """A safetensors file of these tensors in parts, none of them held in memory twice.

    The format (github.com/huggingface/safetensors): the header's length as 8 bytes, the header in JSON, the data. Wide
    dtypes come first, so that every tensor begins at a multiple of its element size.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, at = {}, 0
    for name in names:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": SAFETENSORS_DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        yield memoryview(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def read_checkpoint(folder: Path, step: int, with_optimizer: bool) -> tuple[dict, dict, dict]:
    """Model tensors, optimizer tensors (empty without) and state from a checkpoint's folder.

    Raises: ValueError, OSError, KeyError or TypeError where it is damaged.
    """
    files = read_sealed(folder / MANIFEST, SCHEMA_VERSION)["files"]
    shards = complete_optimizer_names(files) if with_optimizer else []
    if shards and not any((folder / name).exists() for name in shards):
        raise ValueError(f"{shards[0]} is missing, as after `scripts.runs gc`; its weights are there")
    for name in (STATE, MODEL, *shards):
        check_file(folder / name, files[name])
    state = read_json(folder / STATE)
    if state["step"] != step:
        raise ValueError(f"{STATE} is of step {state['step']}")
    weights = load_tensors(folder / MODEL)
    return weights, merge_shards([folder / name for name in shards], weights), state


def load_tensors(path: Path) -> dict:
    """The tensors of a safetensors file. ValueError, which names the file, where it is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path.name}: {e}") from None


def merge_shards(paths: list[Path], weights: dict) -> dict:
    """`NAME/SLOT` -> state of the whole parameter, from files that hold pieces of it.

    weights: name -> parameter, for its number of rows. One file is in memory beside the result.
    Raises: ValueError where rows are missing or there twice.
    """
    merged, rows = {}, {}  # rows: key -> rows of each of its pieces, where it is in pieces
    for path in paths:
        for key, tensor in load_tensors(path).items():
            piece = ROWS.fullmatch(key)
            if not piece:
                if key in merged:
                    raise ValueError(f"{path.name} holds {key}, which is in another file, too")
                merged[key] = tensor
                continue
            key, start, stop = f"{piece['name']}/{piece['slot']}", int(piece["start"]), int(piece["stop"])
            if key not in rows:
                if key in merged or piece["name"] not in weights:
                    raise ValueError(f"{path.name} holds rows of {key}, which " +
                                     ("is in another file, too" if key in merged else "is no parameter of the model"))
                # a number that all pieces share, the count of steps, or as many rows as the parameter
                merged[key] = tensor.new_empty((len(weights[piece["name"]]), *tensor.shape[1:])) if tensor.dim() else tensor
            rows.setdefault(key, []).append((start, stop))
            _place(tensor, merged[key], start, stop, f"{path.name}: rows {start} to {stop} of {key}")
    for key, found in rows.items():
        end = 0
        for start, stop in sorted(found):
            if start != end:
                raise ValueError(f"rows {min(start, end)} to {max(start, end)} of {key} are " +
                                 ("missing" if start > end else "there twice"))
            end = stop
        if end != (expected := len(weights[key.rpartition("/")[0]])):
            raise ValueError(f"rows {end} to {expected} of {key} are missing")
    return merged


def _place(piece: torch.Tensor, whole: torch.Tensor, start: int, stop: int, what: str) -> None:
    """Copy rows to where they belong; a number must be the same in all pieces."""
    place = whole[start:stop] if whole.dim() else whole
    if start > stop or piece.shape != place.shape or piece.dtype != place.dtype or (whole.dim() and stop > len(whole)):
        raise ValueError(f"{what} have the shape {tuple(piece.shape)} and dtype {piece.dtype}, which do not fit")
    if whole.dim():
        place.copy_(piece)
    elif piece != whole:
        raise ValueError(f"{what} say {piece.item()}, and others {whole.item()}")
