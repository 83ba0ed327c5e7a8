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
the tensor. Cast and transpose are one step that torch.compile neither splits nor repeats: a Triton kernel, which compiled code
launches by itself, or elsewhere an opaque operator. Otherwise the compiler would keep the wide tensor, cast it again in the
backward pass, and change the order of rounding and other arithmetic.

Two operations come before a cast in every step, and the kernel can compute them while it casts, so that their results are never
written in wide form: the MLP's squared ReLU (`joins_relu_square`), and the gradient of the loss for the logits
(`chunked_gradients`).
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.library import triton_op, wrap_triton

from nanochat.kernels.cross_entropy import SOFTCAP, loss_and_gradient, loss_triton
from nanochat.runtime.toolchain import triton_runs_on

try:
    import triton
    import triton.language as tl

    from nanochat.kernels.cross_entropy import gradient_of_logits
except ImportError:  # Windows, macOS, the CPU build of torch
    triton = None

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16   # every dimension of an FP8 product must be a multiple of this
FLOOR = 1e-20   # lower bound of a tensor's largest magnitude: keeps the scale of a tensor of zeros finite
TILE = 128      # rows and columns per program of the Triton kernels


@dataclass(frozen=True)
class Float8LinearConfig:
    """Options of a Float8Linear."""
    fast_accum: bool = False        # accumulate the output with fewer bits, faster on Hopper; never the gradients
    weight_grad_bf16: bool = False  # round the weight gradient of a micro-batch to bf16
    cache_weights: bool = False     # use the weights cast by the last `refresh_weights` instead of casting in every forward
    allow_in_graph: bool = True     # opaque to Dynamo, torch.compile's front end, but not to its back end
    emulate: bool = False           # multiply the rounded operands in fp32, on GPUs without FP8 tensor cores; CPUs always do
    joins_relu_square: bool = False  # the layer squares the ReLU of its input, while casting it: y = max(x, 0)^2 W^T

    @staticmethod
    def from_recipe_name(recipe: str) -> "Float8LinearConfig":
        """The config of a recipe of torchao. Raises: ValueError for any but `tensorwise`."""
        if recipe != "tensorwise":
            raise ValueError(f"there is no recipe {recipe!r} here, only 'tensorwise' (torchao has 'rowwise')")
        return Float8LinearConfig()


def largest_magnitude(x: Tensor) -> Tensor:
    """Largest |element| of x (M, N), 0-d fp32. First per row, so that it fuses with operations that go by rows."""
    return torch.linalg.vector_norm(x, float("inf"), dim=-1).amax().float()


def largest_to_square(x: Tensor) -> Tensor:
    """Largest element of x (M, N), 0-d fp32: max(x, 0)^2 is largest where x is. `fp8_cast` squares it."""
    return x.amax(dim=-1).amax().float()


def _cast(x: Tensor, largest: Tensor, dtype: torch.dtype, transpose: bool,
          relu_square: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Scale x (M, N) and cast it to `dtype`. Returns the cast (M, N), its transpose (N, M), and 1/scale (0-d fp32).

    largest: largest magnitude in x, 0-d fp32.   transpose: False leaves the second result empty.
    relu_square: cast max(x, 0)^2, rounded to the dtype of x, instead of x; `largest` is then `largest_to_square(x)`.
    """
    if not casts_in_triton(x.device):
        return cast_opaque(x, largest, dtype, transpose, relu_square)
    q, q_t, _ = _empty_cast(x, dtype, transpose)
    inverse = x.new_empty(1, dtype=torch.float32)  # not 0-d: compiled code would fill that first, in a kernel of its own
    cast_triton(x.contiguous(), largest, q, q_t, inverse, relu_square, kernel=wrap_triton(_cast_kernel))
    return q, q_t, inverse.view(())


@torch.library.custom_op("nanochat::fp8_cast_opaque", mutates_args=())
def cast_opaque(x: Tensor, largest: Tensor, dtype: torch.dtype, transpose: bool,
                relu_square: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """`fp8_cast` on devices where no Triton kernel casts."""
    cast = _empty_cast(x, dtype, transpose)
    cast_reference(x, largest, *cast, relu_square)
    return cast


@cast_opaque.register_fake
def _(x, largest, dtype, transpose, relu_square=False):
    return _empty_cast(x, dtype, transpose)


# torch.compile replaces a triton_op by what it does: on CUDA one launch of the kernel, without the time that an operator in
# Python takes on the host. It never computes such a launch again in the backward pass.
fp8_cast = triton_op("nanochat::fp8_cast", _cast, mutates_args=()) if triton else cast_opaque


def _empty_cast(x: Tensor, dtype: torch.dtype, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    return (x.new_empty(rows, columns, dtype=dtype), x.new_empty((columns, rows) if transpose else 0, dtype=dtype),
            x.new_empty((), dtype=torch.float32))


def casts_in_triton(device: torch.device) -> bool:
    """Whether the Triton kernels cast on this device: a GPU with FP8."""
    return triton_runs_on(device.type) and fp8_unavailable_reason(device) is None


def cast_into(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor) -> None:
    """`fp8_cast` into existing tensors."""
    (cast_triton if casts_in_triton(x.device) else cast_reference)(x.contiguous(), largest, q, q_t, inverse)


def cast_reference(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor, relu_square: bool = False) -> None:
    """`cast_into` in PyTorch: the reference implementation."""
    if relu_square:  # rounding keeps the order of numbers, so the largest square is the square of the largest
        x, largest = (F.relu(t).square() for t in (x, largest.to(x.dtype)))
    # tensor / tensor rounds once; PyTorch computes number / tensor as reciprocal times number, which rounds twice
    scale = torch.full_like(largest, torch.finfo(q.dtype).max, dtype=torch.float32) / largest.float().clamp_min(FLOOR)
    inverse.copy_(scale.reciprocal())
    q.copy_(x.float() * scale)
    if q_t.numel():
        q_t.copy_(q.t())


def cast_triton(x: Tensor, largest: Tensor, q: Tensor, q_t: Tensor, inverse: Tensor, relu_square: bool = False,
                kernel=None) -> None:
    """`cast_into` in Triton, one program per tile. kernel: `_cast_kernel`, or what launches it."""
    rows, columns = x.shape
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    (kernel or _cast_kernel)[grid](x, largest, q, q_t, inverse, rows, columns, MAX=torch.finfo(q.dtype).max, MIN=FLOOR,
                                   RELU_SQUARE=relu_square, TRANSPOSE=q_t.numel() > 0, PTX=PTX, TILE=TILE, num_warps=8)


def cast_loss_gradient(logits: Tensor, targets: Tensor, vocab_size: int, q: Tensor, q_t: Tensor, inverse: Tensor,
                       compiled: bool = False) -> Tensor:
    """Cast the gradient of the summed losses for the logits (n, V) to q (n, V) and q_t (V, n), both e5m2. Returns the losses
    (n,) fp32 in nats.

    The gradient of a logit is a probability, less one at the target, times the soft cap's derivative: never above 1. So the
    scale is that of 1, whatever the numbers are, and nothing has to be searched before the cast. The gradient is rounded once,
    from fp32. It is exactly 0 at ignored targets and in the padding from `vocab_size` on. The logits may be overwritten; the
    other arguments are those of `loss_and_gradient`.
    """
    if casts_in_triton(logits.device):
        sums = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        losses = loss_triton(logits, targets, vocab_size, gradient=False, sums=sums)
        cast_loss_gradient_triton(logits, targets, sums, vocab_size, q, q_t)
        inverse.fill_(1 / torch.finfo(E5M2).max)
        return losses
    gradient = logits.float()
    losses = loss_and_gradient(gradient, targets, vocab_size, compiled)
    cast_reference(gradient, torch.ones((), device=logits.device), q, q_t, inverse)
    return losses


def cast_loss_gradient_triton(logits: Tensor, targets: Tensor, sums: Tensor, vocab_size: int, q: Tensor, q_t: Tensor) -> None:
    """The cast of `cast_loss_gradient` in Triton, one program per tile. sums: what `loss_triton` finds, (n,) fp32."""
    rows, columns = logits.shape
    grid = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    _cast_loss_gradient_kernel[grid](logits, targets.contiguous(), sums, q, q_t, rows, columns, vocab_size, SOFTCAP,
                                     torch.finfo(E5M2).max, PTX=PTX, TILE=TILE, num_warps=8)


if triton:
    @triton.jit
    def _cast_kernel(x, largest, q, q_t, inverse, M, N, MAX: tl.constexpr, MIN: tl.constexpr, RELU_SQUARE: tl.constexpr,
                     TRANSPOSE: tl.constexpr, PTX: tl.constexpr, TILE: tl.constexpr):
        """One tile of x (M, N): read once, with RELU_SQUARE squared, scaled, rounded, written to q (M, N) and q_t (N, M).

        MAX: of the format.   MIN: lower bound of the largest magnitude. Numbers known when the kernel is compiled, as code that
        torch.compile makes would pass others in double precision.
        """
        bound = tl.load(largest)
        if RELU_SQUARE:
            bound = _relu_square(bound, x.dtype.element_ty)
        scale = tl.div_rn(MAX, tl.where(bound < MIN, MIN, bound))  # NaN stays NaN; tl.maximum would drop it
        rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
        columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
        tile = tl.load(x + rows * N + columns, mask=(rows < M) & (columns < N), other=0.0).to(tl.float32)
        if RELU_SQUARE:
            tile = _relu_square(tile, x.dtype.element_ty)
        _store_cast(tile * scale, q, q_t, rows, columns, M, N, TRANSPOSE, PTX)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(inverse, tl.div_rn(1.0, scale))

    @triton.jit
    def _cast_loss_gradient_kernel(logits, targets, sums, q, q_t, M, N, vocab, cap, scale, PTX: tl.constexpr, TILE: tl.constexpr):
        """One tile of the logits (M, N), read once, whose gradient is scaled, rounded, written to q (M, N) and q_t (N, M)."""
        rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
        columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)[None, :]
        target = tl.load(targets + rows, mask=rows < M, other=-1)
        total = tl.load(sums + rows, mask=rows < M, other=1.0)
        z = tl.load(logits + rows * N + columns, mask=(rows < M) & (columns < N), other=0.0).to(tl.float32)
        dz = gradient_of_logits(z, total, columns == target, cap)
        dz = tl.where((target != -1) & (columns < vocab), dz, 0.0)
        _store_cast(dz * scale, q, q_t, rows, columns, M, N, True, PTX)

    @triton.jit
    def _relu_square(x, dtype: tl.constexpr):
        """max(x, 0)^2 of x in fp32, rounded to `dtype`. NaN stays NaN."""
        positive = tl.where(x < 0, 0.0, x)
        return (positive * positive).to(dtype).to(tl.float32)

    @triton.jit
    def _store_cast(tile, q, q_t, rows, columns, M, N, TRANSPOSE: tl.constexpr, PTX: tl.constexpr):
        """Round a tile in fp32 once, to the nearest number, and write it to q (M, N) and q_t (N, M). NaN stays NaN.

        PTX: by the instruction that every GPU with FP8 has. Without it the compiler chooses: Triton 3.6 and 3.7 round to fp16
        first on sm_89, and toward zero. The instruction takes two numbers, the second into the lower byte. It would cut infinity
        off at the largest number, but no infinity comes here: one in x makes the scale 0, and their product is NaN.
        """
        inside = (rows < M) & (columns < N)
        if not PTX:  # in Triton's interpreter
            tile = tile.to(q.dtype.element_ty)
        elif q.dtype.element_ty == tl.float8e4nv:
            tile = tl.inline_asm_elementwise(
                "{.reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3; "
                "mov.b32 $0, {low, high};}", "=r,r,r,r,r", [tile], dtype=tl.float8e4nv, is_pure=True, pack=4)
        else:
            tile = tl.inline_asm_elementwise(
                "{.reg .b16 low, high; cvt.rn.satfinite.e5m2x2.f32 low, $2, $1; cvt.rn.satfinite.e5m2x2.f32 high, $4, $3; "
                "mov.b32 $0, {low, high};}", "=r,r,r,r,r", [tile], dtype=tl.float8e5, is_pure=True, pack=4)
        tl.store(q + rows * N + columns, tile, mask=inside)
        if TRANSPOSE:
            tl.store(q_t + columns * M + rows, tile, mask=inside)

    PTX = isinstance(_cast_kernel, triton.JITFunction)  # Triton's interpreter runs no instructions


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
    """y (M, N) of x (M, K) and weight (N, K), whose cast is passed in: w (N, K), w_t (K, N) and 1/scale (0-d). With
    `relu_square`, of max(x, 0)^2."""

    @staticmethod
    def forward(ctx, x, weight, w, w_t, w_inverse, fast_accum, weight_grad_bf16, emulate, relu_square):
        q, q_t, inverse = cast_input(x, True, relu_square)
        ctx.save_for_backward(q_t, inverse, w_t, w_inverse, *([x] if relu_square else []))
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.weight_grad_bf16, ctx.emulate = weight_grad_bf16, emulate
        return scaled_mm(q, w.t(), inverse, w_inverse, x.dtype, fast_accum, emulate)

    @staticmethod
    def backward(ctx, g):
        x_t, x_inverse, w_t, w_inverse, *squared = ctx.saved_tensors
        q, q_t, inverse = fp8_cast(g, largest_magnitude(g), E5M2, True)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = scaled_mm(q, w_t.t(), inverse, w_inverse, ctx.x_dtype, emulate=ctx.emulate)
            for x in squared:  # 2 x is exact, so this is rounded once, as in the derivatives of square and ReLU
                dx = torch.where(x <= 0, 0.0, dx * (2 * x))
        if ctx.needs_input_grad[1]:
            dtype = torch.bfloat16 if ctx.weight_grad_bf16 else torch.float32
            dw = scaled_mm(q_t, x_t.t(), inverse, x_inverse, dtype, emulate=ctx.emulate).to(ctx.weight_dtype)
        return dx, dw, None, None, None, None, None, None, None


def cast_input(x: Tensor, transpose: bool, relu_square: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x (M, K), or max(x, 0)^2, in e4m3, as `fp8_cast` returns it."""
    largest = largest_to_square(x) if relu_square else largest_magnitude(x)
    return fp8_cast(x, largest, E4M3, transpose, relu_square)


def float8_product(*args) -> Tensor:
    """`_Float8Product`, traced by torch.compile."""
    return _Float8Product.apply(*args)


@torch._dynamo.allow_in_graph
def float8_product_in_graph(*args) -> Tensor:
    """`_Float8Product` as one node of Dynamo's graph."""
    return _Float8Product.apply(*args)


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in FP8: x (..., K) -> (..., N) in the dtype of x. Make it with `from_float`.

    joins_relu_square: whether the layer takes h and multiplies max(h, 0)^2, so that what calls it leaves the square out. Its
    gradient is that of h. The bits are those of squaring first.
    gathered: `refresh_weights` leaves the layer out, as who divides the weights among ranks casts them before each use.
    Raises: ValueError in training where the number of tokens is no multiple of 16.
    """
    joins_relu_square = False
    gathered = False

    @classmethod
    def from_float(cls, linear: nn.Linear, config: Float8LinearConfig = Float8LinearConfig()) -> "Float8Linear":
        """An FP8 layer that shares weight and bias with `linear`, so a state dict keeps its names and values."""
        with torch.device("meta"):
            new = cls(linear.in_features, linear.out_features, bias=False)
        new.weight, new.bias, new.config = linear.weight, linear.bias, config
        new.joins_relu_square = config.joins_relu_square
        new.train(linear.training)
        if config.cache_weights:
            for name, tensor in zip(("w", "w_t", "w_inverse"), _empty_cast(linear.weight.detach(), E4M3, True), strict=True):
                new.register_buffer(name, tensor, persistent=False)
        return new

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (M, K)
        config, cast = self.config, self.cast_weight()
        if torch.is_grad_enabled():
            check_tokens(len(rows))
            product = float8_product_in_graph if config.allow_in_graph else float8_product
            y = product(rows, self.weight, *cast, config.fast_accum, config.weight_grad_bf16, config.emulate,
                        self.joins_relu_square)
        else:
            q, _, inverse = cast_input(rows, False, self.joins_relu_square)
            y = scaled_mm(q, cast[0].t(), inverse, cast[2], x.dtype, config.fast_accum, config.emulate)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def cast_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weight (N, K) in e4m3, its transpose, and 1/scale."""
        if self.config.cache_weights:
            return self.w, self.w_t, self.w_inverse
        weight = self.weight.detach()
        return fp8_cast(weight, largest_magnitude(weight), E4M3, True)

    def chunked_gradients(self, x: Tensor, targets: Tensor, vocab_size: int, chunk: int,
                          compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
        """This layer as the head of `ChunkedCrossEntropy` (nanochat/kernels/cross_entropy.py): sum of the losses and its
        gradients for x (N, C) and the weight. One operator, which torch.compile takes as it is."""
        assert self.bias is None and not self.joins_relu_square
        check_tokens(len(x))
        check_tokens(min(chunk, len(x)))
        config = self.config
        return chunked_gradients(x, *self.cast_weight(), targets, vocab_size, chunk, compiled, config.fast_accum,
                                 config.weight_grad_bf16, config.emulate)


def check_tokens(count: int) -> None:
    if count % MULTIPLE:
        raise ValueError(f"FP8 training takes tokens in multiples of {MULTIPLE}, not {count}")


@torch.library.custom_op("nanochat::fp8_chunked_loss", mutates_args=())
def chunked_gradients(x: Tensor, w: Tensor, w_t: Tensor, w_inverse: Tensor, targets: Tensor, vocab_size: int, chunk: int,
                      compiled: bool, fast_accum: bool, weight_grad_bf16: bool, emulate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses (0-d fp32) and its gradients dx (N, C) in the dtype of x and dW (V, C) fp32, in chunks of `chunk` tokens:
    the three products in FP8, with the casts that a Float8Linear makes, but for the gradient of the logits, which
    `cast_loss_gradient` casts.

    x (N, C).   w (V, C), w_t (C, V), w_inverse (0-d): the cast weight.   targets (N,) int64.
    """
    total, dx, dw = _empty_gradients(x, w)
    product_dtype = torch.bfloat16 if weight_grad_bf16 else torch.float32
    for start in range(0, len(x), chunk):
        x_part, y_part, dx_part = (t[start:start + chunk] for t in (x, targets, dx))
        q, x_t, x_inverse = cast_input(x_part, True)
        logits = scaled_mm(q, w.t(), x_inverse, w_inverse, x.dtype, fast_accum, emulate)
        q, q_t, inverse = _empty_cast(logits, E5M2, True)
        total += cast_loss_gradient(logits, y_part, vocab_size, q, q_t, inverse, compiled).sum()
        del logits  # the largest tensor: its memory serves the products
        dx_part.copy_(scaled_mm(q, w_t.t(), inverse, w_inverse, x.dtype, emulate=emulate))
        product = scaled_mm(q_t, x_t.t(), inverse, x_inverse, product_dtype, emulate=emulate)
        (dw.add_ if start else dw.copy_)(product)
    return total, dx, dw


@chunked_gradients.register_fake
def _(x, w, w_t, w_inverse, targets, vocab_size, chunk, compiled, fast_accum, weight_grad_bf16, emulate):
    return _empty_gradients(x, w)


def _empty_gradients(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """total (0-d), at zero; dx and dw before the first chunk."""
    return x.new_zeros((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(w, dtype=torch.float32)


@torch.no_grad()
def refresh_weights(layers: Iterable[Float8Linear]) -> None:
    """Cast the weights of layers with `cache_weights`, in place. Call it before their first use and after each update."""
    layers = [layer for layer in layers if not layer.gathered]
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
