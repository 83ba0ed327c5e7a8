"""Schedules of learning rate, momentum and weight decay.

Each is a function of the step alone: a resumed run needs no state for it, and it can be plotted. No torch.
"""

import math

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END, MOMENTUM_WARMUP_STEPS = 0.85, 0.97, 0.90, 400


def _warmdown_progress(step: int, num_iterations: int, warmdown_ratio: float) -> float:
    """Progress of the warm-down: 0 before it starts, then linear up to 1 at `num_iterations`."""
    length = round(warmdown_ratio * num_iterations)
    return max(0.0, step - (num_iterations - length)) / length if length else 0.0


def lr_scale(step: int, num_iterations: int, *, warmup_steps: int = 40, warmdown_ratio: float = 0.65,
             final_lr_frac: float = 0.05, warmdown_shape: str = "linear") -> float:
    """Factor of the peak learning rate: linear warm-up to 1, constant, then warm-down to `final_lr_frac`.

    warmdown_ratio: share of the steps that the warm-down takes.   warmdown_shape: `linear` or `cosine`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = _warmdown_progress(step, num_iterations, warmdown_ratio)
    remaining = 1 - progress if warmdown_shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_lr_frac + (1 - final_lr_frac) * remaining


def muon_momentum(step: int, num_iterations: int, *, warmdown_ratio: float = 0.65) -> float:
    """Muon's momentum: linear warm-up from 0.85 to 0.97 over 400 steps, then down to 0.90 over the warm-down."""
    if step < MOMENTUM_WARMUP_STEPS:
        return MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * step / MOMENTUM_WARMUP_STEPS
    progress = _warmdown_progress(step, num_iterations, warmdown_ratio)
    return MOMENTUM_PEAK + (MOMENTUM_END - MOMENTUM_PEAK) * progress


def weight_decay_scale(step: int, num_iterations: int) -> float:
    """Factor of Muon's initial weight decay: a half cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / num_iterations))
