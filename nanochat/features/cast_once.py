"""Cast the weights of the linear layers once per optimizer step, instead of in every micro-batch (nanochat/kernels/linear.py).

The bits are the same; the copies take two bytes per weight. What is saved is traffic: six bytes per weight and product,
which matters the more the fewer tokens a micro-batch has and the slower the memory is.
"""

from dataclasses import dataclass

from nanochat.cli.flags import flag
from nanochat.common import print0
from nanochat.features.base import Feature


class CastOnce(Feature):
    name = "cast_once"

    @dataclass
    class Config:
        """Casts of weights"""
        cast_once: bool = flag(False, "cast the weights of linear layers once per optimizer step, not in every micro-batch",
                               free=True)

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].cast_once

    def on_model(self, model, horizon) -> None:
        from nanochat.kernels.linear import CastOnceLinear, Linear
        plain = {name: layer for name, layer in model.linears().items()
                 if type(layer) is Linear and layer.weight.dtype != model.compute_dtype}
        self.layers = [CastOnceLinear.from_linear(layer, model.compute_dtype) for layer in plain.values()]
        for name, layer in zip(plain, self.layers, strict=True):
            model.set_submodule(name, layer)
        if not plain:
            print0("--cast-once: no layer multiplies in another dtype than that of its weight, so nothing is cast at all")
        self.after_update()

    def after_update(self) -> None:
        from nanochat.kernels.linear import refresh
        refresh(self.layers)
