"""Features: one file is one optimization behind flags. To add one, write the file and name its class in FEATURES.

A feature owns its flags, their validation, its effect, its state and its columns. The training loop knows only the hooks of
`Feature` (base.py). Modules here must not import torch at the top: flags are parsed before torch is loaded. A feature imports
neither another feature nor anything of nanochat/training.
"""

from nanochat.features.base import Feature, Features
from nanochat.features.bf16_momentum import Bf16Momentum
from nanochat.features.cast_once import CastOnce
from nanochat.features.chunked_ce import ChunkedCe
from nanochat.features.compile_cache import CompileCache
from nanochat.features.deferred_loss import DeferredLoss
from nanochat.features.fp8 import Fp8
from nanochat.features.fused_rmsnorm import FusedRmsnorm
from nanochat.features.recompute import Recompute
from nanochat.features.suffix import Suffix

FEATURES: tuple[type[Feature], ...] = (Fp8, CastOnce, Suffix, DeferredLoss, CompileCache, ChunkedCe, FusedRmsnorm, Bf16Momentum,
                                       Recompute)

__all__ = ["FEATURES", "Feature", "Features"]
