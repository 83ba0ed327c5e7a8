"""Fused kernels for RMSNorm and the residual addition before it, one for the forward pass and one for the backward
(nanochat/kernels/norms.py), on NVIDIA GPUs.

torch.compile also fuses these. On a CPU our kernels alone were nearly twice as fast, and a model's forward and backward no
faster (dev/LOG.md): there the flag does nothing, and prints so. The GPU kernels have not been run yet. There is no kernel for
norm and FP8 quantization together: a tensor's scale is known only when all of it is normed, so a second pass is needed anyway.
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
        fused_rmsnorm: bool = flag(False, "on NVIDIA GPUs: compute RMSNorm and the addition before it in one kernel of our own "
                                   "(not measured yet)", affects_results=False)

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].fused_rmsnorm

    def on_model(self, model, horizon) -> None:
        from nanochat.kernels.norms import fused_add_norm, fused_mix_norm, kernels_for
        device = model.get_device().type
        if language := kernels_for(device):
            model.kernels.mix_norm, model.kernels.add_norm = fused_mix_norm, fused_add_norm
            print0(f"RMSNorm: fused with the addition before it, kernel: {language}")
        else:
            why = "Triton cannot be used" if device == "cuda" else f"there is no kernel for {device}"
            print0(f"--fused-rmsnorm does nothing here: {why}. RMSNorm is left to torch.compile")
