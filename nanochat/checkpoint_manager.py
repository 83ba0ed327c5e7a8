"""Checkpoints: one folder per step, whole or not there at all, safe to load from anyone.

    step_000600/
      model.safetensors       weights under the model's own names
      optimizer.safetensors   optimizer state under <parameter name>/<key>; of N ranks each writes its own part instead, into
                              optimizer-00001-of-0000N.safetensors, ..., and rows a to b of a table are <name>[a:b]/<key>
      state.json              step, shape, flags, clocks, generators, feature states: everything else that decides the future
      manifest.json           size and SHA-256 of these, and of itself

Where the text stands is not among it: a batch is a function of (seed, step, rank), see nanochat/dataloader.py. Nothing is
pickled: a checkpoint can hold numbers and JSON, not code. However many ranks have saved it, any number can go on with it.

How it is written is in nanochat/checkpoint_writer.py, by several ranks in checkpoint_shards.py; what is in the files, in
checkpoint_files.py. Other modules find all of it here.
"""

import re
from dataclasses import asdict, fields
from pathlib import Path

import torch

from nanochat.checkpoint_files import SAFETENSORS_DTYPES, read_checkpoint, safetensors_blocks, total_bytes
from nanochat.checkpoint_names import MANIFEST, MODEL, OPTIMIZER, STATE
from nanochat.checkpoint_shards import SharedSaves
from nanochat.checkpoint_writer import (
    CheckpointWriter,
    archive_later_checkpoints,
    delete_old,
    free_bytes,
    recover_interrupted_writes,
    retire,
    save_checkpoint,
)
from nanochat.cli.paths import list_steps, list_tags, runs_dir, step_dir
from nanochat.common import UserError, print0
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.distributed import all_reduce_sum

__all__ = ["MANIFEST", "MODEL", "OPTIMIZER", "SAFETENSORS_DTYPES", "STATE", "CheckpointWriter", "SharedSaves",
           "archive_later_checkpoints", "build_model", "check_disk_space", "check_tokenizer", "check_weights", "checkpoint_bytes",
           "delete_old", "empty_model", "free_bytes", "list_steps", "list_tags", "load_checkpoint", "load_model", "load_weights",
           "recover_interrupted_writes", "retire", "runs_dir", "safetensors_blocks", "save_checkpoint", "saved_shape", "step_dir",
           "total_bytes"]
LARGEST_SIZE = 2**24  # of a model: beyond this a checkpoint is not believed
ROW_BYTES = 1024  # of metrics.jsonl, generously: what a step writes besides checkpoints


# ---- disk space

def checkpoint_bytes(model, optimizer) -> int:
    """About how many bytes a checkpoint will have, also before the optimizer has a state: moments are fp32, of which AdamW
    keeps two and Muon one. All ranks must ask: each knows its own part of the optimizer."""
    moments = sum(p.numel() * 4 * (2 if group["kind"] == "adamw" else 1)
                  for group in optimizer.param_groups for p in group["params"])
    device = next(iter(model.state_dict().values())).device
    return total_bytes(model.state_dict()) + int(all_reduce_sum(torch.tensor(moments, device=device)))


def check_disk_space(run_dir: Path, one: int, count: int, rows: int) -> None:
    """Before training: UserError where not even one of `count` checkpoints of `one` byte each fits beside `rows` of metrics;
    a note where fewer than two do, or fewer than will be written."""
    fit = (free_bytes(run_dir) - rows * ROW_BYTES) // max(one, 1)
    where = f"a checkpoint has {one:,} bytes, and {free_bytes(run_dir):,} are free in {run_dir}"
    if fit < 1:
        raise UserError(f"no room for a checkpoint: {where}. Make room, or set NANOCHAT_BASE_DIR to another disk.")
    if fit < max(2, count):
        print0(f"note: {where}: room for {fit}, where the run writes {count}"
               + (". --keep-last deletes old ones" if count > 2 else ""))


# ---- reading

def load_checkpoint(run_dir: Path, step: int | str, with_optimizer: bool = True) -> tuple[dict, dict, dict]:
    """Model tensors, optimizer tensors (empty without) and state (its "step" among it), on the host, checksums compared.

    step: a number, or "latest" for the newest that is sound; those skipped are printed, with the reason. UserError that
    names the damaged file, or the steps that there are.
    """
    steps = list_steps(run_dir)
    if not steps:
        tags = ", ".join(list_tags(run_dir.parent, set_aside=True))
        raise UserError(f"no checkpoint in {run_dir}. Train one first, or name the run with --model-tag"
                        + (f" (there are: {tags})." if tags else "."))
    if step != "latest" and int(step) not in steps:
        raise UserError(f"no checkpoint of step {step} in {run_dir}. There are: {', '.join(map(str, steps))}.")
    for candidate in reversed(steps) if step == "latest" else [int(step)]:
        folder = step_dir(run_dir, candidate)
        try:
            return read_checkpoint(folder, candidate, with_optimizer)
        except (OSError, ValueError, KeyError, TypeError) as e:
            reason = getattr(e, "strerror", None) or e
        if step == "latest":
            print0(f"skipping {folder}, which is damaged: {reason}")
    others = "none of this run is sound" if step == "latest" else ", ".join(str(s) for s in steps if s != int(step))
    raise UserError(f"checkpoint {folder} is damaged ({reason}). Take another step of this run: {others or 'there is none'}.")


def load_model(source: str, device, phase: str, model_tag: str | None = None, step: int | None = None,
               dtype: str = "auto"):
    """A trained model on `device`, its tokenizer, and the checkpoint's state (step, model_config, user_config, tokens, ...).

    source: "base". phase: "train" or "eval". model_tag and step: by default the run trained last, and its last step.
    """
    from nanochat.runtime.compute_dtype import pick_compute_dtype
    from nanochat.tokenizer import get_tokenizer
    assert source == "base" and phase in ("train", "eval"), (source, phase)
    folder = runs_dir()
    if model_tag is None:
        tags = list_tags(folder)
        if not tags:
            raise UserError(f"no trained model in {folder}. Train one first: python -m scripts.base_train --help")
        model_tag = tags[-1]
    run_dir = folder / model_tag
    tensors, _, state = load_checkpoint(run_dir, "latest" if step is None else step, with_optimizer=False)
    shape, compute_dtype = saved_shape(state, run_dir), pick_compute_dtype(device, dtype)[0]
    if shape.n_layer <= len(tensors):  # or it would take long even to make an empty one
        check_weights(empty_model(shape, compute_dtype), tensors, run_dir)
    model = build_model(shape, compute_dtype, device)
    load_weights(model, tensors, run_dir)
    model.train(phase == "train")
    tokenizer = get_tokenizer(run_dir / "tokenizer")
    check_tokenizer(tokenizer, state, run_dir)
    return model, tokenizer, state | {"model_tag": model_tag}


def saved_shape(state: dict, run_dir: Path) -> GPTConfig:
    """The shape that a checkpoint says its model has. UserError where that is no shape of a model."""
    try:
        shape = GPTConfig(**state["model_config"])
        values = asdict(shape)
        if any(type(values[f.name]) is not type(f.default) for f in fields(shape)):
            raise ValueError("values of another type")
        taps, _ = values.pop("short_conv"), values.pop("exclusive_attention")  # 0: none
        if not all(1 <= value <= LARGEST_SIZE for value in values.values() if isinstance(value, int)):
            raise ValueError(f"sizes go from 1 to {LARGEST_SIZE:,}")
        if taps and not 2 <= taps <= LARGEST_SIZE:
            raise ValueError("a short convolution sees at least 2 tokens")
        if shape.n_embd % shape.n_head or shape.n_head % shape.n_kv_head or not re.fullmatch("[SLsl]+", shape.window_pattern):
            raise ValueError("its parts do not fit together")
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"the checkpoint in {run_dir} does not say what its model is like "
                        f"({type(e).__name__}: {e}; {state.get('model_config')}).") from None
    return shape


def empty_model(shape: GPTConfig, compute_dtype):
    """A GPT of this shape that takes no memory: on the device `meta`."""
    from nanochat.gpt import GPT
    with torch.device("meta"):
        return GPT(shape, compute_dtype)


def build_model(shape: GPTConfig, compute_dtype, device):
    """A GPT of this shape, initialized on `device` from torch's global generator."""
    model = empty_model(shape, compute_dtype)
    model.to_empty(device=device)
    model.init_weights()
    return model


def check_weights(model, tensors: dict, run_dir: Path) -> None:
    """UserError unless these are weights of this model, by name and shape."""
    own = model.state_dict()
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise UserError(f"the checkpoint in {run_dir} holds a model of another shape than the flags ask for. "
                        f"Give the flags it was trained with (see {run_dir / 'config.json'}).")


def load_weights(model, tensors: dict, run_dir: Path) -> None:
    """Copy a checkpoint's weights into the model, cast to its dtypes. UserError where the shapes differ."""
    check_weights(model, tensors, run_dir)
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def check_tokenizer(tokenizer, state: dict, run_dir: Path) -> None:
    """UserError where a checkpoint was trained with another vocabulary than `tokenizer`'s."""
    if state.get("tokenizer") != tokenizer.fingerprint():
        raise UserError(
            f"the checkpoint in {run_dir} was trained with another vocabulary ({state['model_config']['vocab_size']} tokens, "
            f"{str(state.get('tokenizer'))[:12]}) than the tokenizer at hand ({tokenizer.get_vocab_size()} tokens, "
            f"{tokenizer.fingerprint()[:12]}). Put {run_dir / 'tokenizer'} in its place, or start a run with another "
            "--model-tag.")
