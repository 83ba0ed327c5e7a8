"""What evaluation and generation compute in C++: against float64, and only where nothing is compiled or needs a gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.engine import KVCache, prepare_for_inference
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.inference import (
    MOST_VECTORS,
    add_norm_cpp,
    matvec_cpp,
    mix_norm_cpp,
    norm_cpp,
    relu_square_cpp,
    use_inference_kernels,
)
from nanochat.kernels.norms import EPS
from nanochat.runtime.tuner import Tuner
from test_gpt import TINY, batch, tiny_model

reason = cpp_unavailable_reason("elementwise")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
BF16 = 2.0**-8  # largest relative error of rounding to bf16
SHAPE = replace(TINY, n_embd=64, n_head=2, n_kv_head=1)


def near(result, exact, extra=0.0):
    return ((result - exact).abs() <= 1.001 * BF16 * (exact.abs() + extra) + 1e-30).all()


@needs_kernel
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(0, 50), width=st.integers(1, 100) | st.sampled_from([512, 768, 4100]), a=st.floats(-2, 2),
       b=st.floats(-2, 2), seed=st.integers(0, 9))
def test_equals_the_definition(rows, width, a, b, seed):
    random = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(rows, width, generator=random).bfloat16() for _ in range(2))
    a, b = torch.tensor(a), torch.tensor(b)

    def norm(t):
        return t.double() / (t.double().square().mean(-1, keepdim=True) + EPS).sqrt()
    assert near(norm_cpp(x), norm(x)) and torch.equal(relu_square_cpp(x), x.relu().square())
    for (mixed, normed), exact, terms in ((mix_norm_cpp(x, y, a, b), a.double() * x.double() + b.double() * y.double(),
                                           (a * x.float()).abs() + (b * y.float()).abs()),
                                          (add_norm_cpp(x, y), x.double() + y.double(), x.float().abs() + y.float().abs())):
        assert near(mixed, exact, extra=2.0**-14 * terms) and near(normed, norm(mixed))


@needs_kernel
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(rows=st.integers(0, MOST_VECTORS), N=st.integers(1, 70), K=st.integers(1, 140) | st.sampled_from([768, 4100, 9000]),
       seed=st.integers(0, 9))
def test_the_product_of_few_tokens(rows, N, K, seed):
    """fp32 sums of exact products, rounded once. Small numbers among large ones are as exact as the sum allows."""
    random = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, K, generator=random).bfloat16() for n in (rows, N))
    exact, terms = x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t()
    y = matvec_cpp(x, w)
    assert y.shape == (rows, N) and ((y - exact).abs() <= 1.001 * BF16 * exact.abs() + 2.0**-24 * (K + 2) * terms).all()
    assert all(torch.equal(y[i:i + 1], matvec_cpp(x[i:i + 1], w)) for i in range(rows))


@needs_kernel
def test_a_large_product_has_the_same_bits_on_any_number_of_threads():
    x, w = torch.randn(3, 1000).bfloat16(), torch.randn(900, 1000).bfloat16()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append(matvec_cpp(x, w))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_kernel
def test_a_number_that_is_none_is_not_hidden():
    x = torch.tensor([[1.0, float("nan"), -1.0]]).bfloat16()
    assert relu_square_cpp(x).tolist()[0][::2] == [1, 0] and relu_square_cpp(x)[0, 1].isnan() and norm_cpp(x).isnan().all()


@needs_kernel
def test_only_without_gradients(tmp_path):
    """With the C++ kernels, training's gradients are the same bits as before, and evaluation's losses as near to fp32's."""
    ids, targets = batch(SHAPE)
    plain, fast = tiny_model(SHAPE, dtype=torch.bfloat16), tiny_model(SHAPE, dtype=torch.bfloat16)
    took = use_inference_kernels(fast, 4096, Tuner("cpu", tmp_path)).name
    assert took == "cpp" or fast.kernels.norm is plain.kernels.norm
    for model in (plain, fast):
        model(ids, targets).backward()
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    with torch.no_grad():
        exact, a, b = (model(ids, targets, loss_reduction="none") for model in (tiny_model(SHAPE), plain, fast))
    assert a.shape == b.shape == ids.shape and (b - exact).norm() <= 1.2 * (a - exact).norm()


@needs_kernel
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_without_gradients_are_those_with(tmp_path, reduction):
    """In fp32 too, ignored targets included: the C++ pass over the logits against the reference loss."""
    from nanochat.kernels.cross_entropy import ChunkedCrossEntropy, softcapped_cross_entropy
    from nanochat.kernels.linear import Linear
    torch.manual_seed(0)
    head, x, targets = Linear(32, 80), torch.randn(2, 9, 32), torch.randint(0, 70, (2, 9))
    targets[0, 3] = -1
    with torch.no_grad():
        losses = [loss(x, head, targets, 70, reduction) for loss in (ChunkedCrossEntropy(16, Linear), softcapped_cross_entropy)]
    torch.testing.assert_close(*losses, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepared_model_says_the_same(dtype):
    """The text of a model with its weights cast once, and logits that do not depend on how many tokens come at a time."""
    ids, _ = batch(SHAPE)
    with torch.no_grad():
        model = tiny_model(SHAPE, dtype=dtype)
        before = model(ids)
        prepare_for_inference(model)
        after = model(ids)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        assert (before - after).abs().max() < tolerance * max(1, before.abs().max())
        assert all(layer.weight.dtype == dtype for layer in model.linears().values())
        cache = KVCache.for_model(model, len(ids), ids.size(1))
        parts = [model(part, kv_cache=cache) for part in ids.split(5, dim=1)]
        assert (torch.cat(parts, 1) - after).abs().max() < tolerance * max(1, after.abs().max())
