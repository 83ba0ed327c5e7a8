"""RMSNorm, and the two places of a block where it follows a sum: plain, and as operators of one pass each way.

RMSNorm without gain (arXiv 1910.07467) over the last axis, of C channels, in fp32 whatever the dtype of x:

    r = 1 / sqrt(mean(x^2) + eps),    norm(x) = r x

A block makes two sums and norms each of them (a, b: the layer's two scalars, x0: the normed embedding):

    mix_norm    x' = a x + b x0    before attention
    add_norm    x' = x + y         before the MLP, y being what attention gives

Both results are wanted, x' and norm(x'), and two gradients arrive, dx' and dn. With g = dn and n = norm(x'), row by row:

    d = dx' + r (g - n mean(g n))         the whole gradient of x'
    add_norm    dx = dy = d
    mix_norm    dx = a d,  dx0 = b d,  da = sum(d x),  db = sum(d x0), the sums over all tokens and channels

The plain versions leave all of that to autograd, and its fusion to the compiler. The fused ones are a kernel forward and
a kernel backward, in which every tensor is read once. `mix_norm` keeps x, x0 and r and makes x' again, `add_norm` keeps
x' and r. The sums for a and b are one number per row in fp32, added in fp64: the same bits every time.

The kernels are Triton, for CUDA, and no GPU has run them yet. On a CPU they would not pay (dev/LOG.md): there the same
operators are plain PyTorch, for tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, the CPU build of torch
    triton = None

EPS = torch.finfo(torch.float32).eps  # F.rms_norm's own, also for bf16 and fp16
PER_WARP = 256                        # channels, 8 of them per thread: 16 bytes of bf16


def rms_norm(x: Tensor) -> Tensor:
    """x (..., C) with every row of C channels divided by its root mean square, in the dtype of x."""
    return F.rms_norm(x, (x.size(-1),))


def mix_norm(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """x' = a x + b x0, and norm(x'). x and x0 (..., C) of one dtype, a and b 0-d fp32."""
    x = a * x + b * x0
    return x, rms_norm(x)


def add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x' = x + y, and norm(x'). x and y (..., C) of one dtype."""
    x = x + y
    return x, rms_norm(x)


def fused_mix_norm(x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`mix_norm` in one pass. x' is rounded once, where the plain one, uncompiled, rounds each product too."""
    return sum_and_norm(x, x0, a, b)[:2]


def fused_add_norm(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`add_norm` in one pass."""
    return sum_and_norm(x, y, None, None)[:2]


def kernels_for(device_type: str) -> str | None:
    """In what the fused passes are written that serve there, None where there are none."""
    return "Triton" if device_type == "cuda" and triton else None


# ---------------------------------------------------------------------------------------------------------------------
# The operators, into which compilers do not look

@torch.library.custom_op("nanochat::sum_and_norm", mutates_args=())
def sum_and_norm(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x' = a x + b y, or x + y without a and b; norm(x'), both (..., C); and r (...,) in fp32."""
    run = forward_with_triton if kernels_for(x.device.type) else forward_plainly
    return run(x.contiguous(), y.contiguous(), a, b)


@sum_and_norm.register_fake
def _(x, y, a, b):
    return _room_for_output(x)


@torch.library.custom_op("nanochat::add_norm_backward", mutates_args=())
def add_norm_backward(mixed: Tensor, r: Tensor, d_mixed: Tensor, d_normed: Tensor) -> Tensor:
    """The gradient d (..., C) of x', which is that of both summands."""
    run = backward_with_triton if kernels_for(mixed.device.type) else backward_plainly
    return run(mixed, None, None, None, r, d_mixed.contiguous(), d_normed.contiguous())[0]


@add_norm_backward.register_fake
def _(mixed, r, d_mixed, d_normed):
    return _like(mixed)


@torch.library.custom_op("nanochat::mix_norm_backward", mutates_args=())
def mix_norm_backward(x: Tensor, y: Tensor, a: Tensor, b: Tensor, r: Tensor, d_mixed: Tensor,
                      d_normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx and dy (..., C), and the gradients of a and b as one tensor (2,) in fp32."""
    run = backward_with_triton if kernels_for(x.device.type) else backward_plainly
    dx, dy, sums = run(x.contiguous(), y.contiguous(), a, b, r, d_mixed.contiguous(), d_normed.contiguous())
    return dx, dy, sums.sum(1, dtype=torch.float64).float()


@mix_norm_backward.register_fake
def _(x, y, a, b, r, d_mixed, d_normed):
    return _like(x), _like(y), x.new_empty(2, dtype=torch.float32)


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


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _room_for_output(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# A pass each way, on contiguous tensors: in plain PyTorch, and in Triton

def _mixed(x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if y is None:
        return x
    return (x.float() + y.float() if a is None else a * x.float() + b * y.float()).to(x.dtype)


def forward_plainly(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x', norm(x') and r, as `sum_and_norm` gives them."""
    mixed = _mixed(x, y, a, b)
    r = torch.rsqrt(mixed.float().square().mean(-1) + EPS)
    return mixed, (mixed.float() * r[..., None]).to(x.dtype), r


def backward_plainly(x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, r: Tensor, d_mixed: Tensor,
                     d_normed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dy, and the sums of d x and d y, (2, rows) in fp32, for each row. Without y, a and b: x is x', and dx is d."""
    normed, g = _mixed(x, y, a, b).float() * r[..., None], d_normed.float()
    d = d_mixed.float() + r[..., None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    if a is None:
        return d.to(x.dtype), None, None
    sums = torch.stack([(d * x.float()).sum(-1).flatten(), (d * y.float()).sum(-1).flatten()])
    return (a * d).to(x.dtype), (b * d).to(y.dtype), sums


def forward_with_triton(x: Tensor, y: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    out = _room_for_output(x)
    _forward_kernel[out[2].numel(),](x, y, a, b, *out, x.size(-1), EPS, **_launch(x.size(-1)))
    return out


def backward_with_triton(x: Tensor, y: Tensor | None, a: Tensor | None, b: Tensor | None, r: Tensor, d_mixed: Tensor,
                         d_normed: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dx, rows = _like(x), r.numel()
    dy, sums = (None, None) if a is None else (_like(y), r.new_empty(2, rows))
    _backward_kernel[rows,](x, y, a, b, r, d_mixed, d_normed, dx, dy, sums, rows, x.size(-1), **_launch(x.size(-1)))
    return dx, dy, sums


def _launch(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return dict(BLOCK=block, num_warps=min(max(block // PER_WARP, 1), 16))


if triton:
    @triton.jit
    def _forward_kernel(x, y, a, b, mixed, normed, r, width, eps, BLOCK: tl.constexpr):
        """A row. Without a and b (None) the sum is x + y."""
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
        """A row. Without y, a, b, dy and sums (None) x is the sum already, and dx its gradient."""
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
