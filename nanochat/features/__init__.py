"""Features: optimizations that act inside a training step. One file is one optimization, with its flags, effect and state.

To add one, write a file with a `Feature` class (base.py) and name the class in FEATURES. The training loop calls nothing but the
hooks of `Feature`. An optimization that needs no hook is a flag of nanochat/training/config.py instead. Modules here must not
import torch at the top, because flags are parsed before torch is loaded. A feature imports neither another feature nor anything
of nanochat/training.
"""

from nanochat.features.base import Feature, Features
from nanochat.features.cast_once import CastOnce
from nanochat.features.chunked_ce import ChunkedCe
from nanochat.features.fp8 import Fp8
from nanochat.features.fused_rmsnorm import FusedRmsnorm
from nanochat.features.progressive_depth import ProgressiveDepth
from nanochat.features.suffix import Suffix

FEATURES: tuple[type[Feature], ...] = (Fp8, CastOnce, Suffix, ProgressiveDepth, ChunkedCe, FusedRmsnorm)

__all__ = ["FEATURES", "Feature", "Features"]
