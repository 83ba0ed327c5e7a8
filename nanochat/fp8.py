"""FP8 training of a linear layer: three matrix products on eight-bit operands.

A layer y = x W^T, for M tokens x (M, K) and a weight W (N, K), costs three products in a training step:

    output           y  = x   W^T    (M, K) x (K, N)    sums over the K inputs
    input gradient   dx = g   W      (M, N) x (N, K)    sums over the N outputs
    weight gradient  dW = g^T x      (N, M) x (M, K)    sums over the M tokens

FP8 units multiply twice as fast as bf16 ones and add up in fp32 (arXiv 2209.05433). x and W become e4m3: 3 bits of
mantissa, up to 448. The gradient g = dL/dy spans more magnitudes and becomes e5m2: 2 bits, up to 57 344. So few
magnitudes fit only after scaling: a tensor is multiplied by s = (largest of the format) / (largest of the tensor) before
it is rounded, one scale per tensor, taken from the tensor itself each time, and the product is divided by both scales.
Nothing can overflow then, where e5m2 would turn an excess into infinity, and the usual clamp is needless.

The units want both operands stored with the summed dimension last: the first row-major, the second column-major. Each
tensor is summed over both of its dimensions, x over K and later over M, and FP8 cannot be transposed on the way into the
units as bf16 can. So each is written twice, as it is and transposed, by one kernel that reads it once. For its backward
pass a layer keeps x transposed in FP8, half the bytes of bf16. The operands of an optimizer step's products with W are
the same for all its micro-batches: W is cast once per step.

Two steps make a cast. The largest magnitude is plain PyTorch, row by row, so that a compiler joins it to whatever
computes the tensor. Cast and transpose are an operator of their own, into which compilers do not look: they would
otherwise keep the wide tensor and cast it again in the backward pass, and round before or after other arithmetic.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS, the CPU build of torch
    triton = None

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16   # of which every dimension of an FP8 product must be a multiple
FLOOR = 1e-20   # of a tensor's largest magnitude: keeps the scale of a tensor of zeros finite
TILE = 128      # rows and columns that one program of the kernel casts


@dataclass(frozen=True)
class Float8LinearConfig:
    """How a Float8Linear computes. Scaling is tensorwise and dynamic: one scale per tensor, of its present values."""
    fast_accum: bool = False        # add up the output with fewer bits: faster on Hopper; the gradients never do
    weight_grad_bf16: bool = False  # round the weight gradient of a micro-batch to bf16
    cache_weights: bool = False     # use the weights that `refresh_weights` cast last, instead of casting at every call
    allow_in_graph: bool = True     # hide the layer's inside from torch.compile's front end (not from its back end)
    emulate: bool = False           # multiply the rounded operands in fp32: for GPUs without FP8 units

    @staticmethod
    def from_recipe_name(recipe: str) -> "Float8LinearConfig":
        if recipe != "tensorwise":
            raise ValueError(f"there is no recipe {recipe!r} here, only 'tensorwise' (torchao has 'rowwise')")
        return Float8LinearConfig()


def largest_magnitude(x: Tensor) -> Tensor:
    """Largest |element| of x (M, N) as a 0-d fp32 tensor. By rows first, as what computes x often goes by rows too."""
    return torch.linalg.vector_norm(x, float("inf"), dim=-1).amax().float()


@torch.library.custom_op("nanochat::fp8_cast", mutates_args=())
def fp8_cast(x: Tensor, largest: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, N) scaled and rounded to `dtype`; the same transposed (N, M), or empty unless asked for; 1/scale, 0-d fp32.

    largest: the largest magnitude in x, 0-d fp32.
    """
    q, q_t, inverse = _room_for_cast(x, dtype, transpose)
    cast_into(x, largest, q, q_t, inverse)
    return q, q_t, inverse


@fp8_cast.register_fake
def _(x, largest, dtype, transpose):
    return _room_for_cast(x, dtype, transpose)


def _room_for_cast(x: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    return (x.new_empty(rows, columns, dtype=dtype), x.new_empty((columns, rows) if transpose else 0, dtype=dtype),
            x.new_empty((), dtype=torch.float32))


def cast_into(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor) -> None:
    """`fp8_cast` into tensors at hand: by the kernel on GPUs with FP8, by plain PyTorch elsewhere."""
    cast = cast_with_triton if triton and fp8_trouble(x.device) is None else cast_plainly
    cast(x.contiguous(), largest, q, q_t, inverse)


def cast_plainly(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor) -> None:
    # a number over a tensor would be its reciprocal times the number, rounded twice
    scale = torch.full_like(largest, torch.finfo(q.dtype).max) / largest.clamp_min(FLOOR)
    inverse.copy_(scale.reciprocal())
    q.copy_(x.float() * scale)
    if q_t.numel():
        q_t.copy_(q.t())


def cast_with_triton(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor) -> None:
    rows, columns = x.shape
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    _cast_kernel[grid](x, largest, q, q_t, inverse, rows, columns, torch.finfo(q.dtype).max, FLOOR,
                       TRANSPOSE=q_t.numel() > 0, TILE=TILE, num_warps=8)


if triton:
    @triton.jit
    def _cast_kernel(x, largest, q, q_t, inverse, M, N, format_max, floor, TRANSPOSE: tl.constexpr, TILE: tl.constexpr):
        """One tile of x (M, N): read once, scaled, rounded, and written to q (M, N) and to q_t (N, M)."""
        bound = tl.load(largest)
        scale = tl.div_rn(format_max, tl.where(bound < floor, floor, bound))  # a NaN stays one, unlike in a maximum
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
    """a (m, k) FP8 row-major times b (k, n) FP8 column-major, divided by their scales: (m, n), summed in fp32."""
    if emulate:
        return (a.float() @ b.float() * (inverse_a * inverse_b)).to(out_dtype)
    return torch._scaled_mm(a, b, inverse_a, inverse_b, out_dtype=out_dtype, use_fast_accum=fast_accum)


class _Float8Product(torch.autograd.Function):
    """y (M, N) of x (M, K) and the weight (N, K), whose cast is given: w (N, K), w_t (K, N) and 1/scale."""

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
    return _Float8Product.apply(*args)


@torch._dynamo.allow_in_graph
def float8_product_in_graph(*args) -> Tensor:
    return _Float8Product.apply(*args)


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in FP8. Made by `from_float`; weight and bias are that layer's own, so that names
    and values in a state dict are as before. x (..., K) -> (..., N) in the dtype of x."""

    @classmethod
    def from_float(cls, linear: nn.Linear, config: Float8LinearConfig = Float8LinearConfig()) -> "Float8Linear":
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=False)
        new.weight, new.bias, new.config = linear.weight, linear.bias, config
        new.train(linear.training)
        if config.cache_weights:
            for name, tensor in zip(("w", "w_t", "w_inverse"), _room_for_cast(linear.weight.detach(), E4M3, True), strict=True):
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
    """Cast the weights of layers with `cache_weights`, in place: before they are first used, and whenever they changed."""
    layers = list(layers)
    largest = torch._foreach_norm([layer.weight for layer in layers], float("inf")) if layers else []
    for layer, norm in zip(layers, largest, strict=True):
        cast_into(layer.weight, norm.float(), layer.w, layer.w_t, layer.w_inverse)


def fits_fp8(in_features: int, out_features: int) -> bool:
    """Whether a layer's sizes suit the units."""
    return in_features % MULTIPLE == 0 and out_features % MULTIPLE == 0


def convert_to_float8_training(module: nn.Module, *, config: Float8LinearConfig | None = None,
                               module_filter_fn: Callable[[nn.Module, str], bool] | None = None) -> nn.Module:
    """Put a Float8Linear in the place of each linear layer inside `module` whose sizes fit and of which
    `module_filter_fn(layer, name)` is true."""
    for name, layer in list(module.named_modules()):
        if name and isinstance(layer, nn.Linear) and fits_fp8(layer.in_features, layer.out_features):
            if module_filter_fn is None or module_filter_fn(layer, name):
                module.set_submodule(name, Float8Linear.from_float(layer, config or Float8LinearConfig()))
    return module


@functools.cache
def fp8_trouble(device: torch.device) -> str | None:
    """Why the device cannot multiply in FP8; None where it can."""
    if device.type != "cuda":
        return f"a device of type {device.type} has no FP8 units"
    if torch.version.hip:
        return "on AMD GPUs FP8 is not supported here"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        return f"{torch.cuda.get_device_name(device)} (sm_{''.join(map(str, capability))}) has no FP8 units: sm_89 was the first"
