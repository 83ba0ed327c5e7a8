"""Short causal convolution: each channel of a token gets a learned share of the same channel of the K - 1 tokens before it.

    y[t] = x[t] + sum over j = 1 .. K-1 of w[j-1] x[t-j]        x, y (B, T, C), w (K-1, C), x[t] = 0 for t < 0

A depthwise convolution of K taps, of which that of the token itself is fixed at 1 (So et al., "Primer", arXiv 2109.08668, put it
behind the projections of queries, keys and values; Allen-Zhu, "Canon layers", arXiv 2512.17351, before attention and MLP).
Attention needs two layers to find "what came after this token the last time", an induction head: the first to tell each token
what was before it, the second to look for it. The convolution is that first layer, and needs no training to be in place.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class ShortConv(nn.Module):
    """The convolution as a layer. It starts as the identity.

    taps: K, the tokens that it sees, with its own: at least 2.
    """

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(taps - 1, width))  # [j-1]: of the token j places before

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C) of the same dtype.

        before: (B, K-1, C), the inputs that came before x, for generation; replaced by those before what will come next. None is
        the beginning of a text.
        """
        taps, length = len(self.weight), x.size(1)
        padded = F.pad(x, (0, 0, taps, 0)) if before is None else torch.cat([before, x], dim=1)  # (B, K-1 + T, C)
        if before is not None:
            before.copy_(padded[:, length:])
        y = x
        for j, weight in enumerate(self.weight.to(x.dtype), 1):
            y = torch.addcmul(y, padded[:, taps - j:taps - j + length], weight)
        return y
