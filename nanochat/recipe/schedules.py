"""Schedules as pure functions of the step, so that they can be plotted, tested and resumed at any point. No torch."""

import math

MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END, MOMENTUM_WARMUP_STEPS = 0.85, 0.97, 0.90, 400


def _warmdown_progress(step: int, num_iterations: int, warmdown_ratio: float) -> float:
    """0 until the warm-down starts, then linearly to 1 at `num_iterations`."""
    length = round(warmdown_ratio * num_iterations)
    return max(0.0, step - (num_iterations - length)) / length if length else 0.0


def lr_multiplier(step: int, num_iterations: int, *, warmup_steps: int = 40, warmdown_ratio: float = 0.65,
                  final_lr_frac: float = 0.05, warmdown_shape: str = "linear") -> float:
    """Learning rate as a share of its peak: linear warm-up, flat, then down to `final_lr_frac` (linear or cosine)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = _warmdown_progress(step, num_iterations, warmdown_ratio)
    remaining = 1 - progress if warmdown_shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final_lr_frac + (1 - final_lr_frac) * remaining


def muon_momentum(step: int, num_iterations: int, *, warmdown_ratio: float = 0.65) -> float:
    """Muon's momentum: 0.85 -> 0.97 over the first 400 steps, then -> 0.90 over the warm-down."""
    if step < MOMENTUM_WARMUP_STEPS:
        return MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * step / MOMENTUM_WARMUP_STEPS
    progress = _warmdown_progress(step, num_iterations, warmdown_ratio)
    return MOMENTUM_PEAK + (MOMENTUM_END - MOMENTUM_PEAK) * progress


def weight_decay_multiplier(step: int, num_iterations: int) -> float:
    """Muon's weight decay as a share of its start: a half cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / num_iterations))
