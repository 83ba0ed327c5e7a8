"""Keep less of the forward pass for the backward one, and compute again there what takes no matrix product: norms, rotary
positions, the squared ReLU. A selective form of activation checkpointing (arXiv 2205.05198).

torch.compile keeps by itself what a product of the backward pass reads: relu(h)^2 beside h, each norm's output beside its
input, about 19 numbers per layer, token and element of the width. Of these 11 are enough (dev/LOG.md), for a few passes more
over memory. No product and no attention is computed twice. FP8 layers keep what they have quantized all the same.
"""

from dataclasses import dataclass

from nanochat.cli.flags import flag
from nanochat.features.base import Feature


class Recompute(Feature):
    name = "recompute"
    memory = {"recompute": True}

    @dataclass
    class Config:
        """Activations"""
        recompute_activations: bool = flag(
            False, "compute norms, rotary positions and squared ReLUs again in the backward pass instead of keeping them",
            free=True)

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].recompute_activations

    @classmethod
    def validate(cls, config) -> list[str]:
        if cls.enabled(config) and not config.run.compile:
            return ["--recompute-activations is done by the compiler, and has no effect under --no-compile: "
                    "leave one of them out"]
        return []

    def on_model(self, model, horizon) -> None:
        model.recompute_activations = True
