"""All of a model in one safetensors file: weights as they are in the checkpoint, and in the header's metadata its shape, its
tokenizer and where it comes from. Any program that reads safetensors can read the weights; `read_file` reads all of it."""

import json
import os
import tempfile
from itertools import chain
from pathlib import Path

from nanochat.checkpoint_manager import safetensors_blocks
from nanochat.common import UserError
from nanochat.export.trained import Trained, checked_shape
from nanochat.runtime.files import write_hashed
from nanochat.tokenizer import FILE_NAME, Tokenizer

PROGRAM, VERSION = "nanochat-home", "1"


def write_file(trained: Trained, path: Path) -> None:
    """Write the file as a whole or not at all. Raises: UserError where the disk does not take it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = trained.tokenizer.save(folder).read_text(encoding="utf-8")
    metadata = {"format": "pt", "program": PROGRAM, "version": VERSION, "model_config": json.dumps(vars(trained.shape)),
                "source_run": trained.name, "step": str(trained.step), "val_bpb": json.dumps(trained.val_bpb),
                "flags": json.dumps(trained.flags), "tokens_per_step": json.dumps(trained.tokens_per_step),
                "tokenizer": json.dumps(json.loads(tokenizer))}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_safetensors(trained.weights, metadata, temporary)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"could not write {path}: {e.strerror or e}. Make room, or choose another place.") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(tensors: dict, metadata: dict[str, str], path: Path) -> None:
    """Write tensors and metadata, by the checkpoints' own writer."""
    blocks = safetensors_blocks(tensors)
    next(blocks)  # the length of the header without metadata
    header = json.dumps({"__metadata__": metadata} | json.loads(next(blocks))).encode()
    header += b" " * (-len(header) % 8)
    write_hashed(path, chain([len(header).to_bytes(8, "little"), header], blocks))


def read_file(path: Path) -> Trained:
    """What `write_file` wrote. Raises: UserError where the file is missing, damaged, or has other content."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as e:
        raise UserError(f"{path} cannot be read as a safetensors file ({e}).") from None
    if (metadata.get("program"), metadata.get("version")) != (PROGRAM, VERSION):
        raise UserError(f"{path} is no file that `scripts.export --to safetensors` has written: its metadata does not say so.")
    try:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, FILE_NAME).write_text(metadata["tokenizer"], encoding="utf-8")
            tokenizer = Tokenizer.from_directory(folder)
        known = {name: json.loads(metadata[name]) for name in ("model_config", "val_bpb", "flags", "tokens_per_step", "step")}
    except (KeyError, ValueError) as e:
        raise UserError(f"the metadata of {path} is damaged ({type(e).__name__}: {e}).") from None
    return Trained(metadata.get("source_run", path.stem), known["step"], checked_shape(known, weights, path), weights, tokenizer,
                   known["flags"], known["val_bpb"], known["tokens_per_step"])
