"""Rotary positions and norm of queries and keys in one pass: norm(rotary(x)) times a factor.

    z = (x1 cos + x2 sin, x2 cos - x1 sin)   of the halves x1 and x2 of a head's D features
    r = 1 / rms(z)
    y = scale r z

The reference leaves the fusion to the compiler. For bf16 on CPUs there is a C++ kernel (`cpp/elementwise.cpp`) that reads x once,
and in its backward pass y and the gradient once: with n = y / scale, g = scale dy and dz = r (g - n mean(g n)), dx is dz rotated
back. It computes in fp32 and rounds once, and keeps y and r for the backward pass, but not x. Where it is faster is measured
(`choose_rotary_norm`), for compiled models against what the compiler makes of the reference.
"""

import ctypes

import torch
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.kernels.norms import EPS, rms_norm
from nanochat.runtime.tuner import MOST_TOKENS, Choice, Tuner, untimed_choice

MULTIPLE = 32       # features of a head must be a multiple of this: two halves of whole vectors


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D): features i and i + D/2 are rotated by an angle that grows with the position.

    cos, sin: (1, T, 1, D/2). The product of a rotated query and key then depends on the distance of their positions only.
    """
    x1, x2 = x.chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


def rotary_norm(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """norm(rotary(x)) * scale, (B, T, H, D): the reference."""
    return rms_norm(apply_rotary(x, cos, sin)) * scale


def rotary_norm_cpp(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """`rotary_norm` in C++, for bf16 on a CPU with D a multiple of 32. cos and sin get no gradient."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return rotary_norm_forward(x, cos, sin, scale)[0]
    return _forward(x, cos, sin, scale)[0]  # a custom operator takes longer to call than this to compute a token


def unavailable_reason(dtype: torch.dtype, device_type: str, head_dim: int) -> str | None:
    """Why the C++ kernel cannot be used, or None."""
    if device_type != "cpu" or dtype != torch.bfloat16:
        return f"the kernel is for bfloat16 on a CPU, not for {dtype} on {device_type}"
    if head_dim % MULTIPLE:
        return f"the kernel takes heads of a multiple of {MULTIPLE} features, not of {head_dim}"
    return cpp_unavailable_reason("elementwise")


@torch.library.custom_op("nanochat::rotary_norm", mutates_args=(), device_types="cpu")
def rotary_norm_forward(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """y (B, T, H, D) bf16 and r (B, T, H) fp32, both contiguous."""
    return _forward(x, cos, sin, scale)


def _forward(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    y, r = _empty_output(x)
    x = _strided_by_token(x)
    sizes = (x.size(0) * x.size(1), *x.shape[1:])
    library("elementwise").rotary_norm_forward(
        *map(ctypes.c_int64, sizes), pointer(x), *map(ctypes.c_int64, x.stride()[1:3]), pointer(cos := cos.contiguous()),
        pointer(sin := sin.contiguous()), ctypes.c_float(scale), ctypes.c_float(EPS), pointer(y), pointer(r))
    return y, r


@rotary_norm_forward.register_fake
def _(x, cos, sin, scale):
    return _empty_output(x)


@torch.library.custom_op("nanochat::rotary_norm_backward", mutates_args=(), device_types="cpu")
def rotary_norm_backward(y: Tensor, r: Tensor, dy: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """dx (B, T, H, D) bf16, contiguous."""
    dx, dy = y.new_empty(y.shape), _strided_by_token(dy)
    sizes = (dy.size(0) * dy.size(1), *dy.shape[1:])
    library("elementwise").rotary_norm_backward(
        *map(ctypes.c_int64, sizes), pointer(y), pointer(r), pointer(dy), *map(ctypes.c_int64, dy.stride()[1:3]),
        pointer(cos := cos.contiguous()), pointer(sin := sin.contiguous()), ctypes.c_float(scale), pointer(dx))
    return dx


@rotary_norm_backward.register_fake
def _(y, r, dy, cos, sin, scale):
    return y.new_empty(y.shape)


def _setup_context(ctx, inputs, output):
    _, cos, sin, ctx.scale = inputs
    ctx.save_for_backward(*output, cos, sin)
    ctx.set_materialize_grads(False)  # r has no gradient; do not allocate zeros for it


def _backward(ctx, dy, _):
    y, r, cos, sin = ctx.saved_tensors
    return rotary_norm_backward(y, r, dy, cos, sin, ctx.scale), None, None, None


rotary_norm_forward.register_autograd(_backward, setup_context=_setup_context)


def _empty_output(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _strided_by_token(x: Tensor) -> Tensor:
    """x (B, T, H, D) such that features are contiguous, and the tokens of all rows one stride apart."""
    return x if x.stride(3) == 1 and (x.size(0) == 1 or x.stride(0) == x.size(1) * x.stride(1)) else x.contiguous()


def choose_rotary_norm(rows: int, seq_len: int, heads: int, cos: Tensor, sin: Tensor, scale: float, *, compiled: bool,
                       tuner: Tuner | None = None, wanted: str = "auto", recorded: str | None = None) -> Choice:
    """How rotary positions and norms of (rows, seq_len, heads, D) are computed: `torch` or `cpp`, whichever takes less time
    forward and backward.

    cos, sin: (1, seq_len, 1, D/2) in the compute dtype.   compiled: whether the model is, so that `torch` is timed compiled.
    wanted: --rotary-norm.   recorded: the choice of the run to be resumed.
    Raises: UserError where `cpp` is wanted and does not work.
    """
    device, dtype, head_dim = cos.device, cos.dtype, 2 * cos.size(-1)
    why_not = unavailable_reason(dtype, device.type, head_dim)
    if choice := untimed_choice("--rotary-norm", wanted, "torch", "cpp", why_not, recorded):
        return choice
    in_use, rows = rows, min(rows, max(1, MOST_TOKENS // seq_len))
    random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change
    functions = {"torch": torch.compile(rotary_norm, dynamic=False) if compiled else rotary_norm, "cpp": rotary_norm_cpp}

    def training_call(function):
        def make():
            x, dy = (torch.randn(rows, seq_len, heads, head_dim, generator=random).to(dtype) for _ in range(2))
            x.requires_grad_()
            return lambda: torch.autograd.grad(function(x, cos, sin, scale), x, dy)
        return make
    problem = f"rotary and norm {rows}x{seq_len}x{heads}x{head_dim}" + ", compiled" * compiled
    with torch.inference_mode(False), torch.enable_grad():
        return (tuner or Tuner(device, folder=None)).choose(
            problem, {name: training_call(f) for name, f in functions.items()}, times_in_use=in_use / rows)
