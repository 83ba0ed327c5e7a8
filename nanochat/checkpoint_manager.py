"""Checkpoints: one folder per step, whole or not there at all, safe to load from anyone.

    step_000600/
      model.safetensors       weights under the model's own names
      optimizer.safetensors   optimizer state under <parameter name>/<key>
      state.json              step, shape, flags, clocks, generators, feature states: everything else that decides the future
      manifest.json           size and SHA-256 of the three, and of itself

Where the text stands is not among it: a batch is a function of (seed, step, rank), see nanochat/dataloader.py.

The folder is written under a hidden name, synced and renamed, so a crash leaves the old state or the new one; it is
deleted the other way round. One that a resumed run writes again replaces it only if the weights are the same, else the one that
was there is set aside as step_000600~1. Nothing is pickled: a checkpoint can hold numbers and JSON, not code.

`CheckpointWriter` writes beside training: a step waits only for the copy of its tensors to host memory.
"""

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import torch

from nanochat.cli.paths import list_steps, list_tags, runs_dir, step_dir
from nanochat.common import UserError, print0
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.files import check_file, read_json, read_sealed, seal, set_aside, sync_folder, write_hashed

SCHEMA_VERSION = 2
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
LARGEST_SIZE = 2**24  # of a model: beyond this a checkpoint is not believed
ROW_BYTES = 1024  # of metrics.jsonl, generously: what a step writes besides checkpoints


# ---- writing

def save_checkpoint(run_dir: Path, step: int, model_tensors: dict, optimizer_tensors: dict, state: dict) -> Path:
    """Write the checkpoint of `step`; returns its folder. UserError, with the bytes needed, where the disk does not take it."""
    target = step_dir(run_dir, step)
    writing, replaced = _hidden(target, "writing"), _hidden(target, "replaced")
    state = json.dumps(state | {"schema_version": SCHEMA_VERSION, "step": step}, indent=1).encode()
    needed = total_bytes(model_tensors) + total_bytes(optimizer_tensors) + len(state)
    try:
        shutil.rmtree(writing, ignore_errors=True)
        if free_bytes(run_dir) < needed:
            raise OSError("there is no room")
        writing.mkdir(parents=True)
        files = {MODEL: write_hashed(writing / MODEL, safetensors_blocks(model_tensors)),
                 OPTIMIZER: write_hashed(writing / OPTIMIZER, safetensors_blocks(optimizer_tensors)),
                 STATE: write_hashed(writing / STATE, [state])}
        write_hashed(writing / MANIFEST, [seal({"schema_version": SCHEMA_VERSION, "files": files}).encode()])
        sync_folder(writing)
        if target.exists():
            os.rename(target, replaced)
        os.rename(writing, target)
        sync_folder(run_dir)
        retire(replaced, target)
    except OSError as e:
        shutil.rmtree(writing, ignore_errors=True)
        raise UserError(f"could not save the checkpoint of step {step} in {run_dir}: {e.strerror or e}. It needs {needed:,} "
                        f"bytes, and {free_bytes(run_dir):,} are free. Make room; earlier checkpoints are as they were.") from e
    return target


def retire(replaced: Path, target: Path) -> None:
    """Delete the folder of a checkpoint that `target` replaces, if there is one, where the weights are the same; else keep it as
    target~1, target~2, ..."""
    if not replaced.exists():
        return
    if _weights_digest(replaced) == _weights_digest(target) is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        set_aside(replaced, target.name)


def _weights_digest(folder: Path) -> str | None:
    """The checksum of a checkpoint's weights by its manifest; None where that cannot be read."""
    try:
        return read_sealed(folder / MANIFEST, SCHEMA_VERSION)["files"][MODEL]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


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


SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
                      torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
                      torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


class CheckpointWriter:
    """Writes the checkpoints of a run beside its training, one at a time.

    `save` returns as soon as the tensors are copied to host memory; a second one waits for the first. The copies are
    kept for the next time, so this costs as much host memory as a checkpoint has bytes. A checkpoint that cannot be
    written is reported at once and training goes on, as stopping would save nothing: there is time to free disk space until
    the next one. If the last one could not be written, `close` raises its UserError.

    keep_last: how many of the run's own checkpoints to keep, besides the best by validation; -1 keeps all.
    report: takes a line of text.
    on_saved: called after each checkpoint that was written.
    own: steps of the checkpoints that the run has written so far, which only grow.
    """

    def __init__(self, run_dir: Path, keep_last: int = -1, report: Callable[[str], None] = print0,
                 on_saved: Callable[[], None] = lambda: None):
        self.run_dir, self.keep_last, self.report, self.on_saved = run_dir, keep_last, report, on_saved
        self.own: set[int] = set()
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.pending: Future | None = None
        self.error: UserError | None = None  # why the last checkpoint is not there
        self.host = {}                       # (file, tensor name) -> copy on the host

    def save(self, step: int, model_tensors: dict, optimizer_tensors: dict, state: dict, val_bpb: dict[int, float]) -> None:
        """Begin to write a checkpoint. `val_bpb`: bits per byte of the steps evaluated so far."""
        self.wait()
        self.own.add(step)
        state = state | {"own_steps": sorted(self.own)}
        copies = [{name: self._copy(file, name, t) for name, t in tensors.items()}
                  for file, tensors in ((MODEL, model_tensors), (OPTIMIZER, optimizer_tensors))]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies above were only begun
        self.pending = self.thread.submit(self._write, step, *copies, copy.deepcopy(state), dict(val_bpb))

    def wait(self) -> None:
        """Return when nothing is being written: what was saved is safe from whatever happens next."""
        if self.pending:
            pending, self.pending = self.pending, None
            self.error = pending.result()

    def close(self) -> None:
        """Wait, and end the thread. UserError where the last checkpoint could not be written."""
        self.wait()
        self.thread.shutdown()
        if self.error:
            raise self.error

    def _copy(self, file: str, name: str, tensor):
        host = self.host.get((file, name))
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = self.host[file, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor.detach(), non_blocking=True)

    def _write(self, step: int, model_tensors: dict, optimizer_tensors: dict, state: dict, val_bpb: dict) -> UserError | None:
        try:
            folder = save_checkpoint(self.run_dir, step, model_tensors, optimizer_tensors, state)
        except Exception as e:  # whatever it is, the weights are still there, and training can go on
            self.report(f"step {step} | {e}\nTraining goes on")
            return e if isinstance(e, UserError) else UserError(f"could not save the checkpoint of step {step}: {e!r}")
        self.report(f"step {step} | saved {folder}")
        try:
            self.on_saved()
            if self.keep_last > 0:
                delete_old(self.run_dir, step, self.keep_last, val_bpb, self.own)
        except OSError as e:
            self.report(f"an old checkpoint could not be deleted: {e}")


def delete_old(run_dir: Path, newest: int, keep_last: int, val_bpb: dict[int, float], own: set[int]) -> None:
    """Delete checkpoints of the run's `own` but for the last `keep_last` up to step `newest`, and of those evaluated the best.

    Later ones, of a future that a resume went back from, are not touched, nor any that the run has not written.
    """
    steps = [step for step in list_steps(run_dir) if step <= newest and step in own]
    evaluated = [step for step in steps if math.isfinite(val_bpb.get(step, math.inf))]
    best = min(evaluated, key=val_bpb.get, default=None)
    for step in steps[:-keep_last]:
        if step != best:
            hidden = _hidden(step_dir(run_dir, step), "deleting")
            os.rename(step_dir(run_dir, step), hidden)  # from here on it does not look like a checkpoint
            shutil.rmtree(hidden, ignore_errors=True)


def recover_interrupted_writes(run_dir: Path) -> None:
    """Undo or complete the writes of a process that was killed. Only for the process that holds the run's lock."""
    for hidden in run_dir.glob(".step_*.replaced"):
        target = run_dir / hidden.stem[1:]
        if target.exists():
            retire(hidden, target)
        else:
            os.rename(hidden, target)
    for kind in ("writing", "deleting"):
        for hidden in run_dir.glob(f".step_*.{kind}"):
            shutil.rmtree(hidden, ignore_errors=True)


def archive_later_checkpoints(run_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step` to NAME~1, NAME~2, ...: a resume with other flags trains other weights."""
    for later in (step_dir(run_dir, s) for s in list_steps(run_dir) if s > step):
        print0(f"{later.name} belongs to the run as it was: it is now {set_aside(later).name}")


# ---- disk space

def total_bytes(tensors: dict) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def checkpoint_bytes(model, optimizer) -> int:
    """About how many bytes a checkpoint will have, also before the optimizer has a state: moments are fp32, of which AdamW
    keeps two and Muon one."""
    moments = sum(p.numel() * 4 * (2 if group["kind"] == "adamw" else 1)
                  for group in optimizer.param_groups for p in group["params"])
    return total_bytes(model.state_dict()) + moments


def free_bytes(folder: Path) -> int:
    """Free bytes where `folder` is or will be."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


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
            return _read(folder, candidate, with_optimizer)
        except (OSError, ValueError, KeyError, TypeError) as e:
            reason = getattr(e, "strerror", None) or e
        if step == "latest":
            print0(f"skipping {folder}, which is damaged: {reason}")
    others = "none of this run is sound" if step == "latest" else ", ".join(str(s) for s in steps if s != int(step))
    raise UserError(f"checkpoint {folder} is damaged ({reason}). Take another step of this run: {others or 'there is none'}.")


def _read(folder: Path, step: int, with_optimizer: bool) -> tuple[dict, dict, dict]:
    files = read_sealed(folder / MANIFEST, SCHEMA_VERSION)["files"]
    tensor_files = [MODEL, OPTIMIZER] if with_optimizer else [MODEL]
    if with_optimizer and not (folder / OPTIMIZER).exists():
        raise ValueError(f"{OPTIMIZER} is missing, as after `scripts.runs gc`; its weights are there")
    for name in (STATE, *tensor_files):
        check_file(folder / name, files[name])
    state = read_json(folder / STATE)
    if state["step"] != step:
        raise ValueError(f"{STATE} is of step {state['step']}")
    return *[_load_tensors(folder / name) for name in tensor_files], *([] if with_optimizer else [{}]), state


def _load_tensors(path: Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as e:
        raise ValueError(f"{path.name}: {e}") from None


def load_model(source: str, device, phase: str, model_tag: str | None = None, step: int | None = None,
               dtype: str = "auto"):
    """A trained model on `device`, its tokenizer, and the checkpoint's state (step, model_config, user_config, tokens, ...).

    source: "base". phase: "train" or "eval". model_tag and step: by default the run trained last, and its last step.
    """
    from nanochat.runtime.device import pick_compute_dtype
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
        taps = values.pop("short_conv")  # 0: none
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


def _hidden(target: Path, kind: str) -> Path:
    """A name beside a checkpoint's that no reader takes for one: .step_000600.writing"""
    return target.with_name(f".{target.name}.{kind}")
