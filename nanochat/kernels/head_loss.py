"""Head and loss in one C++ kernel (`cpp/head_loss.cpp`), for bf16 on CPUs, and the choice between it and chunks by PyTorch.

`chunked_gradients` of cross_entropy.py makes the logits of a chunk by one product, reads them for the loss, and makes dx and dW by
two more. The kernel goes over a block of tokens instead, and there over the vocabulary, so that logits are in the cache when they
are read and when dx is made of them. It keeps them in fp32, and sums dW in fp32. Whether that is faster, and with how many tokens
in a chunk, depends on processor and sizes: `choose_head_loss` measures it on those of a model.
"""

import ctypes

import torch
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.kernels.cross_entropy import CHUNK_BYTES, IGNORED, SOFTCAP, chunked_gradients, default_chunk, empty_gradients
from nanochat.runtime.tuner import MOST_TOKENS, Choice, Tuner, untimed_choice

FEATURES = 32          # the kernel takes a multiple of these
BLOCK, PADDING = 64, 32  # in cpp/packing.h: tokens and words are packed in blocks; a row in memory has some elements more
CHUNKS = (512, 1024, 2048, 4096)  # tokens, from which one is chosen
LARGEST = 4 * CHUNK_BYTES["cpu"]  # bytes of the logits of a chunk that is not the default one


def unavailable_reason(dtype: torch.dtype, device_type: str, features: int) -> str | None:
    """Why the kernel cannot be used for a head of `features` inputs that computes in `dtype`, or None."""
    if device_type != "cpu" or dtype != torch.bfloat16:
        return f"the kernel is for bfloat16 on a CPU, not for {dtype} on {device_type}"
    if features % FEATURES:
        return f"the kernel takes a multiple of {FEATURES} features, not {features}"
    return cpp_unavailable_reason("head_loss")


@torch.library.custom_op("nanochat::head_loss", mutates_args=(), device_types="cpu")
def head_loss_gradients(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, compiled: bool = False,
                        own_weight_gradient: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`chunked_gradients` by the kernel, for bf16: sum of the losses (0-d fp32), dx (N, C) bf16 and dW (V, C) fp32.

    The last two arguments are there for the same signature; nothing depends on them.
    Raises: IndexError for targets outside of the vocabulary.
    """
    total, dx, dw = empty_gradients(x, weight)
    x, weight, kernels = x.contiguous(), weight.contiguous(), library("head_loss")
    features, tokens = x.size(1), _rounded_up(min(chunk, len(x)))
    gradient = x.new_empty(_rounded_up(vocab_size), tokens + PADDING)          # of the logits, transposed
    scaled = x.new_empty(tokens, features + PADDING)
    for x_part, y_part, dx_part in zip(x.split(chunk), targets.contiguous().split(chunk), dx.split(chunk), strict=True):
        problem = (ctypes.c_int64 * 4)(len(x_part), features, vocab_size, gradient.size(1))
        losses, at_target = torch.empty(2, len(x_part))
        wrong = kernels.head_loss(problem, *map(pointer, (x_part, weight, y_part)), ctypes.c_float(SOFTCAP),
                                  *map(pointer, (losses, at_target, dx_part, gradient, scaled)))
        if wrong:
            raise IndexError(f"{wrong} targets are neither in the vocabulary of {vocab_size} nor {IGNORED}")
        with torch.profiler.record_function("nanochat::add_weight_gradient"):  # inside the loss too it counts as a product
            kernels.head_weight_gradient(problem, *map(pointer, (x_part, y_part, at_target, gradient, scaled, dw)))
        total += losses.sum()
    return total, dx, dw


@head_loss_gradients.register_fake
def _(x, weight, targets, vocab_size, chunk, compiled=False, own_weight_gradient=False):
    return empty_gradients(x, weight)


def _rounded_up(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def way_and_chunk(name: str, default: int) -> tuple[str, int]:
    """Of the name of a choice: `torch` or `brgemm`, and the tokens of a chunk. "torch 2048" names them, "torch" is `default`."""
    way, _, tokens = name.partition(" ")
    return way, int(tokens or default)


def choose_head_loss(weight: Tensor, tokens: int, dtype: torch.dtype, vocab_size: int, chunk: int = 0, *,
                     own_weight_gradient: bool = False, tuner: Tuner | None = None, wanted: str = "auto",
                     recorded: str | None = None) -> Choice:
    """How head and loss are computed in chunks: by PyTorch's products (`torch`) or by the kernel (`brgemm`), and with how many
    tokens in a chunk, where that is not the default: "torch 2048". Whichever takes the least time, forward and backward.

    weight (V, C): of the head.   tokens: of a micro-batch.   chunk: --ce-chunk-tokens; 0 lets the sizes be chosen, too.
    own_weight_gradient: as in `chunked_gradients`.   wanted: --head-loss.   recorded: the choice of the run to be resumed.
    Raises: UserError where `brgemm` is wanted and does not work.
    """
    vocab, features = weight.shape
    why_not = unavailable_reason(dtype, weight.device.type, features)
    if recorded and chunk:
        recorded = recorded.split()[0]
    if recorded and recorded.startswith("torch"):  # works everywhere
        wanted_here = wanted == "auto"
    if choice := untimed_choice("--head-loss", wanted, "torch", "brgemm", why_not, recorded):
        return choice
