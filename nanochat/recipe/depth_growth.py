"""Progressive depth: when a run grows to its depth, and what its steps cost. No torch.

flags: those of the feature (nanochat/features/progressive_depth.py): initial_depth and depth_growth_frac.
"""

from dataclasses import replace

from nanochat.recipe.shape import GPTConfig, flops_per_token


def grows(flags, n_layer: int) -> bool:
    """Whether a model of so many blocks begins with fewer."""
    return 0 < flags.initial_depth < n_layer


def growth_step(flags, num_iterations: int) -> int:
    """The first step that runs all blocks, of a run that grows: the last one at the latest."""
    return min(round(flags.depth_growth_frac * num_iterations), num_iterations - 1)


def initial_shape(flags, shape: GPTConfig) -> GPTConfig:
    """The shape that the first steps run."""
    return replace(shape, n_layer=flags.initial_depth) if grows(flags, shape.n_layer) else shape


def shallow_share(flags, shape: GPTConfig) -> float:
    """The cost of a step before the growth as a share of one after it, in FLOPs."""
    return flops_per_token(initial_shape(flags, shape)) / flops_per_token(shape)


def mean_cost(flags, shape: GPTConfig) -> float:
    """The FLOPs of a run as a share of those of as many whole steps."""
    return 1 - flags.depth_growth_frac * (1 - shallow_share(flags, shape))


def cost_between(start: int, end: int, growth: int, share: float) -> float:
    """The cost of the steps from `start` to before `end`, in steps after the growth.   share: of a step before it."""
    return end - start - (1 - share) * max(0, min(end, growth) - start)
