"""Cast the weights of linear layers once per optimizer step instead of in every micro-batch (nanochat/kernels/linear.py).

The results are the same to the bit. The copies take 2 bytes per weight. What is saved is memory traffic, 6 bytes per weight and
matrix product: the fewer tokens a micro-batch has and the slower the memory is, the more it pays.
"""

from dataclasses import dataclass

from nanochat.cli.flags import flag, other_than
from nanochat.common import print0
from nanochat.features.base import Feature


class CastOnce(Feature):
    name = "cast_once"

    @dataclass
    class Config:
        """Cast weights once"""
        cast_once: bool = flag(False, "cast the weights of linear layers once per optimizer step, not in every micro-batch; pays "
                               "where micro-batches are small", affects_results=False,
                               requires={"dtype": other_than("float32", "bfloat16, float16 or auto")})

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].cast_once

    def on_model(self, model, horizon) -> None:
        from nanochat.kernels.linear import keep_casts
        self.layers = keep_casts(model)
        if not self.layers:
            print0("--cast-once does nothing here: every linear layer already has its weight in the compute dtype")
        self.on_weights_changed()

    def on_weights_changed(self) -> None:
        from nanochat.kernels.linear import refresh
        refresh(self.layers)
