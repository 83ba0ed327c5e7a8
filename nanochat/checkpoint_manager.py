"""Checkpoints: one folder per step, whole or not there at all, safe to load from anyone.

    step_000600/
      model.safetensors       weights under the model's own names
      optimizer.safetensors   optimizer state under <parameter name>/<key>
      state.json              step, shape, flags, clocks, feature states: everything else that decides the future
      manifest.json           size and SHA-256 of the three, written last

The folder is written under another name, synced and renamed, so a crash leaves the old state or the new one. Nothing
is pickled: a checkpoint can hold numbers and JSON, not code.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from nanochat.common import UserError, get_base_dir
from nanochat.shape import GPTConfig

SCHEMA_VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


def runs_dir() -> Path:
    return get_base_dir() / "base_checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    return run_dir / f"step_{step:06d}"


def list_steps(run_dir: Path) -> list[int]:
    """Steps that have a finished checkpoint, ascending."""
    matches = (re.fullmatch(r"step_(\d+)", p.name) for p in run_dir.glob("step_*") if (p / MANIFEST).exists())
    return sorted(int(m[1]) for m in matches if m)


def resolve_step(run_dir: Path, wanted: str | int) -> int:
    """The step that `wanted` means: a number or 'latest'. UserError, naming those there are, where it does not exist."""
    steps = list_steps(run_dir)
    if not steps:
        raise UserError(f"no checkpoint in {run_dir}. Train one first, or name the run with --model-tag"
                        f"{_other_runs(run_dir)}.")
    if wanted == "latest":
        return steps[-1]
    if int(wanted) not in steps:
        raise UserError(f"no checkpoint of step {wanted} in {run_dir}. There are: {', '.join(map(str, steps))}.")
    return int(wanted)


def _other_runs(run_dir: Path) -> str:
    tags = list_tags(run_dir.parent)
    return f" (there are: {', '.join(tags)})" if tags else ""


def list_tags(folder: Path) -> list[str]:
    """Runs that have a checkpoint, the most recently trained last."""
    runs = [p for p in folder.glob("*") if not p.name.endswith("~") and list_steps(p)]
    return [p.name for p in sorted(runs, key=lambda p: step_dir(p, list_steps(p)[-1]).stat().st_mtime)]


def save_checkpoint(run_dir: Path, step: int, model_tensors: dict, optimizer_tensors: dict, state: dict) -> Path:
    """Write the checkpoint of `step` and return its folder. UserError where the disk does not take it."""
    from safetensors.torch import save_file
    target = step_dir(run_dir, step)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(_on_host(model_tensors), temporary / MODEL)
        save_file(_on_host(optimizer_tensors), temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(state | {"schema_version": SCHEMA_VERSION, "step": step}, indent=1))
        files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)}
                 for name in (MODEL, OPTIMIZER, STATE)}
        (temporary / MANIFEST).write_text(json.dumps({"schema_version": SCHEMA_VERSION, "files": files}, indent=1))
        for path in temporary.iterdir():
            _fsync(path)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(temporary, target)
        _fsync(run_dir)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(t.numel() * t.element_size() for t in [*model_tensors.values(), *optimizer_tensors.values()])
        raise UserError(f"could not save a checkpoint in {run_dir}: {e.strerror or e}. It needs {needed / 2**20:.0f} MiB; "
                        "make room and resume, earlier checkpoints are as they were.") from e
    return target


def load_checkpoint(run_dir: Path, step: int, with_optimizer: bool = True) -> tuple[dict, dict, dict]:
    """Model tensors, optimizer tensors (empty without) and state, on the host. UserError naming a damaged file."""
    from safetensors.torch import load_file
    folder = step_dir(run_dir, step)
    wanted = (MODEL, STATE, OPTIMIZER) if with_optimizer else (MODEL, STATE)
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        for name in wanted:
            _check_file(folder / name, files[name])
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"checkpoint {folder} is damaged ({e}). Take another step of this run: "
                        f"{', '.join(str(s) for s in list_steps(run_dir) if s != step) or 'there is none'}.") from None
    return load_file(folder / MODEL), load_file(folder / OPTIMIZER) if with_optimizer else {}, state


def load_model(source: str, device, phase: str, model_tag: str | None = None, step: int | None = None,
               dtype: str = "auto"):
    """A trained model on `device`, its tokenizer, and the checkpoint's state (step, model_config, user_config, tokens, ...).

    source: "base". phase: "train" or "eval". model_tag and step: by default the run trained last, and its last step.
    """
    from nanochat.device import pick_compute_dtype
    from nanochat.tokenizer import get_tokenizer
    assert source == "base" and phase in ("train", "eval"), (source, phase)
    folder = runs_dir()
    if model_tag is None:
        tags = list_tags(folder)
        if not tags:
            raise UserError(f"no trained model in {folder}. Train one first: python -m scripts.base_train --help")
        model_tag = tags[-1]
    run_dir = folder / model_tag
    step = resolve_step(run_dir, "latest" if step is None else step)
    tensors, _, state = load_checkpoint(run_dir, step, with_optimizer=False)
    model = build_model(GPTConfig(**state["model_config"]), pick_compute_dtype(device, dtype)[0], device)
    load_weights(model, tensors, run_dir)
    model.train(phase == "train")
    tokenizer = get_tokenizer(run_dir / "tokenizer")
    check_tokenizer(tokenizer, state, run_dir)
    return model, tokenizer, state | {"model_tag": model_tag}


def build_model(shape: GPTConfig, compute_dtype, device):
    """A GPT of this shape, initialized on `device` from torch's global generator."""
    import torch
    from nanochat.gpt import GPT
    with torch.device("meta"):
        model = GPT(shape, compute_dtype)
    model.to_empty(device=device)
    model.init_weights()
    return model


def load_weights(model, tensors: dict, run_dir: Path) -> None:
    """Copy a checkpoint's weights into the model, cast to its dtypes. UserError where the shapes differ."""
    import torch
    own = model.state_dict()
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise UserError(f"the checkpoint in {run_dir} holds a model of another shape than the flags ask for. "
                        f"Give the flags it was trained with (see {run_dir / 'config.json'}).")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def check_tokenizer(tokenizer, state: dict, run_dir: Path) -> None:
    """UserError where a checkpoint was trained with another vocabulary than `tokenizer`'s."""
    if state["tokenizer"] != tokenizer.fingerprint():
        raise UserError(
            f"the checkpoint in {run_dir} was trained with another vocabulary ({state['model_config']['vocab_size']} tokens, "
            f"{state['tokenizer'][:12]}) than the tokenizer at hand ({tokenizer.get_vocab_size()} tokens, "
            f"{tokenizer.fingerprint()[:12]}). Put {run_dir / 'tokenizer'} in its place, or start a run with another --model-tag.")


def _on_host(tensors: dict) -> dict:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _check_file(path: Path, expected: dict) -> None:
    if not path.exists():
        raise ValueError(f"{path.name} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
    if _sha256(path) != expected["sha256"]:
        raise ValueError(f"{path.name} does not match its checksum")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
