"""Chunked cross-entropy: compute the head and the loss, forward and backward, for a chunk of tokens at a time.

The logits of all tokens are the largest tensors of a step, and the passes over them the most work outside of matrix products.
In chunks (nanochat/kernels/cross_entropy.py) neither they nor their gradients ever exist as a whole, and a fused kernel makes one
pass over each chunk. Loss and gradients equal those of the plain loss up to rounding.
"""

from dataclasses import dataclass

from nanochat.cli.flags import flag
from nanochat.features.base import Feature


class ChunkedCe(Feature):
    name = "chunked_ce"
    memory = {"chunked_ce": True}

    @dataclass
    class Config:
        """Chunked cross-entropy"""
        chunked_ce: bool = flag(False, "compute head and loss for a chunk of tokens at a time: saves memory, and time on CPUs",
                                affects_results=False)
        ce_chunk_tokens: int = flag(0, "tokens of a chunk, a multiple of 16; 0 derives it from the size of their logits; on a "
                                    "CPU four times as many are tried too", low=0,
                                    affects_results=False, requires={"chunked_ce": True})

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].chunked_ce

    @classmethod
    def validate(cls, config) -> list[str]:
        tokens = config.features[cls.name].ce_chunk_tokens
        if tokens % 16:
            return [f"--ce-chunk-tokens {tokens} must be a multiple of 16, as tensor cores need: use {tokens // 16 * 16 or 16}"]
        return []

    def on_model(self, model, horizon) -> None:
        from nanochat.kernels.cross_entropy import ChunkedCrossEntropy, default_chunk
        from nanochat.kernels.linear import Linear
        chunk = default_chunk(model.lm_head.weight.size(0), model.compute_dtype, model.get_device().type)
        model.kernels.loss = ChunkedCrossEntropy(self.config.ce_chunk_tokens or chunk, plain=Linear)
