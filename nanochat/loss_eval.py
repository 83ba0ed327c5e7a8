"""Bits per byte (bpb): a validation loss that does not depend on the tokenizer.

A loss in nats per token cannot be compared between vocabularies: a larger vocabulary has fewer and harder tokens. Bits per byte
divides the total loss by the bytes of text that the tokens stand for, and by ln 2. It is the size to which the model
would compress the text: 8 is no compression, a good small model of English or code reaches about 1.

Special tokens stand for no text, so neither their loss nor their bytes count. Ignored targets (-1) do not count either.
"""

import math
from collections.abc import Iterable
from itertools import islice

import torch

from nanochat.runtime.distributed import all_reduce_sum


def evaluate_bpb(model, batches: Iterable, steps: int | None = None, token_bytes: torch.Tensor | None = None) -> float:
    """Bits per byte of the targets in `batches`, over all ranks; inf if there are no bytes to predict.

    batches: pairs (x, y) of (B, T) int64; y = -1 is ignored. B and T may vary.
    steps: number of batches at most; None takes all.
    token_bytes: (vocab_size,) integers on the model's device: bytes of each token, 0 for special tokens.

    Sums are over targets, not means of batches, and in float64: the result does not depend on the batch size.
    """
    assert token_bytes is not None, "token_bytes is required: see nanochat.tokenizer.get_token_bytes"
    return bits_per_byte(all_reduce_sum(nats_and_bytes(model, islice(batches, steps), token_bytes)))


@torch.no_grad()
def nats_and_bytes(model, batches: Iterable, token_bytes: torch.Tensor) -> torch.Tensor:
    """What bits per byte are made of: total loss and bytes of the targets in `batches`, (2,) float64. Sums may be added."""
    # Apple GPUs (MPS) have no float64, so there the sums are computed on the host.
    device = torch.device("cpu") if token_bytes.device.type == "mps" else token_bytes.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for x, y in batches:
        loss = model(x, y, loss_reduction="none").view_as(y)           # (B, T) nats
        size = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)     # (B, T) bytes
        loss = torch.where(size > 0, loss, 0.0)
        total += torch.stack([loss.to(device).double().sum(), size.to(device).double().sum()])
    return total


def bits_per_byte(total: torch.Tensor) -> float:
    """Of what `nats_and_bytes` gives; inf if there are no bytes."""
    nats, size = total.tolist()
    return nats / (math.log(2) * size) if size else math.inf


def no_tokens(row_len: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch (x, y) of one row without a target that counts: its loss is 0."""
    x = torch.zeros((1, row_len), dtype=torch.int64, device=device)
    return x, torch.full_like(x, -1)
