"""Bits per byte: a loss that does not depend on the tokenizer.

Nats per token cannot be compared between vocabularies, for a larger one has fewer, harder tokens. Divided instead by
the bytes of text that the tokens stand for, and by ln 2, the loss becomes the size to which the model would compress
the text: 8 is no compression, and a good small model of English or code needs about 1.

Special tokens stand for no text, so neither their loss nor their bytes count; ignored targets (-1) do not either.
"""

import math
from collections.abc import Iterable
from itertools import islice

import torch

from nanochat.runtime.distributed import all_reduce_sum


@torch.no_grad()
def evaluate_bpb(model, batches: Iterable, steps: int | None = None, token_bytes: torch.Tensor | None = None) -> float:
    """Bits per byte of the targets in `batches`, over all ranks.

    batches: (x, y) pairs of (B, T) int64; y = -1 is ignored. Sizes may differ from batch to batch.
    steps: how many batches to take at most; None takes all, so `batches` must end.
    token_bytes: (vocab_size,) integers on the model's device, the bytes of each token, 0 for a special one.
    Returns inf where there is no byte to predict.

    The sums are over targets, not over batch means, and in float64, so that the way rows are batched does not show.
    """
    assert token_bytes is not None, "token_bytes is required: see nanochat.tokenizer.get_token_bytes"
    # Apple's GPUs have no float64: there the sums are made on the host.
    device = torch.device("cpu") if token_bytes.device.type == "mps" else token_bytes.device
    nats_and_bytes = torch.zeros(2, dtype=torch.float64, device=device)
    for x, y in islice(batches, steps):
        loss = model(x, y, loss_reduction="none").view_as(y)           # (B, T) nats
        size = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)     # (B, T) bytes
        loss = torch.where(size > 0, loss, 0.0)
        nats_and_bytes += torch.stack([loss.to(device).double().sum(), size.to(device).double().sum()])
    nats, size = all_reduce_sum(nats_and_bytes).tolist()
    return nats / (math.log(2) * size) if size else math.inf
