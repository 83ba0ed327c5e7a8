"""The lookup's gradient: exact against a plain sum, better than bf16 accumulation, equal to the bit on every run."""

import pytest
import torch
from hypothesis import given, strategies as st

from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.embedding import (
    Embedding,
    choose_embedding_gradient,
    embedding_gradient,
    embedding_gradient_reference,
)
from nanochat.runtime.tuner import Tuner

reason = cpp_unavailable_reason("embedding")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
each_kernel = pytest.mark.parametrize("cpp", [pytest.param(False, id="torch"), pytest.param(True, id="cpp", marks=needs_kernel)])


def gradient(table, idx, weights, compile=False, cpp=False):
    layer = Embedding(*table.shape, dtype=table.dtype)
    layer.cpp = cpp
    layer.weight.data.copy_(table)
    forward = torch.compile(layer, fullgraph=True) if compile else layer
    (forward(idx) * weights).sum().backward()
    return layer.weight.grad


def inputs(dtype, tokens=4096, rows=50, width=32):
    generator = torch.Generator().manual_seed(0)
    idx = (torch.rand(8, tokens // 8, generator=generator) ** 4 * rows).long()  # a few tokens are very frequent
    weights = torch.rand(*idx.shape, width, generator=generator).to(dtype)
    return torch.randn(rows, width, generator=generator).to(dtype), idx, weights


def test_it_is_the_sum_over_the_places_of_a_token():
    table, idx, weights = inputs(torch.float32)
    expected = torch.zeros(50, 32, dtype=torch.float64).index_add_(0, idx.flatten(), weights.flatten(0, 1).double())
    torch.testing.assert_close(gradient(table, idx, weights).double(), expected, rtol=1e-5, atol=1e-5)
    layer = Embedding(50, 32)
    assert torch.equal(layer(idx), layer.weight[idx])


@each_kernel
def test_bf16_is_rounded_once_and_not_at_every_addition(cpp):
    table, idx, weights = inputs(torch.bfloat16)
    exact = torch.zeros(50, 32, dtype=torch.float64).index_add_(0, idx.flatten(), weights.flatten(0, 1).double())
    error = ((gradient(table, idx, weights, cpp=cpp).double() - exact).abs() / exact.clamp_min(1e-9)).max()
    assert error <= 2**-8  # half a unit in the last place of bf16
    plain = torch.nn.functional.embedding(idx, table.requires_grad_())
    (plain * weights).sum().backward()
    assert ((table.grad.double() - exact).abs() / exact.clamp_min(1e-9)).max() > 10 * error  # what we avoid


@each_kernel
def test_compiled_and_repeated_it_gives_the_same_bits(cpp):
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # where atomic adds would come in any order
    try:
        table, idx, weights = inputs(torch.bfloat16, tokens=32768)
        first = gradient(table, idx, weights, cpp=cpp)
        assert all(torch.equal(gradient(table, idx, weights, compile=True, cpp=cpp), first) for _ in range(5))
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_the_tables_of_a_model_take_the_one_that_was_chosen(tmp_path):
    tables = [Embedding(60, 32, dtype=torch.bfloat16) for _ in range(2)]
    choice = choose_embedding_gradient(tables, 40_000, Tuner("cpu", tmp_path))
    assert set(choice.milliseconds) == {"torch", "cpp"} and {table.cpp for table in tables} == {choice.name == "cpp"}
    assert choose_embedding_gradient([Embedding(60, 32)], 40_000).name == "torch"


@needs_kernel
@given(rows=st.integers(1, 40), columns=st.integers(1, 150), tokens=st.integers(0, 200), seed=st.integers(0, 99))
def test_the_kernel_gives_the_bits_of_pytorch(rows, columns, tokens, seed):
    """Any width, rows without a token, tokens at every place; gradients that are not next to each other, NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    idx = (torch.rand(tokens, 2, generator=generator) ** 3 * rows).long()
    grad = torch.randn(tokens, columns, 2, generator=generator).bfloat16().mT
    if tokens > 100:
        grad[3, 0, 0], grad[5, 1, -1] = float("nan"), float("inf")
    ours, plain = embedding_gradient(grad, idx, rows, cpp=True), embedding_gradient_reference(grad, idx, rows)
    assert torch.equal(ours.isnan(), plain.isnan()) and torch.equal(ours.nan_to_num(7.0), plain.nan_to_num(7.0))
