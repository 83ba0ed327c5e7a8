"""Head and loss in one C++ kernel (`cpp/head_loss.cpp`), for bf16 on CPUs, and the choice between it and chunks by PyTorch.

`chunked_gradients` of cross_entropy.py makes the logits of a chunk by one product, reads them for the loss, and makes dx and dW
by two more. In the kernel a thread takes a block of tokens through the vocabulary, so that logits are in its cache when they are
read and when dx is made of them. It keeps logits in fp32, and sums dW in fp32. Whether that is faster, and with how many tokens
in a chunk, depends on processor and sizes: `choose_head_loss` measures it on those of a model.
"""

import ctypes

import torch
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.kernels.cross_entropy import (
    CHUNK_BYTES,
    IGNORED,
    SOFTCAP,
    ChunkedCrossEntropy,
    chunked_gradients,
    default_chunk,
    empty_gradients,
)
from nanochat.runtime.compute_dtype import dtype_name
from nanochat.runtime.tuner import Choice, Tuner, untimed_choice

FEATURES = 32            # the kernel takes multiples of these
BLOCK, PADDING = 64, 32  # in cpp/packing.h: tokens and words are packed in blocks; a row in memory has some elements more
LARGER = 4               # times the default number of tokens in a chunk: for many threads, and fewer passes over dW
MOST_BYTES = LARGER * CHUNK_BYTES["cpu"]  # of the logits of such a chunk


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
    x, weight, kernels = x.contiguous(), weight.contiguous(), library("head_loss")
    total, dx, dw = empty_gradients(x, weight)
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
    return empty_gradients(x.contiguous(), weight.contiguous())


def _rounded_up(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


WAYS = {"torch": chunked_gradients, "brgemm": head_loss_gradients}


def choose_head_loss(lm_head, tokens: int, dtype: torch.dtype, vocab_size: int, *, plain: bool = True, chunk_tokens: int = 0,
                     compiled: bool = False, tuner: Tuner | None = None, wanted: str = "auto",
                     recorded: str | None = None) -> Choice:
    """How head and loss are computed in chunks: by PyTorch's products (`torch`) or by the kernel (`brgemm`), and on a CPU with
    the default number of tokens in a chunk or with more ("torch 4096"). Whichever takes the least time, forward and backward.

    tokens: of a micro-batch.   plain: whether ChunkedCrossEntropy computes the products of lm_head, which then is a `Linear`.
    chunk_tokens: --ce-chunk-tokens; 0 lets the number be chosen.   compiled: whether the model is.   wanted: --head-loss.
    recorded: the choice of the run to be resumed.
    Raises: UserError where `brgemm` is wanted and does not work.
    """
    weight, device = lm_head.weight.detach(), lm_head.weight.device
    why_not = unavailable_reason(dtype, device.type, weight.size(1)) if plain else "lm_head computes its products itself"
    ways = ["torch"] if why_not else ["torch", "brgemm"]
    if recorded:
        way = recorded.split()[0]
        recorded = None if way not in ways else way if chunk_tokens else recorded
    if choice := untimed_choice("--head-loss", wanted, "torch", "brgemm", why_not if wanted == "brgemm" else None, recorded):
        return choice
    default = chunk_tokens or default_chunk(len(weight), dtype, device.type)
    chunks = {"": default}
    if plain and device.type == "cpu" and not chunk_tokens and default < tokens \
            and (larger := LARGER * default) * len(weight) * dtype.itemsize <= MOST_BYTES:
        chunks[f" {larger}"] = larger
    in_use, tokens = tokens, min(tokens, max(chunks.values()))
    random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change

    def gradients(way, chunk):
        def make():
            x = torch.randn(tokens, weight.size(1), generator=random).to(dtype)
            targets, cast = torch.randint(vocab_size, (tokens,), generator=random), weight.to(dtype)
            return lambda: WAYS[way](x, cast, targets, vocab_size, chunk, compiled, lm_head.own_weight_gradient)
        return make
    own = plain and lm_head.own_weight_gradient
    problem = (f"head and loss of {tokens} tokens, {'x'.join(map(str, weight.shape))} {dtype_name(dtype)}, chunks of {default}"
               + ", compiled" * compiled + ", own weight gradient" * own)
    return (tuner or Tuner(device, folder=None)).choose(
        problem, {way + name: gradients(way, chunk) for name, chunk in chunks.items() for way in ways},
        times_in_use=in_use / tokens)


def use_head_loss(loss: ChunkedCrossEntropy, name: str) -> None:
    """Let `loss` compute the products of a plain head in the way of this name of a choice."""
    way, _, chunk = name.partition(" ")
    loss.gradients, loss.chunk_tokens = WAYS[way], int(chunk or loss.chunk_tokens)
