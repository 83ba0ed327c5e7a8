"""Rotary positions and norm in C++: against float64, on any size and stride, compiled, and inside a model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.gpt import QK_SCALE
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.norms import EPS
from nanochat.kernels.rotary import choose_rotary_norm, rotary_norm, rotary_norm_cpp, unavailable_reason
from nanochat.runtime.tuner import Tuner
from test_gpt import TINY, batch, tiny_model

reason = cpp_unavailable_reason("elementwise")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
BF16 = 2.0**-8  # largest relative error of rounding to bf16


def problem(B, T, H, D, seed=0):
    """x and the gradient (B, T, H, D), cos and sin (1, T, 1, D/2), bf16."""
    random = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(B, T, H, D, generator=random).bfloat16() for _ in range(2))
    angles = torch.rand(1, T, 1, D // 2, generator=random) * 7
    return x.requires_grad_(), dy, angles.cos().bfloat16(), angles.sin().bfloat16()


def exact(x, dy, cos, sin):
    """y and dx in float64, by the definition."""
    x, cos, sin = x.detach().double().requires_grad_(), cos.double(), sin.double()
    x1, x2 = x.chunk(2, dim=-1)
    z = torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)
    y = QK_SCALE * z / (z.square().mean(-1, keepdim=True) + EPS).sqrt()
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


def outcome(function, x, dy, cos, sin):
    y = function(x, cos, sin, QK_SCALE)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@needs_kernel
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(B=st.integers(1, 3), T=st.integers(1, 40), H=st.integers(1, 5), D=st.sampled_from([32, 64, 96, 128, 256]),
       seed=st.integers(0, 9))
def test_equals_the_definition(B, T, H, D, seed):
    """y is rounded once. dx follows from the rounded y, whose error enters its part along y."""
    case = problem(B, T, H, D, seed)
    (y, dx), (y_exact, dx_exact) = outcome(rotary_norm_cpp, *case), exact(*case)
    assert ((y - y_exact).abs() <= 1.001 * BF16 * y_exact.abs() + 1e-30).all()
    x, dy, cos, _ = (t.detach().double() for t in case)
    z_norm = x.norm(dim=-1, keepdim=True)  # that of z, up to the rounding of cos and sin
    largest = QK_SCALE * D**0.5 / z_norm * dy.norm(dim=-1, keepdim=True)  # no head's gradient is longer
    assert ((dx - dx_exact).norm(dim=-1, keepdim=True) <= 3 * BF16 * largest).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_follows_the_definition(device, dtype, compiled):
    """In the norm of a head: two products, their sum, the norm and the factor are rounded on the way, and the same again on the
    way back."""
    torch._dynamo.reset()
    x, dy, cos, sin = (t.detach().to(device, dtype) for t in problem(2, 40, 3, 64))
    case, rounding = (x.requires_grad_(), dy, cos, sin), {torch.float32: 2.0**-24, torch.bfloat16: BF16}[dtype]
    function = torch.compile(rotary_norm, fullgraph=True, dynamic=False) if compiled else rotary_norm
    (y, dx), (y_exact, dx_exact) = outcome(function, *case), exact(*case)
    z = x.detach().double().norm(dim=-1, keepdim=True)
    largest = QK_SCALE * 64**0.5 / z * dy.double().norm(dim=-1, keepdim=True)  # no head's gradient is longer
    assert ((y - y_exact).norm(dim=-1) <= 4 * rounding * y_exact.norm(dim=-1)).all()
    assert ((dx - dx_exact).norm(dim=-1, keepdim=True) <= 8 * rounding * largest).all()


@needs_kernel
def test_is_no_less_exact_than_pytorch():
    case = problem(2, 64, 4, 64)
    for mine, plain, right in zip(outcome(rotary_norm_cpp, *case), outcome(rotary_norm, *case), exact(*case), strict=True):
        assert (mine - right).norm() <= (plain - right).norm()


@needs_kernel
def test_takes_any_strides():
    x, dy, cos, sin = problem(2, 9, 3, 64)
    want = outcome(rotary_norm_cpp, x, dy, cos, sin)
    for change in (lambda t: torch.cat((t, t), 2)[:, :, :3], lambda t: torch.cat((t, t), 1)[:, :9],
                   lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
                   lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
        got = outcome(rotary_norm_cpp, change(x.detach()).requires_grad_(), change(dy), cos, sin)
        assert all(map(torch.equal, want, got))
    both = torch.stack((cos, sin), -1)
    assert torch.equal(want[0], rotary_norm_cpp(x, both[..., 0], both[..., 1], QK_SCALE).detach())


@needs_kernel
def test_no_tokens():
    assert outcome(rotary_norm_cpp, *problem(0, 4, 2, 32))[1].shape == (0, 4, 2, 32)


@needs_kernel
def test_a_number_that_is_none_stays_in_its_head():
    x, dy, cos, sin = problem(1, 4, 2, 64)
    with torch.no_grad():
        x[0, 1, 0, 5] = float("nan")
    y, dx = outcome(rotary_norm_cpp, x, dy, cos, sin)
    for t in (y, dx):
        assert t[0, 1, 0].isnan().all() and t.isnan().sum() == 64


@needs_kernel
def test_the_same_bits_on_any_number_of_threads():
    case, threads, results = problem(2, 300, 4, 64), torch.get_num_threads(), []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append(outcome(rotary_norm_cpp, *case))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_kernel
def test_compiled_it_is_one_graph_and_the_same_bits():
    torch._dynamo.reset()
    case = problem(2, 8, 2, 32)
    compiled = torch.compile(rotary_norm_cpp, fullgraph=True, dynamic=False)
    assert all(map(torch.equal, outcome(compiled, *case), outcome(rotary_norm_cpp, *case)))


@needs_kernel
def test_in_a_model_loss_and_gradients_are_those_of_pytorch():
    """Within what bf16 rounds: twice the distance of PyTorch's own bf16 gradients from fp32's."""
    shape, (ids, targets) = replace(TINY, n_embd=64, n_head=2, n_kv_head=1), batch(TINY)
    gradients = {}
    for name, dtype, function in (("exact", torch.float32, rotary_norm), ("torch", torch.bfloat16, rotary_norm),
                                  ("cpp", torch.bfloat16, rotary_norm_cpp)):
        model = tiny_model(shape, dtype=dtype)
        model.kernels.rotary_norm = function
        model(ids, targets).backward()
        gradients[name] = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    distance = {name: (gradients[name] - gradients["exact"]).norm() for name in ("torch", "cpp")}
    assert 0 < distance["cpp"] < 2 * distance["torch"]


def test_a_choice_that_does_not_work_is_refused_in_one_line():
    _, _, cos, sin = problem(1, 4, 1, 32)
    with pytest.raises(UserError, match="--rotary-norm cpp cannot be used here: .*float32"):
        choose_rotary_norm(1, 4, 1, cos.float(), sin.float(), QK_SCALE, compiled=False, wanted="cpp")
    assert "multiple of 32" in unavailable_reason(torch.bfloat16, "cpu", 48)
    assert choose_rotary_norm(1, 4, 1, cos.float(), sin.float(), QK_SCALE, compiled=False).name == "torch"


@needs_kernel
@pytest.mark.parametrize("compiled", [False, True])
def test_both_ways_are_timed_once_and_remembered(tmp_path, compiled):
    _, _, cos, sin = problem(1, 64, 2, 32)

    def choose(**more):
        return choose_rotary_norm(2, 64, 2, cos, sin, QK_SCALE, compiled=compiled, tuner=Tuner("cpu", tmp_path), **more)
    first = choose()
    assert set(first.milliseconds) == {"torch", "cpp"} and choose() == first._replace(reason="measured before")
    assert choose(recorded="torch").name == "torch" and choose(wanted="cpp", recorded="torch").name == "cpp"
