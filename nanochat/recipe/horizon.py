"""The training horizon: number of steps, batch size, learning rate and weight decay, all from the model's shape. No torch.

The reference is d12, tuned by hand at a batch of B_ref = 2^19 tokens. For other models:
- tokens         D = ratio * (parameters of block matrices and lm_head), a fixed ratio as in Chinchilla (arXiv 2203.15556)
- batch size     B = B_ref (D / D_ref)^0.383, the power law of arXiv 2505.13738, rounded to a power of two
- learning rate  * sqrt(B / B_ref) * (D_ref / D)^0.4 where D < D_ref. The square root is the usual rule, derived for AdamW,
                 assumed to hold for Muon. That a shorter run needs a higher rate is known, with an exponent of 0.32 (arXiv
                 2409.19913); 0.4 was fitted here at d2 and d4 and 3*10^5 to 5*10^6 tokens (docs/recipe.md), and meets the
                 reference. Beyond D_ref nothing was measured here, and the public nanochat was tuned without this term. The
                 per-layer scalars have the square root only: with more they overshoot during the warm-up, and the loss jumps
- weight decay   the one that keeps tau = B / (eta lambda D) constant (arXiv 2405.13698), again derived for AdamW

D is the number of tokens that the run trains on, whatever flag decides it; for the rates, at least SHORTEST.
"""

import math
from dataclasses import dataclass, replace

from nanochat.recipe.shape import GPTConfig, flops_per_token, scaling_params, shape_of_depth

REFERENCE_DEPTH = 12
REFERENCE_BATCH = 2**19  # tokens
BATCH_EXPONENT = 0.383
DEFAULT_RATIO = 12.0     # tokens per scaling parameter
HORIZON_EXPONENT = 0.4   # of the learning rate in D_ref / D
SHORTEST = 2**18         # tokens: the shortest run that the law of the learning rate was fitted to


@dataclass(frozen=True)
class Horizon:
    """The planned length and the derived hyperparameters of a run."""
    num_iterations: int    # optimizer steps
    total_batch_size: int  # tokens per optimizer step, over all ranks
    grad_accum_steps: int  # micro-batches per optimizer step, on each rank
    lr_factor: float       # multiplies every learning rate but those of the scalars; includes --lr-multiplier
    scalar_lr_factor: float  # of the per-layer scalars; includes --lr-multiplier
    weight_decay: float    # Muon's at the start; includes --wd-multiplier
    target_tokens: int     # ratio * scaling parameters, whatever sets num_iterations
    flops_per_token: int   # on average over the run
    reason: str            # the flag that sets num_iterations

    @property
    def total_tokens(self) -> int:
        return self.num_iterations * self.total_batch_size

    @property
    def total_flops(self) -> float:
        return float(self.flops_per_token) * self.total_tokens


def nearest_batch_sizes(total: int, micro: int) -> str:
    """The multiples of `micro` below and above `total`, as text for an error message."""
    below, above = total // micro * micro, -(-total // micro) * micro
    return f"{below:,} or {above:,}" if below and below != above else f"{above:,}"


def predicted_batch(tokens: float, reference_tokens: float) -> float:
    """Predicted optimal batch size in tokens, before rounding."""
    return REFERENCE_BATCH * (tokens / reference_tokens) ** BATCH_EXPONENT


def plan_horizon(config: GPTConfig, *, device_batch_size: int, world_size: int = 1, total_batch_size: int = -1,
                 num_iterations: int = -1, target_flops: float = -1.0, target_param_data_ratio: float = DEFAULT_RATIO,
                 weight_decay: float = 0.28, batch_multiplier: float = 1.0, lr_multiplier: float = 1.0,
                 wd_multiplier: float = 1.0, flops_share: float = 1.0) -> Horizon:
    """Plan a run. Of `num_iterations`, `target_flops` and `target_param_data_ratio` the first that is positive counts.

    device_batch_size: sequences per micro-batch on one rank.   total_batch_size: tokens per step; -1 derives it.
    flops_share: FLOPs of the run as a share of those of as many steps that run all blocks.
    Raises: ValueError where `total_batch_size` is no multiple of a micro-batch over all ranks; it names the nearest that are.
    """
    ratio = target_param_data_ratio if target_param_data_ratio > 0 else DEFAULT_RATIO
    reference = replace(shape_of_depth(REFERENCE_DEPTH), vocab_size=config.vocab_size)
    tokens, reference_tokens = ratio * scaling_params(config), ratio * scaling_params(reference)
    micro = device_batch_size * config.sequence_len * world_size

    if total_batch_size > 0:
        if total_batch_size % micro:
            raise ValueError(
                f"--total-batch-size {total_batch_size:,} is not a whole number of micro-batches of {micro:,} tokens "
                f"({device_batch_size} rows x {config.sequence_len} tokens x {world_size} ranks): "
                f"use {nearest_batch_sizes(total_batch_size, micro)}, or change --device-batch-size.")
        batch = total_batch_size
    else:
        predicted = 2 ** round(math.log2(predicted_batch(tokens, reference_tokens))) * batch_multiplier
        batch = max(1, round(predicted / micro)) * micro

    flops = round(flops_share * flops_per_token(config))
    if num_iterations > 0:
        steps, reason = num_iterations, "--num-iterations"
    elif target_flops > 0:
        steps, reason = max(1, round(target_flops / (flops * batch))), "--target-flops"
    else:
        steps, reason = max(1, int(tokens // batch)), "--target-param-data-ratio"
    trained = tokens if reason == "--target-param-data-ratio" else steps * batch  # before rounding to whole steps
    horizon_scale = DEFAULT_RATIO * scaling_params(reference) / max(trained, SHORTEST)  # D_ref / D
    batch_factor = math.sqrt(batch / REFERENCE_BATCH)
    lr_factor = batch_factor * max(1.0, horizon_scale)**HORIZON_EXPONENT
    return Horizon(
        num_iterations=steps, total_batch_size=batch, grad_accum_steps=batch // micro,
        lr_factor=lr_factor * lr_multiplier, scalar_lr_factor=batch_factor * lr_multiplier,
        weight_decay=weight_decay * batch / REFERENCE_BATCH * horizon_scale / lr_factor * wd_multiplier,
        target_tokens=int(tokens), flops_per_token=flops, reason=reason)
