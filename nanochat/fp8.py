"""FP8 training of linear layers: all three matrix products of a layer on 8-bit operands.

A layer y = x W^T, for M tokens x (M, K) and a weight W (N, K), computes three products in a training step:

    output           y  = x   W^T    (M, K) x (K, N)    sums over the K inputs
    input gradient   dx = g   W      (M, N) x (N, K)    sums over the N outputs
    weight gradient  dW = g^T x      (N, M) x (M, K)    sums over the M tokens

FP8 tensor cores multiply twice as fast as bf16 ones and accumulate in fp32 (arXiv 2209.05433). x and W are cast to e4m3 (3 bits
of mantissa, up to 448). The gradient g = dL/dy has a wider range and is cast to e5m2 (2 bits of mantissa, up to 57 344).

Scaling is dynamic and tensorwise: before the cast a tensor is multiplied by s = (largest value of the format) / (largest
magnitude in the tensor), and the product is divided by both scales. So nothing can overflow and no clamp is needed.

The tensor cores need both operands stored with the summed dimension last: the first row-major, the second column-major. Each
tensor is summed over both of its dimensions (x over K, and later over M), and unlike bf16, FP8 cannot be transposed while it is
loaded. So one kernel reads a tensor once and writes its cast twice: as it is, and transposed. For its backward pass a layer
saves x transposed in FP8, half the bytes of bf16. The casts of W are the same for all micro-batches of an optimizer step, so W
can be cast once per step.

A cast has two parts. The largest magnitude is plain PyTorch, so that the compiler fuses it into the operation that computes
the tensor. Cast and transpose are a custom operator, opaque to torch.compile, which otherwise would keep the wide tensor, cast
it again in the backward pass, and change the order of rounding and other arithmetic.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.runtime.toolchain import triton_runs_on

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, the CPU build of torch
    triton = None

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16   # every dimension of an FP8 product must be a multiple of this
FLOOR = 1e-20   # lower bound of a tensor's largest magnitude: keeps the scale of a tensor of zeros finite
TILE = 128      # rows and columns per program of the Triton kernel


@dataclass(frozen=True)
class Float8LinearConfig:
    """Options of a Float8Linear."""
    fast_accum: bool = False        # accumulate the output with fewer bits, faster on Hopper; never the gradients
    weight_grad_bf16: bool = False  # round the weight gradient of a micro-batch to bf16
    cache_weights: bool = False     # use the weights cast by the last `refresh_weights` instead of casting in every forward
    allow_in_graph: bool = True     # opaque to Dynamo, torch.compile's front end, but not to its back end
    emulate: bool = False           # multiply the rounded operands in fp32, on GPUs without FP8 tensor cores; CPUs always do

    @staticmethod
    def from_recipe_name(recipe: str) -> "Float8LinearConfig":
        """The config of a recipe of torchao. Raises: ValueError for any but `tensorwise`."""
        if recipe != "tensorwise":
            raise ValueError(f"there is no recipe {recipe!r} here, only 'tensorwise' (torchao has 'rowwise')")
        return Float8LinearConfig()


def largest_magnitude(x: Tensor) -> Tensor:
    """Largest |element| of x (M, N), 0-d fp32. First per row, so that it fuses with operations that go by rows."""
    return torch.linalg.vector_norm(x, float("inf"), dim=-1).amax().float()


@torch.library.custom_op("nanochat::fp8_cast", mutates_args=())
def fp8_cast(x: Tensor, largest: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scale x (M, N) and cast it to `dtype`. Returns the cast (M, N), its transpose (N, M), and 1/scale (0-d fp32).

    largest: largest magnitude in x, 0-d fp32.   transpose: False leaves the second result empty.
    """
    q, q_t, inverse = _empty_cast(x, dtype, transpose)
    cast_into(x, largest, q, q_t, inverse)
    return q, q_t, inverse


@fp8_cast.register_fake
def _(x, largest, dtype, transpose):
    return _empty_cast(x, dtype, transpose)


def _empty_cast(x: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    return (x.new_empty(rows, columns, dtype=dtype), x.new_empty((columns, rows) if transpose else 0, dtype=dtype),
            x.new_empty((), dtype=torch.float32))


def cast_into(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor) -> None:
    """`fp8_cast` into existing tensors: by the Triton kernel on GPUs with FP8, by the reference elsewhere."""
    cast = cast_triton if triton_runs_on(x.device.type) and fp8_unavailable_reason(x.device) is None else cast_reference
    cast(x.contiguous(), largest, q, q_t, inverse)


def cast_reference(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor) -> None:
    """`cast_into` in PyTorch: the reference implementation."""
    # tensor / tensor rounds once; PyTorch computes number / tensor as reciprocal times number, which rounds twice
    scale = torch.full_like(largest, torch.finfo(q.dtype).max) / largest.clamp_min(FLOOR)
    inverse.copy_(scale.reciprocal())
    q.copy_(x.float() * scale)
    if q_t.numel():
        q_t.copy_(q.t())


def cast_triton(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor) -> None:
    """`cast_into` in Triton, one program per tile."""
    rows, columns = x.shape
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    _cast_kernel[grid](x, largest, q, q_t, inverse, rows, columns, torch.finfo(q.dtype).max, FLOOR,
                       TRANSPOSE=q_t.numel() > 0, TILE=TILE, num_warps=8)


if triton:
    @triton.jit
    def _cast_kernel(x, largest, q, q_t, inverse, M, N, format_max, floor, TRANSPOSE: tl.constexpr, TILE: tl.constexpr):
        """One tile of x (M, N): read once, scaled, rounded, written to q (M, N) and q_t (N, M)."""
        bound = tl.load(largest)
        scale = tl.div_rn(format_max, tl.where(bound < floor, floor, bound))  # NaN stays NaN; tl.maximum would drop it
        rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
        columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
        inside = (rows < M) & (columns < N)
        tile = (tl.load(x + rows * N + columns, mask=inside, other=0.0).to(tl.float32) * scale).to(q.dtype.element_ty)
        tl.store(q + rows * N + columns, tile, mask=inside)
        if TRANSPOSE:
            tl.store(q_t + columns * M + rows, tile, mask=inside)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(inverse, tl.div_rn(1.0, scale))


def scaled_mm(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, out_dtype: torch.dtype,
              fast_accum: bool = False, emulate: bool = False) -> Tensor:
    """Product of a (m, k) row-major and b (k, n) column-major in FP8, times `inverse_a` and `inverse_b` (1/scale, 0-d fp32):
    (m, n) in `out_dtype`, summed and scaled in fp32 and rounded once. A CPU always emulates FP8 units."""
    if emulate or a.device.type == "cpu":
        return emulated_mm(a, b, inverse_a, inverse_b, out_dtype)
    return torch._scaled_mm(a, b, inverse_a, inverse_b, out_dtype=out_dtype, use_fast_accum=fast_accum)


@torch.library.custom_op("nanochat::fp8_emulated_mm", mutates_args=())
def emulated_mm(a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`scaled_mm` by a product in fp32, into which FP8 numbers and the product of two of them fit exactly: so the result is that
    of FP8 units but for rounding in fp32. On CPUs with AMX torch._scaled_mm takes a thousand times as long. A product in
    bf16, as exact in its terms and faster, returns sums that are rounded to bf16 before they are scaled and rounded again.

    An operator opaque to the compiler, which would fuse the last rounding with what follows and leave it out.
    """
    return (a.float() @ b.float()).mul_(inverse_a * inverse_b).to(out_dtype)


@emulated_mm.register_fake
def _(a, b, inverse_a, inverse_b, out_dtype):
    return a.new_empty(a.size(0), b.size(1), dtype=out_dtype)


class _Float8Product(torch.autograd.Function):
    """y (M, N) of x (M, K) and weight (N, K), whose cast is passed in: w (N, K), w_t (K, N) and 1/scale (0-d)."""

    @staticmethod
    def forward(ctx, x, weight, w, w_t, w_inverse, fast_accum, weight_grad_bf16, emulate):
        q, q_t, inverse = fp8_cast(x, largest_magnitude(x), E4M3, True)
        ctx.save_for_backward(q_t, inverse, w_t, w_inverse)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.weight_grad_bf16, ctx.emulate = weight_grad_bf16, emulate
        return scaled_mm(q, w.t(), inverse, w_inverse, x.dtype, fast_accum, emulate)

    @staticmethod
    def backward(ctx, g):
        x_t, x_inverse, w_t, w_inverse = ctx.saved_tensors
        q, q_t, inverse = fp8_cast(g, largest_magnitude(g), E5M2, True)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = scaled_mm(q, w_t.t(), inverse, w_inverse, ctx.x_dtype, emulate=ctx.emulate)
        if ctx.needs_input_grad[1]:
            dtype = torch.bfloat16 if ctx.weight_grad_bf16 else torch.float32
            dw = scaled_mm(q_t, x_t.t(), inverse, x_inverse, dtype, emulate=ctx.emulate).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None, None, None


def float8_product(*args) -> Tensor:
    """`_Float8Product`, traced by torch.compile."""
    return _Float8Product.apply(*args)


@torch._dynamo.allow_in_graph
def float8_product_in_graph(*args) -> Tensor:
    """`_Float8Product` as one node of Dynamo's graph."""
    return _Float8Product.apply(*args)


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in FP8: x (..., K) -> (..., N) in the dtype of x. Make it with `from_float`.

    Raises: ValueError in training where the number of tokens is no multiple of 16.
    """

    @classmethod
    def from_float(cls, linear: nn.Linear, config: Float8LinearConfig = Float8LinearConfig()) -> "Float8Linear":
        """An FP8 layer that shares weight and bias with `linear`, so a state dict keeps its names and values."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=False)
        new.weight, new.bias, new.config = linear.weight, linear.bias, config
        new.train(linear.training)
        if config.cache_weights:
            for name, tensor in zip(("w", "w_t", "w_inverse"), _empty_cast(linear.weight.detach(), E4M3, True), strict=True):
                new.register_buffer(name, tensor, persistent=False)
        return new

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (M, K)
        config, weight = self.config, self.weight
        if config.cache_weights:
            cast = self.w, self.w_t, self.w_inverse
        else:
            cast = fp8_cast(weight.detach(), largest_magnitude(weight.detach()), E4M3, True)
        if torch.is_grad_enabled():
            if len(rows) % MULTIPLE:
                raise ValueError(f"FP8 training takes tokens in multiples of {MULTIPLE}, not {len(rows)}")
            product = float8_product_in_graph if config.allow_in_graph else float8_product
            y = product(rows, weight, *cast, config.fast_accum, config.weight_grad_bf16, config.emulate)
        else:
            q, _, inverse = fp8_cast(rows, largest_magnitude(rows), E4M3, False)
            y = scaled_mm(q, cast[0].t(), inverse, cast[2], x.dtype, config.fast_accum, config.emulate)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@torch.no_grad()
def refresh_weights(layers: Iterable[Float8Linear]) -> None:
    """Cast the weights of layers with `cache_weights`, in place. Call it before their first use and after each update."""
    layers = list(layers)
    largest = torch._foreach_norm([layer.weight for layer in layers], float("inf")) if layers else []
    for layer, norm in zip(layers, largest, strict=True):
        cast_into(layer.weight, norm.float(), layer.w, layer.w_t, layer.w_inverse)


def fits_fp8(in_features: int, out_features: int) -> bool:
    """Whether both dimensions of a weight are multiples that FP8 tensor cores take."""
    return in_features % MULTIPLE == 0 and out_features % MULTIPLE == 0


def convert_to_float8_training(module: nn.Module, *, config: Float8LinearConfig | None = None,
                               module_filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """Replace by a Float8Linear every linear layer in `module` that `fits_fp8` and that the filter accepts.

    module_filter_fn: (layer, its name in `module`) -> bool.
    """
    for name, layer in list(module.named_modules()):
        if name and isinstance(layer, nn.Linear) and fits_fp8(layer.in_features, layer.out_features):
            if module_filter_fn is None or module_filter_fn(layer, name):
                module.set_submodule(name, Float8Linear.from_float(layer, config or Float8LinearConfig()))
    return module


@functools.cache
def fp8_unavailable_reason(device: torch.device) -> str | None:
    """Why the device cannot multiply in FP8, or None."""
    if device.type != "cuda":
        return f"a device of type {device.type} has no FP8 tensor cores"
    if torch.version.hip:
        return "FP8 on AMD GPUs is not supported"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} (sm_{''.join(map(str, capability))}) has no FP8 tensor cores: sm_89 was the first"
