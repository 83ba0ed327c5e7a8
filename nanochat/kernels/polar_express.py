"""The polar factor of Muon's matrices: of U S V^T, the singular value decomposition, U V^T, the nearest semi-orthogonal matrix.

Polar Express (arXiv 2505.16932) is a Newton-Schulz iteration whose five polynomials are chosen for its five steps. A step is
X <- (a I + b A + c A A) X with the Gram matrix A = X X^T, so it multiplies the singular values alone. There are three ways:

- `plain`: these steps.
- `gram`: the polynomials of A commute, so a matrix (m, n) with n >= 2 m needs products with n only where A is made and where the
  factor Q of all steps is applied to X. Between, Q and A are (m, m): for the (4C, C) matrices of an MLP 60 m^3 operations
  instead of 90 m^3. It is known as Gram Newton-Schulz. In bf16 A loses its small eigenvalues, and every step multiplies such
  errors by a^2: after RESTART steps X is made anew, and A of it. Until then Q is mostly a multiple of the identity, which is kept
  apart, so that it is not rounded.
- `brgemm`: the same by C++ (`cpp/polar_express.cpp`), for bf16 on CPUs: where a product is symmetric, half of it is computed.

What is fastest depends on processor and sizes: `choose_polar_express` measures it on those of a model.
"""

import ctypes
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason, library, pointer
from nanochat.runtime.compute_dtype import dtype_name
from nanochat.runtime.tuner import Choice, Tuner, untimed_choice

# (a, b, c) of X <- a X + (b A + c A A) X with A = X X^T, for five steps (arXiv 2505.16932, safety 2e-2, cushion 2).
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
RESTART = 2      # steps; more lose small singular values in bf16, fewer save nothing
GRAM_FROM = 2    # times as wide as high: narrower matrices take the plain steps, as the Gram matrix saves them nothing
ROWS, COLUMNS = 16, 32  # the C++ kernel takes multiples of these
TIMED = {"cpu": 2**21, "cuda": 2**25}  # elements of a shape that are timed at most
TINY = 1e-20     # keeps a division by the norm of an all-zero row finite


def symmetric_product(x: Tensor, y: Tensor, added: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha x y^T + beta added, of which the caller knows that it is symmetric. x, y (K, m, k), added (K, m, m) -> (K, m, m)."""
    if added is None:
        return alpha * (x @ y.mT) if alpha != 1 else x @ y.mT
    return torch.baddbmm(added, x, y.mT, beta=beta, alpha=alpha)


@torch.library.custom_op("nanochat::symmetric_product", mutates_args=(), device_types="cpu")
def symmetric_product_op(x: Tensor, y: Tensor, added: Tensor | None, alpha: float, beta: float) -> Tensor:
    """`symmetric_product` of bf16 matrices in C++; both triangles are the same bits. m is a multiple of ROWS, k of COLUMNS."""
    x, y, added = x.contiguous(), y.contiguous(), None if added is None else added.contiguous()
    out = x.new_empty(len(x), x.size(1), x.size(1))
    library("polar_express").symmetric_product(
        *map(ctypes.c_int64, x.shape), pointer(x), pointer(y), None if added is None else pointer(added),
        ctypes.c_float(alpha), ctypes.c_float(beta), pointer(out))
    return out


@symmetric_product_op.register_fake
def _(x, y, added, alpha, beta):
    return x.new_empty(x.size(0), x.size(1), x.size(1))


def symmetric_product_cpp(x: Tensor, y: Tensor, added: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """`symmetric_product`, by the C++ kernel where it takes matrices of this size and dtype."""
    fits = x.size(1) % ROWS == 0 and x.size(2) % COLUMNS == 0 and x.dtype == torch.bfloat16
    return symmetric_product_op(x, y, added, alpha, beta) if fits else symmetric_product(x, y, added, alpha, beta)


def plain_steps(x: Tensor, product: Callable = symmetric_product) -> Tensor:
    """The five steps, on matrices (K, m, n) that are at least as wide as high."""
    for a, b, c in COEFFICIENTS:
        gram = product(x, x)
        x = torch.baddbmm(x, product(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x


def gram_steps(x: Tensor, product: Callable = symmetric_product) -> Tensor:
    """`plain_steps` by way of the Gram matrix. q is the factor of the steps since x was made."""
    gram = product(x, x)
    q, identity = None, 1.0  # the factor is q + identity I
    for step, (a, b, c) in enumerate(COEFFICIENTS[:RESTART]):
        p = product(gram, gram, gram, alpha=c, beta=b)
        q = identity * p if q is None else product(p, q, q, beta=a) + identity * p
        identity *= a
        if step + 1 < RESTART:
            gram = _next_gram(gram, p, a, product)
    x = torch.baddbmm(x, q, x, beta=identity)

    gram, q = product(x, x), torch.eye(x.size(1), dtype=x.dtype, device=x.device)
    last = len(COEFFICIENTS) - 1
    for step, (a, b, c) in enumerate(COEFFICIENTS[RESTART:], RESTART):
        p = product(gram, gram, gram, alpha=c, beta=b)
        q = p + a * q if step == RESTART else product(p, q, q, beta=a)
        if step < last:
            gram = _next_gram(gram, p, a, product)
    return q @ x


def _next_gram(gram: Tensor, p: Tensor, a: float, product: Callable) -> Tensor:
    """The Gram matrix after a step with the factor a I + p: this factor on both sides."""
    half = product(p, gram, gram, beta=a)
    return product(half, p, half, beta=a)


WAYS = {"plain": (plain_steps, symmetric_product), "gram": (gram_steps, symmetric_product),
        "brgemm": (gram_steps, symmetric_product_cpp)}


def polar_factor(g: Tensor, dtype: torch.dtype, way: str = "plain") -> Tensor:
    """Approximate the polar factor of each of K matrices after row equilibration: all rows scaled to one norm, so that the steps
    start well conditioned (arXiv 2603.28254).

    g (K, m, n) -> (K, m, n). The matrix products are in `dtype`.   way: one of WAYS.
    """
    norms = g.norm(dim=-1, keepdim=True)
    scales = 1 / norms.clamp_min(TINY)  # of rows; the norm of the whole follows from them, without reading g again
    whole = (norms * scales).square().sum(dim=-2, keepdim=True).sqrt().clamp_min(1)
    x = (g * (scales / (1.01 * whole))).to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:  # the smaller of X X^T and X^T X is cheaper
        x = x.mT.contiguous()
    steps, product = WAYS[way]
    if x.size(-1) < GRAM_FROM * x.size(-2):
        steps = plain_steps
    x = steps(x, product)
    return (x.mT if tall else x).to(g.dtype)


def choose_polar_express(shapes: Iterable[tuple[int, int]], dtype: torch.dtype, device: torch.device, *,
                         tuner: Tuner | None = None, wanted: str = "auto", recorded: str | None = None) -> Choice:
    """Which of WAYS takes the least time for matrices of these shapes, each as often as it is named. Tall ones are timed as wide.

    dtype: of the products.   wanted: --polar-express.   recorded: the choice of the run to be resumed.
    Raises: UserError where `brgemm` is wanted and does not work.
    """
    counts = Counter((min(shape), max(shape)) for shape in shapes)
    why_not = f"the kernel is for bfloat16 on a CPU, not for {dtype} on {device.type}" \
        if device.type != "cpu" or dtype != torch.bfloat16 else cpp_unavailable_reason("polar_express")
    if recorded == "brgemm" and why_not:
        recorded = "gram"  # the same steps
    if choice := untimed_choice("--polar-express", wanted, "plain", "brgemm", why_not if wanted == "brgemm" else None, recorded):
        return choice
    ways = [way for way in WAYS if way != "brgemm" or not why_not]
    if not any(n >= GRAM_FROM * m for m, n in counts):
        ways.remove("gram")
    random = torch.Generator().manual_seed(0)  # a private generator: the run's random numbers must not change
    most = TIMED.get(device.type, TIMED["cuda"])
    timed = {(m, n): min(count, max(1, most // (m * n))) for (m, n), count in counts.items()}

    def factors(way):
        def make():
            stacks = [torch.randn(count, *shape, generator=random).to(device) for shape, count in timed.items()]
            return lambda: [polar_factor(stack, dtype, way) for stack in stacks]
        return make
    all_elements, timed_elements = (sum(count * m * n for (m, n), count in c.items()) for c in (counts, timed))
    sizes = " ".join(f"{count}x{m}x{n}" for (m, n), count in sorted(counts.items()))
    return (tuner or Tuner(device, folder=None)).choose(f"polar factors, {sizes} {dtype_name(dtype)}", {
        way: factors(way) for way in ways}, times_in_use=all_elements / max(timed_elements, 1))
