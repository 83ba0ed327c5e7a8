"""Keep the optimizer's first moments in bf16: two bytes less per parameter, of 12 to 16 with weights, gradients and moments.

Each step computes them in fp32 and rounds what it keeps. A first moment moves by 3 to 20 % towards the gradient each step,
which bf16's eight bits resolve. AdamW's second moment moves by as little as 0.5 %, which they do not: it would stand still.
"""

from dataclasses import dataclass

from nanochat.cli.flags import flag
from nanochat.features.base import Feature


class Bf16Momentum(Feature):
    name = "bf16_momentum"
    memory = {"momentum_bytes": 2}

    @dataclass
    class Config:
        """Moments"""
        bf16_momentum: bool = flag(False, "keep the optimizer's first moments in bf16")

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].bf16_momentum

    def on_model(self, model, horizon) -> None:
        import torch
        model.momentum_dtype = torch.bfloat16
