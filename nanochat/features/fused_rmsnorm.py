"""RMSNorm fused with the sum before it, one pass forward and one backward (nanochat/kernels/norms.py), on NVIDIA GPUs.

torch.compile fuses these by itself. On a CPU kernels of our own were nearly twice as fast as its when timed alone, and
forward and backward of a model no faster for it (dev/LOG.md): there the flag changes nothing, and says so. On GPUs the
kernels have not run yet. Norm and quantization in one pass, for FP8, are not here: a tensor's scale is known only when all
of it has been normed, so that it needs a second pass in any case.
"""

from dataclasses import dataclass

from nanochat.cli.flags import flag
from nanochat.common import print0
from nanochat.features.base import Feature


class FusedRmsnorm(Feature):
    name = "fused_rmsnorm"

    @dataclass
    class Config:
        """Fused RMSNorm"""
        fused_rmsnorm: bool = flag(False, "add and norm in one pass of our own, on NVIDIA GPUs (not measured yet)", free=True)

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].fused_rmsnorm

    def on_model(self, model, horizon) -> None:
        from nanochat.kernels.norms import fused_add_norm, fused_mix_norm, kernels_for
        device = model.get_device().type
        if written_in := kernels_for(device):
            model.kernels.mix_norm, model.kernels.add_norm = fused_mix_norm, fused_add_norm
            print0(f"RMSNorm: one pass with the sum before it, in {written_in}")
        else:
            why = "Triton is not installed" if device == "cuda" else f"on a {device} nothing would be gained"
            print0(f"--fused-rmsnorm changes nothing here: {why}. RMSNorm is left to the compiler")
