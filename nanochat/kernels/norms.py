"""RMSNorm, and its two fusions with the sum before it: reference implementations and fused kernels.

RMSNorm without gain (arXiv 1910.07467) over the last axis, of C channels, in fp32 whatever the dtype of x:

    r = 1 / sqrt(mean(x^2) + eps),    norm(x) = r x

A block computes a sum and its norm twice (a, b: the layer's scalars, x0: the normed embedding, y: the output of attention):

    mix_norm    x' = a x + b x0    before attention
    add_norm    x' = x + y         before the MLP

Both x' and norm(x') are outputs, so two gradients arrive: dx' and dn. With g = dn and n = norm(x'), for each row:

    d = dx' + r (g - n mean(g n))         the total gradient of x'
    add_norm    dx = dy = d
    mix_norm    dx = a d,  dx0 = b d,  da = sum(d x),  db = sum(d x0), summed over all tokens and channels

The reference implementations leave the backward pass to autograd, and fusion to the compiler. The fused versions have one
forward and one backward kernel, which read every tensor once. `mix_norm` saves x, x0 and r and computes x' again; `add_norm`
saves x' and r. The gradients of a and b are one fp32 number per row, summed in fp64: deterministic.

The fused kernels are written in Triton for CUDA and no GPU has run them yet. On a CPU fusion does not pay (dev/LOG.md); there
the same operators run in PyTorch, for tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.runtime.toolchain import triton_runs_on

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, the CPU build of torch
    triton = None

EPS = torch.finfo(torch.float32).eps  # the default of F.rms_norm, also for bf16 and fp16
PER_WARP = 256                        # channels per warp: 8 per thread, 16 bytes of bf16


def rms_norm(x: Tensor) -> Tensor:
    """Divide every row of x (..., C) by its root mean square; the same dtype."""
    return F.rms_norm(x, (x.size(-1),))


def mix(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x' = a x + b x0. x and x0 (..., C) of one dtype, a and b 0-d fp32."""
    return a * x + b * x0


def mix_norm(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x' = a x + b x0, and norm(x'): the reference. x and x0 (..., C) of one dtype, a and b 0-d fp32."""
    x = mix(x, x0, a, b)
    return x, rms_norm(x)


def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x' = x + y, and norm(x'): the reference. x and y (..., C) of one dtype."""
    x = x + y
    return x, rms_norm(x)


def fused_mix_norm(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Fused `mix_norm`. x' is rounded once; the reference, uncompiled, also rounds each product."""
    return sum_and_norm(x, x0, a, b)[:2]


def fused_add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Fused `add_norm`."""
    return sum_and_norm(x, y, None, None)[:2]


def kernels_for(device_type: str) -> str | None:
    """Language of the fused kernels for this device: "Triton", or None where there are none."""
    return "Triton" if triton_runs_on(device_type) else None


# ---------------------------------------------------------------------------------------------------------------------
# Custom operators, opaque to torch.compile

@torch.library.custom_op("nanochat::sum_and_norm", mutates_args=())
def sum_and_norm(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x' = a x + b y (x + y if a and b are None), norm(x'), both (..., C), and r (...) fp32."""
    run = forward_triton if kernels_for(x.device.type) else forward_reference
    return run(x.contiguous(), y.contiguous(), a, b)


@sum_and_norm.register_fake
def _(x, y, a, b):
    return _empty_output(x)


@torch.library.custom_op("nanochat::add_norm_backward", mutates_args=())
def add_norm_backward(mixed: Tensor, r: Tensor, d_mixed: Tensor, d_normed: Tensor) -> Tensor:
    """The gradient d (..., C) of x' = `mixed`, which is also that of x and y."""
    run = backward_triton if kernels_for(mixed.device.type) else backward_reference
    return run(mixed, None, None, None, r, d_mixed.contiguous(), d_normed.contiguous())[0]


@add_norm_backward.register_fake
def _(mixed, r, d_mixed, d_normed):
    return _empty_like(mixed)


@torch.library.custom_op("nanochat::mix_norm_backward", mutates_args=())
def mix_norm_backward(x: Tensor, y: Tensor, a: Tensor, b: Tensor, r: Tensor, d_mixed: Tensor,
                      d_normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dy (..., C), and the gradients of a and b as one fp32 tensor (2,)."""
    run = backward_triton if kernels_for(x.device.type) else backward_reference
    dx, dy, sums = run(x.contiguous(), y.contiguous(), a, b, r, d_mixed.contiguous(), d_normed.contiguous())
    return dx, dy, sums.sum(1, dtype=torch.float64).float()


@mix_norm_backward.register_fake
def _(x, y, a, b, r, d_mixed, d_normed):
    return _empty_like(x), _empty_like(y), x.new_empty(2, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.mixes = inputs[2] is not None
    mixed, _, r = output
    ctx.save_for_backward(*((*inputs, r) if ctx.mixes else (mixed, r)))


def _backward(ctx, d_mixed, d_normed, _):
    if ctx.mixes:
        dx, dy, scalars = mix_norm_backward(*ctx.saved_tensors, d_mixed, d_normed)
        return dx, dy, *scalars.unbind()
    d = add_norm_backward(*ctx.saved_tensors, d_mixed, d_normed)
    return d, d, None, None


sum_and_norm.register_autograd(_backward, setup_context=_setup_context)


def _empty_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _empty_output(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(x), _empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Forward and backward kernels on contiguous tensors, in PyTorch (reference) and in Triton

def _mixed(x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if y is None:
        return x
    return (x.float() + y.float() if a is None else a * x.float() + b * y.float()).to(x.dtype)


def forward_reference(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x', norm(x') and r, as in `sum_and_norm`."""
    mixed = _mixed(x, y, a, b)
    r = torch.rsqrt(mixed.float().square().mean(-1) + EPS)
    return mixed, (mixed.float() * r[..., None]).to(x.dtype), r


def backward_reference(x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, r: Tensor, d_mixed: Tensor,
                     d_normed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx and dy (..., C), and per row the sums of d x and d y, (2, rows) fp32. If y, a, b are None: x is x', dx is d."""
    normed, g = _mixed(x, y, a, b).float() * r[..., None], d_normed.float()
    d = d_mixed.float() + r[..., None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    if a is None:
        return d.to(x.dtype), None, None
    sums = torch.stack([(d * x.float()).sum(-1).flatten(), (d * y.float()).sum(-1).flatten()])
    return (a * d).to(x.dtype), (b * d).to(y.dtype), sums


def forward_triton(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    out = _empty_output(x)
    _forward_kernel[out[2].numel(),](x, y, a, b, *out, x.size(-1), EPS, **_launch(x.size(-1)))
    return out


def backward_triton(x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, r: Tensor, d_mixed: Tensor,
                         d_normed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dx, rows = _empty_like(x), r.numel()
    dy, sums = (None, None) if a is None else (_empty_like(y), r.new_empty(2, rows))
    _backward_kernel[rows,](x, y, a, b, r, d_mixed, d_normed, dx, dy, sums, rows, x.size(-1), **_launch(x.size(-1)))
    return dx, dy, sums


def _launch(width: int) -> dict:
    """Launch options for rows of `width` channels: one program per row."""
    block = triton.next_power_of_2(width)
    return dict(BLOCK=block, num_warps=min(max(block // PER_WARP, 1), 16))


if triton:
    @triton.jit
    def _forward_kernel(x, y, a, b, mixed, normed, r, width, eps, BLOCK: tl.constexpr):
        """One row. If a and b are None the sum is x + y."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside, at = columns < width, row * width + columns
        m = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        added = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        if a is not None:
            m, added = tl.load(a) * m, tl.load(b) * added
        rounded = (m + added).to(mixed.dtype.element_ty)
        tl.store(mixed + at, rounded, mask=inside)
        m = rounded.to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(m * m) / width + eps)
        tl.store(r + row, scale)
        tl.store(normed + at, m * scale, mask=inside)

    @triton.jit
    def _backward_kernel(x, y, a, b, r, d_mixed, d_normed, dx, dy, sums, rows, width, BLOCK: tl.constexpr):
        """One row. If y, a, b, dy and sums are None, x is the sum x' and dx its gradient."""
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside, at = columns < width, row * width + columns
        first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        m = first
        if a is not None:
            second = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
            of_first, of_second = tl.load(a), tl.load(b)
            m = (of_first * first + of_second * second).to(x.dtype.element_ty).to(tl.float32)
        scale = tl.load(r + row)
        normed, g = m * scale, tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(d_mixed + at, mask=inside, other=0.0).to(tl.float32)
        d += scale * (g - normed * (tl.sum(g * normed) / width))
        if a is None:
            tl.store(dx + at, d, mask=inside)
        else:
            tl.store(dx + at, of_first * d, mask=inside)
            tl.store(dy + at, of_second * d, mask=inside)
            tl.store(sums + row, tl.sum(d * first))
            tl.store(sums + rows + row, tl.sum(d * second))
