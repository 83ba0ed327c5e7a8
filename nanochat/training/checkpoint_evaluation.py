"""Bits per byte of finished runs, measured alike: what the lab compares runs by.

A run evaluates itself while it trains, with its own features, kernels, dtype and number of tokens. So that a comparison does not
depend on those, the final checkpoint of every run is evaluated here, in a process of its own: the model is built from the shape
and the weights in the checkpoint alone, in one dtype, with the plain kernels, without features and without a compiler. It reads
all validation tokens (MOST_TOKENS at most) of a text and with a tokenizer that are given, not those that the run names.
"""

import gc
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from nanochat.checkpoint_manager import (
    MODEL,
    build_model,
    check_tokenizer,
    empty_model,
    load_checkpoint,
    load_weights,
    saved_shape,
)
from nanochat.cli.paths import list_steps, step_dir
from nanochat.common import UserError
from nanochat.dataloader import val_batches
from nanochat.dataset import TokenDataset
from nanochat.loss_eval import bits_per_byte, nats_and_bytes
from nanochat.recipe.shape import GPTConfig, padded_vocab_size
from nanochat.runtime.device import evaluation
from nanochat.runtime.files import file_digest
from nanochat.tokenizer import Tokenizer, get_token_bytes

# Validation tokens that are read at most. The difference of two models has a standard error of about 0.002 bits per byte on 8192
# tokens (dev/LOG.md): 0.00035 on 2^18, 0.00006 on 10 million. Text that a run holds out has 8 million characters at most, that of
# --val-data may have more.
MOST_TOKENS = {"cpu": 2**18, "cuda": 10_000_000, "mps": 10_000_000}
FORWARD_BYTES = {"cpu": 2**27, "cuda": 2**31, "mps": 2**29}  # that activations and logits of a forward pass take, about


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which all models are evaluated on this device, whatever they were trained in: fp32, or bf16 on GPUs that
    multiply it."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32


def rows_per_forward(shape: GPTConfig, device_type: str) -> int:
    """Rows of a forward pass that take about FORWARD_BYTES: four fp32 copies of the logits, and the activations of a block."""
    per_token = 4 * 4 * padded_vocab_size(shape.vocab_size) + 4 * 16 * shape.n_embd
    return max(1, FORWARD_BYTES[device_type] // (per_token * shape.sequence_len))


def load_final_model(run_dir: Path, tokenizer: Tokenizer, device: torch.device):
    """(model, step, tokens that the run evaluated itself on) of a run's last checkpoint, from its shape and weights alone.

    Raises: UserError where it is missing or damaged, holds other tensors than a model of its shape, or has another vocabulary.
    """
    steps = list_steps(run_dir)
    if not steps:
        raise UserError(f"no checkpoint in {run_dir}")
    tensors, _, state = load_checkpoint(run_dir, steps[-1], with_optimizer=False)
    check_tokenizer(tokenizer, state, run_dir)
    shape, dtype = saved_shape(state, run_dir), compute_dtype(device)
    if shape.n_layer > len(tensors):  # or it would take long even to make an empty model
        raise UserError(f"the checkpoint has {len(tensors)} tensors, and names {shape.n_layer} layers")
    own = empty_model(shape, dtype).state_dict()
    if wrong := sorted(own.keys() ^ tensors.keys()):
        raise UserError(f"the checkpoint {'lacks the' if wrong[0] in own else 'has an unexpected'} tensor {wrong[0]}: it is of "
                        "another model than nanochat/gpt.py's")
    if shape.vocab_size != tokenizer.get_vocab_size():
        raise UserError(f"the model predicts {shape.vocab_size} tokens, and the tokenizer has {tokenizer.get_vocab_size()}")
    model = build_model(shape, dtype, device)
    load_weights(model, tensors, run_dir)
    return model, steps[-1], state.get("user_config", {}).get("eval_tokens")


class Validation:
    """The validation tokens on a device, in rows of the length that a model asks for."""

    def __init__(self, tokens: TokenDataset, tokenizer: Tokenizer, device: torch.device):
        self.split, self.device, self.token_bytes = tokens.split("val"), device, get_token_bytes(device, tokenizer)
        files = [file["sha256"] for shard in tokens.manifest["splits"]["val"]["shards"] for file in shard]
        self.most = MOST_TOKENS[device.type]
        self.fingerprint = hashlib.sha256(json.dumps([files, self.most]).encode()).hexdigest()
        self.shape_of_batches: tuple[int, int] | None = None
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def in_batches(self, row_len: int, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(inputs, targets), int64 (rows, row_len) each, the last pair maybe with fewer rows. Kept for the next model of this
        shape."""
        if self.shape_of_batches != (row_len, rows):
            self.batches = list(val_batches(self.split, row_len, rows, self.most, 0, 1, self.device))
            self.shape_of_batches = (row_len, rows)
        return self.batches


def evaluate_run(run_dir: Path, validation: Validation, tokenizer: Tokenizer) -> dict:
    """Evaluate the last checkpoint of a run: {"step", "bpb": bits per byte, "tokens": number of targets, "own_bpb": on the first
    of them, those that the run evaluated itself on, if it says, "weights_sha256": of model.safetensors, "validation_fingerprint":
    of the tokens}.

    Raises: UserError, and what torch raises where memory is used up.
    """
    model, step, own_tokens = load_final_model(run_dir, tokenizer, validation.device)
    batches = validation.in_batches(model.config.sequence_len, rows_per_forward(model.config, validation.device.type))
    own_rows = -(-own_tokens // model.config.sequence_len) if isinstance(own_tokens, int) and own_tokens > 0 else 0
    first, rest = split_after(batches, own_rows)
    with evaluation(model):
        own, others = (nats_and_bytes(model, part, validation.token_bytes) for part in (first, rest))
    bpb = bits_per_byte(own + others)
    if not math.isfinite(bpb):
        raise UserError(f"bits per byte are {bpb}")
    return {"step": step, "bpb": bpb, "tokens": sum(y.numel() for _, y in batches),
            "own_bpb": bits_per_byte(own) if first else None,
            "weights_sha256": file_digest(step_dir(run_dir, step) / MODEL), "validation_fingerprint": validation.fingerprint}


def split_after(batches: list[tuple], rows: int) -> tuple[list[tuple], list[tuple]]:
    """The first `rows` rows of (inputs, targets) batches, and the others."""
    first, rest = [], []
    for x, y in batches:
        taken = min(rows, len(x))
        rows -= taken
        first += [(x[:taken], y[:taken])] if taken else []
        rest += [(x[taken:], y[taken:])] if taken < len(x) else []
    return first, rest


def answers(run_dirs: list[str], validation: Validation, tokenizer: Tokenizer) -> Iterator[dict]:
    """The answer on each run, with its "run_dir": that of `evaluate_run`, or {"error": why there is none}. One that cannot be
    evaluated does not stop the others."""
    for run_dir in run_dirs:
        try:
            answer = evaluate_run(Path(run_dir), validation, tokenizer)
        except UserError as e:
            answer = {"error": str(e)}
        except Exception as e:  # damaged weights and a lack of memory may raise anything
            answer = {"error": f"{type(e).__name__}: {e}"}
        yield {"run_dir": run_dir} | answer
        gc.collect()  # what the failed one held in memory
        if validation.device.type == "cuda":
            torch.cuda.empty_cache()
