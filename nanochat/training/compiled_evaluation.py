"""Bits per byte by a compiled forward (--compile-evaluation). By default evaluation is not compiled: on a GPU each of its
operations then is a pass over memory of its own, and the fp32 logits of a whole batch exist three times.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from nanochat.common import print0
from nanochat.kernels.cross_entropy import IGNORED, default_chunk, softcapped_cross_entropy
from nanochat.runtime.toolchain import cause_of, reason

MOST_CHUNKS = 16  # of the loss, each with operations of its own in the graph


class CompiledEvaluation:
    """The losses of a GPT, compiled without gradients. Called like the model itself where it is evaluated:
    `(x, y, loss_reduction="none") -> (B, T)` in nats.

    rows, length: the shape that is compiled, the only one. Smaller batches are filled up with ignored targets behind their
    tokens, which see no later ones; larger ones run uncompiled.

    The graph is one of its own. Training's graphs stay as they are, whether the model is compiled whole or in parts. The loss is
    computed in chunks of tokens, whatever training's is. The numbers are those of the uncompiled model but for rounding, which a
    fused kernel does less often.
    """

    def __init__(self, model, rows: int, length: int, backend: str = "inductor"):
        self.model, self.rows, self.length, self.works = model, rows, length, None
        # a function around the model: the model's own code has the graphs of training
        self.losses = torch.compile(lambda x, y: model(x, y, loss_reduction="none"), dynamic=False, fullgraph=True,
                                    backend=backend)

    def warm_up(self) -> None:
        """Compile, the first time. Call it as the losses are asked for: in `evaluation` and the features' `eval_context`. Where
        it cannot be compiled, a line says why, and the evaluation goes on uncompiled. Raises: torch.OutOfMemoryError."""
        if self.works is not None:
            return
        zeros = torch.zeros((self.rows, self.length), dtype=torch.int64, device=self.model.get_device())
        self.works = True
        try:
            self(zeros, zeros.clone())
        except Exception as e:  # a compiler may raise anything
            if isinstance(cause_of(e), torch.OutOfMemoryError):
                raise cause_of(e) from None
            self.works = False
            print0(f"the evaluation could not be compiled and runs uncompiled: {reason(e)}")

    def __call__(self, x: torch.Tensor, y: torch.Tensor, loss_reduction: str = "none") -> torch.Tensor:
        B, T = x.shape
        if not self.works or loss_reduction != "none" or B > self.rows or T > self.length:
            return self.model(x, y, loss_reduction=loss_reduction)
        missing = (0, self.length - T, 0, self.rows - B)  # columns and rows at the end
        if any(missing):
            x, y = F.pad(x, missing), F.pad(y, missing, value=IGNORED)
        with self._chunked_loss(), torch.compiler.set_stance("default"):  # `evaluation` runs everything else uncompiled
            return self.losses(x, y)[:B, :T]

    @contextmanager
    def _chunked_loss(self):
        kernels, before = self.model.kernels, self.model.kernels.loss
        kernels.loss = chunked_losses
        try:
            yield
        finally:
            kernels.loss = before


def chunked_losses(x: torch.Tensor, lm_head, targets: torch.Tensor, vocab_size: int, reduction: str) -> torch.Tensor:
    """`softcapped_cross_entropy` without reduction, (B, T), in chunks of tokens, so that not all logits exist at once. The
    compiler can trace all of it, and fuses what follows the product."""
    rows = x.flatten(0, 1)
    chunk = max(default_chunk(lm_head.weight.size(0), x.dtype, x.device.type), -(-len(rows) // MOST_CHUNKS))
    parts = zip(rows.split(chunk), targets.flatten().split(chunk), strict=True)
    return torch.cat([softcapped_cross_entropy(x, lm_head, y, vocab_size, "none") for x, y in parts]).view_as(targets)
