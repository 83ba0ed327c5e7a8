"""Polar factors, in each way that there is: against an exact SVD, against float64 in bf16, at any size and number of threads."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.polar_express import (
    WAYS,
    choose_polar_express,
    polar_factor,
    symmetric_product,
    symmetric_product_cpp,
    symmetric_product_op,
)
from nanochat.training.build import build_trainer_only
from nanochat.training.config import parse_config

reason = cpp_unavailable_reason("polar_express")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
EVERY_WAY = pytest.mark.parametrize("way", [pytest.param(way, marks=needs_kernel if way == "brgemm" else ()) for way in WAYS])
EPS_BF16, EPS_FP32 = 2.0**-8, 2.0**-24  # relative rounding errors


def normal(*shape, seed=0):
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_singular_values(s, n, seed=0):
    """Two matrices (len(s), n) that have these."""
    u, v = (torch.linalg.qr(normal(2, k, len(s), seed=seed + k).double())[0] for k in (len(s), n))
    return (u * s) @ v.mT


@pytest.mark.parametrize("way", ["plain", "gram"])
@settings(max_examples=40)
@given(rows=st.integers(2, 24), cols=st.integers(2, 24), scale=st.sampled_from([1e-12, 1.0, 1e8]), seed=st.integers(0, 999))
def test_orthogonal_at_any_scale(way, device, rows, cols, scale, seed):
    """Five steps bring every singular value that is not tiny to within 0.7 .. 1.3; the paper's bound is tighter for
    well conditioned input, but a random square matrix has a small one now and then."""
    g = normal(1, rows, cols, seed=seed).to(device) * scale
    equilibrated = (g / g.norm(dim=-1, keepdim=True))[0].double()
    u, s, vh = torch.linalg.svd(equilibrated, full_matrices=False)
    ours = polar_factor(g, torch.float32, way)[0].double()
    along = torch.diagonal(u.T @ ours @ vh.T)   # how far the update goes in each direction of the gradient
    well = s > 1e-2 * s.max()
    assert ((along[well] > 0.7) & (along[well] < 1.3)).all(), along
    off_diagonal = u.T @ ours @ vh.T - torch.diag(along)
    assert off_diagonal.abs().max() < 1e-3


@EVERY_WAY
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 16, 32), (2, 32, 16)])
def test_of_zeros_is_zero(way, shape, device):
    if way == "brgemm" and device != "cpu":
        pytest.skip("a kernel for CPUs")
    zeros = torch.zeros(shape, device=device)
    assert torch.equal(polar_factor(zeros, torch.bfloat16, way), zeros)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 16), (3, 8, 33), (3, 64, 16)])
def test_the_ways_agree_but_for_rounding(shape):
    g = normal(*shape).double()
    ways = [polar_factor(g, torch.float64, way) for way in ("gram", "plain")]
    torch.testing.assert_close(*ways, rtol=1e-9, atol=1e-9)


@EVERY_WAY
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(128, 128), (128, 512), (512, 128)])
def test_rounding_to_bf16_does_no_harm(way, power, shape):
    """Singular values 1, 2^-power, 3^-power ...: none may grow much beyond 1, and the whole stays within
    10 % of what float64 has. Without its restart `gram` misses that by a factor of a thousand at power 1."""
    small, large = sorted(shape)
    g = with_singular_values(torch.arange(1, small + 1).double() ** -power, large)
    g = g.mT if shape[0] > shape[1] else g
    want = polar_factor(g, torch.float64)
    got = polar_factor(g.float(), torch.bfloat16, way).double()
    assert (got - want).norm() < 0.1 * want.norm()
    assert torch.linalg.matrix_norm(got, 2).max() < 1.5


@needs_kernel
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(count=st.integers(1, 3), m=st.integers(1, 14), k=st.integers(1, 6) | st.sampled_from([16, 17, 33]),
       alpha=st.sampled_from([1.0, -22.5]), beta=st.sampled_from([1.0, 8.2]), added=st.booleans(), seed=st.integers(0, 9))
def test_a_symmetric_product_equals_the_definition(count, m, k, alpha, beta, added, seed):
    """Products of bf16 are exact in fp32: k sums round, then the result to bf16."""
    check_symmetric_product(count, 16 * m, 32 * k, alpha, beta, added, seed)


def check_symmetric_product(count, m, k, alpha, beta, added, seed):
    x = normal(count, m, k, seed=seed).bfloat16()
    c = normal(count, m, m, seed=seed + 10)
    c = (c + c.mT).bfloat16() if added else None
    got = symmetric_product_cpp(x, x, c, alpha, beta)
    exact, size = (alpha * (x.double() @ x.double().mT), abs(alpha) * x.double().abs() @ x.double().abs().mT)
    if added:
        exact, size = exact + beta * c.double(), size + abs(beta) * c.double().abs()
    bound = EPS_BF16 * exact.abs() + EPS_FP32 * (k + 4) * size
    assert ((got.double() - exact).abs() <= bound).all()
    assert torch.equal(got, got.mT)


@needs_kernel
def test_two_factors_and_any_strides():
    """x y^T is symmetric where both are polynomials of one matrix. Rounded ones are it nearly, and one triangle counts."""
    a = symmetric_product(x := normal(2, 96, 128).bfloat16(), x)
    b = (a.float() + 3 * torch.eye(96)).bfloat16()
    got, exact = symmetric_product_cpp(a, b), a.double() @ b.double().mT
    assert torch.equal(got, got.mT)
    bound = EPS_BF16 * exact.abs() + EPS_FP32 * 100 * a.double().abs() @ b.double().abs().mT
    below = torch.ones(96, 96).tril().bool()
    assert ((got.double() - exact).abs() <= bound)[:, below].all()
    strided = torch.stack((a, b), -1)[..., 0]
    assert torch.equal(symmetric_product_cpp(strided, b.mT.contiguous().mT), got)
    assert torch.equal(symmetric_product_cpp(x.mT.contiguous().mT, x), symmetric_product_cpp(x, x))


@needs_kernel
def test_other_sizes_and_dtypes_are_left_to_torch():
    for x in (normal(2, 24, 32).bfloat16(), normal(2, 16, 40).bfloat16(), normal(2, 16, 32)):
        assert torch.equal(symmetric_product_cpp(x, x, alpha=2.0), symmetric_product(x, x, alpha=2.0))


@needs_kernel
def test_the_same_bits_on_any_number_of_threads():
    g, threads, results = normal(3, 208, 640), torch.get_num_threads(), []
    x = g.bfloat16()
    try:
        for n in (1, 2, 3, 8, 40):
            torch.set_num_threads(n)
            results.append(symmetric_product_op(x, x, None, 1.0, 1.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@EVERY_WAY
def test_compiled_for_any_number_of_matrices(way):
    compiled = torch.compile(polar_factor, fullgraph=True)
    for count in (2, 5):
        g = normal(count, 64, 160, seed=count)
        torch._dynamo.mark_dynamic(g, 0)
        got, want = compiled(g, torch.bfloat16, way), polar_factor(g, torch.bfloat16, way)
        assert (got - want).norm() < 0.1 * want.norm()


def test_the_fastest_way_is_chosen_unless_the_user_or_a_resume_says_otherwise():
    shapes, cpu = [(64, 64), (256, 64), (64, 256)], torch.device("cpu")
    measured = choose_polar_express(4 * shapes, torch.bfloat16, cpu)
    assert measured.name in WAYS and set(measured.milliseconds) == {"plain", "gram"} | ({"brgemm"} if not reason else set())
    assert set(choose_polar_express(4 * shapes, torch.float32, cpu).milliseconds) == {"plain", "gram"}
    for way in ("plain", "gram"):
        assert choose_polar_express(shapes, torch.bfloat16, cpu, wanted=way)[:2] == (way, "--polar-express")
        assert choose_polar_express(shapes, torch.bfloat16, cpu, recorded=way)[:2] == (way, "as before the resume")
    assert choose_polar_express([(64, 64)], torch.float32, cpu)[:2] == ("plain", "the only one that works")


def test_where_the_kernel_does_not_work_the_same_steps_are_taken_by_torch():
    shapes, cpu = [(64, 256)], torch.device("cpu")
    assert choose_polar_express(shapes, torch.float32, cpu, recorded="brgemm").name == "gram"
    with pytest.raises(UserError, match="--polar-express brgemm cannot be used here: the kernel is for bfloat16"):
        choose_polar_express(shapes, torch.float32, cpu, wanted="brgemm")


def test_a_run_takes_the_choice_and_records_it(base):
    flags = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=32", "--device-batch-size=2",
             "--total-batch-size=64", "--num-iterations=1", "--vocab-size=300", f"--data={base / 'text'}", "--no-compile",
             "--device-type=cpu"]
    for wanted in ("plain", "gram"):
        trainer = build_trainer_only(parse_config(FEATURES, [*flags, f"--polar-express={wanted}"]))
        assert trainer.plan.kernel_choices["polar express"]["name"] == wanted == trainer.state.optimizer.muon_way
