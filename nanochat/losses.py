"""The training loss: soft-capped cross-entropy over the head's logits. The plain version, which faster ones are tested against.

Soft cap (Gemma 2, arXiv 2408.00118): `cap * tanh(z / cap)` keeps every logit within (-cap, cap), in fp32.
"""

import torch
import torch.nn.functional as F

SOFTCAP = 15.0


def softcapped_logits(x: torch.Tensor, lm_head, vocab_size: int) -> torch.Tensor:
    """Logits (B, T, vocab_size) in fp32 from the normed residual stream (B, T, C); the head's padding is cropped off."""
    logits = lm_head(x)[..., :vocab_size].float()
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


def softcapped_cross_entropy(x: torch.Tensor, lm_head, targets: torch.Tensor, vocab_size: int,
                             reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of `targets` (B, T) int64, -1 = ignored, given the normed residual stream `x` (B, T, C).

    `reduction`: `mean` over the targets that count, `sum`, or `none` -> (B, T), zero where ignored.
    """
    logits = softcapped_logits(x, lm_head, vocab_size)
    loss = F.cross_entropy(logits.view(-1, vocab_size), targets.reshape(-1), ignore_index=-1, reduction=reduction)
    return loss.view_as(targets) if reduction == "none" else loss
