"""The C++ gradient of linear layers' weights: against float64, on any size and stride, inside layers and the chunked loss."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.cross_entropy import ChunkedCrossEntropy
from nanochat.kernels.linear import CastOnceLinear, Linear, refresh, use_own_weight_gradient
from nanochat.kernels.weight_gradient import (
    add_weight_gradient_cpp,
    choose_weight_gradient,
    weight_gradient_cpp,
)

reason = cpp_unavailable_reason("weight_gradient")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
EPS = 2.0**-24  # relative rounding of an fp32 operation


def draw(tokens, rows, columns, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, generator=random).bfloat16() for n in (rows, columns)]


def check(dw, g, x, before=None):
    """Products of bf16 numbers are exact in fp32, so only the sum of as many terms as there are tokens rounds."""
    g, x = g.double(), x.double()
    before = torch.zeros_like(dw) if before is None else before
    bound = EPS * (len(g) + 2) * (g.abs().t() @ x.abs() + before.abs())
    assert dw.dtype == torch.float32 and ((dw.double() - before.double() - g.t() @ x).abs() <= bound).all()


@needs_kernel
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(tokens=st.integers(1, 200) | st.sampled_from([511, 512, 513, 1030]), rows=st.integers(1, 20), columns=st.integers(1, 10),
       seed=st.integers(0, 9))
def test_equals_the_definition(tokens, rows, columns, seed):
    g, x = draw(tokens, 16 * rows, 32 * columns, seed)
    check(weight_gradient_cpp(g, x), g, x)


@needs_kernel
def test_adds_to_what_is_there():
    g, x = draw(600, 96, 64)
    before = torch.randn(96, 64)
    add_weight_gradient_cpp(dw := before.clone(), g, x)
    check(dw, g, x, before)


@needs_kernel
def test_takes_any_strides():
    g, x = draw(100, 64, 96)
    want = weight_gradient_cpp(g, x)
    for change in (lambda t: torch.cat((t + 1, t), 1)[:, t.size(1):], lambda t: torch.cat((t[:, :1], t), 1)[:, 1:],
                   lambda t: t.t().contiguous().t()):
        assert torch.equal(want, weight_gradient_cpp(change(g), change(x)))
    summed = torch.ones(1, 1, dtype=torch.bfloat16).expand(100, 64)
    assert torch.equal(weight_gradient_cpp(summed, x), weight_gradient_cpp(summed.contiguous(), x))


@needs_kernel
def test_no_tokens_no_gradient():
    assert not weight_gradient_cpp(*draw(0, 32, 32)).any()


@needs_kernel
def test_the_same_bits_on_any_number_of_threads():
    """The tiles become smaller with more threads; the order in which a number is summed does not change."""
    g, x = draw(1100, 512, 512)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8, 40):
            torch.set_num_threads(n)
            results.append(weight_gradient_cpp(g, x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def gradients(layer, x, dy):
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.weight), dy)]


@needs_kernel
@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_differs_in_its_weight_s_gradient_only(compiled):
    layer, own = Linear(64, 48), Linear(64, 48)
    own.load_state_dict(layer.state_dict())
    use_own_weight_gradient([own])
    cast_once = CastOnceLinear.from_linear(own, torch.bfloat16)
    refresh([cast_once])
    use_own_weight_gradient([cast_once])
    random = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 50, n, generator=random).bfloat16() for n in (64, 48))
    y, dx, _ = gradients(layer, x, dy)
    for one in (own, cast_once):
        got_y, got_dx, dw = gradients(torch.compile(one, fullgraph=True) if compiled else one, x, dy)
        assert torch.equal(got_y, y) and torch.equal(got_dx, dx)
        check(dw, dy.flatten(0, 1), x.flatten(0, 1))


@needs_kernel
def test_what_needs_no_gradient_gets_none():
    layer = Linear(32, 32)
    use_own_weight_gradient([layer])
    layer.weight.requires_grad_(False)
    x = torch.randn(3, 32).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_layers_of_other_sizes_and_kinds_are_left_alone():
    layers = [Linear(12, 64), Linear(64, 4), torch.nn.Linear(64, 64)]
    use_own_weight_gradient(layers)
    assert not any(getattr(layer, "own_weight_gradient", False) for layer in layers)


@needs_kernel
def test_the_chunked_loss_uses_it():
    """The head's gradient sums over chunks without the rounding of each to bf16: nearer to that of the same loss in one chunk."""
    torch.manual_seed(0)
    head, x = Linear(64, 320), torch.randn(1, 700, 64).bfloat16()
    targets, results = torch.randint(0, 300, (1, 700)), {}
    for own, chunk in ((False, 704), (True, 704), (True, 112)):
        head.own_weight_gradient = own
        loss = ChunkedCrossEntropy(chunk, plain=Linear)(x.detach().requires_grad_(), head, targets, 300)
        results[own, chunk] = loss.detach(), torch.autograd.grad(loss, head.weight)[0]
    for loss, dw in results.values():
        torch.testing.assert_close(loss, results[True, 704][0])
        torch.testing.assert_close(dw, results[True, 704][1], rtol=2e-2, atol=2e-2 * dw.abs().max().item())
    torch.testing.assert_close(results[True, 112][1], results[True, 704][1], rtol=1e-4, atol=1e-6)


@needs_kernel
def test_the_faster_one_is_chosen_unless_the_user_or_a_resume_says_otherwise():
    weights = [torch.empty(64, 64), torch.empty(12, 64)]
    choice = choose_weight_gradient(weights, 128, torch.bfloat16)
    assert choice.name in ("torch", "brgemm") and set(choice.milliseconds) == {"torch", "brgemm"}
    assert choose_weight_gradient(weights, 128, torch.bfloat16, wanted="torch").name == "torch"
    assert choose_weight_gradient(weights, 128, torch.bfloat16, recorded="brgemm")[:2] == ("brgemm", "as before the resume")


@pytest.mark.parametrize("weights, dtype, why", [([torch.empty(64, 64)], torch.float32, "for bfloat16"),
                                                 ([torch.empty(12, 64)], torch.bfloat16, "")])
def test_where_the_kernel_does_not_fit_torch_serves(weights, dtype, why):
    assert choose_weight_gradient(weights, 128, dtype, recorded="brgemm").name == "torch"
    with pytest.raises(UserError, match=f"--weight-gradient brgemm cannot be used here: .*{why}"):
        choose_weight_gradient(weights, 128, dtype, wanted="brgemm")
