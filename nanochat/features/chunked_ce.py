"""Cross-entropy by chunks of tokens: forward and backward of the head and the loss at once, a chunk at a time.

The logits of all tokens are the largest tensors of a step, and the passes over them the most work outside of matrix
products. By chunks (nanochat/kernels/cross_entropy.py) neither they nor their gradients are ever there as a whole, and a kernel
goes over each chunk once. The loss and the gradients are those of the plain one, rounded in another order.
"""

from dataclasses import dataclass

from nanochat.cli.flags import flag
from nanochat.common import print0
from nanochat.features.base import Feature


class ChunkedCe(Feature):
    name = "chunked_ce"
    memory = {"chunked_ce": True}

    @dataclass
    class Config:
        """Chunked cross-entropy"""
        chunked_ce: bool = flag(False, "compute loss and head by chunks of tokens", free=True)
        ce_chunk_tokens: int = flag(0, "tokens of a chunk, a multiple of 16; 0 chooses by the size of their logits", low=0,
                                    free=True)

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].chunked_ce

    @classmethod
    def validate(cls, config) -> list[str]:
        flags = config.features[cls.name]
        if flags.ce_chunk_tokens and not flags.chunked_ce:
            return ["--ce-chunk-tokens without --chunked-ce would do nothing: add it"]
        if flags.ce_chunk_tokens % 16:
            below = flags.ce_chunk_tokens // 16 * 16
            return [f"--ce-chunk-tokens {flags.ce_chunk_tokens}: matrix units want multiples of 16, {below or 16} for example"]
        return []

    def on_model(self, model, horizon) -> None:
        from nanochat.kernels.cross_entropy import ChunkedCrossEntropy, default_chunk, kernel_name
        from nanochat.kernels.linear import Linear
        head, device = model.lm_head.weight, model.get_device().type
        chunk = self.config.ce_chunk_tokens or default_chunk(head.size(0), model.compute_dtype, device)
        model.kernels.loss = ChunkedCrossEntropy(chunk, plain=Linear)
        print0(f"cross-entropy: {chunk:,} tokens at a time, by a pass in {kernel_name(device, model.compute_dtype)}")
