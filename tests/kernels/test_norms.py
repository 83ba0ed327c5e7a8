"""Fused sums and norms against float64, against the plain ones, compiled, in the model, and as Triton kernels."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nanochat.engine import KVCache
from nanochat.features import FEATURES
from nanochat.features.fused_rmsnorm import FusedRmsnorm
from nanochat.kernels.norms import (
    EPS,
    add_norm,
    add_norm_backward,
    backward_reference,
    forward_reference,
    fused_add_norm,
    fused_mix_norm,
    mix_norm,
    mix_norm_backward,
    rms_norm,
    sum_and_norm,
)
from nanochat.runtime.compilation import CompiledModel, graphs_compiled
from nanochat.training.config import parse_config
from test_gpt import TINY, batch, tiny_model
from triton_kernels import compiled_for, interpreted

LOW = [pytest.param(torch.bfloat16, 2**-8, id="bf16"), pytest.param(torch.float16, 2**-11, id="fp16")]
MIX, ADD = pytest.param(True, id="mix"), pytest.param(False, id="add")


def problem(rows, width, mixes, device, dtype=torch.float32, seed=0, size=1.0):
    """Two summands (2, rows, width), for mix_norm the two scalars too, and the gradients of both results."""
    torch.manual_seed(seed)
    x, y = ((torch.randn(2, rows, width) * size).to(device, dtype).requires_grad_() for _ in range(2))
    scalars = [torch.tensor(value, device=device, requires_grad=True) for value in (1.1, -0.3)] if mixes else []
    return [x, y, *scalars], [torch.randn(2, rows, width).to(device, dtype) for _ in range(2)]


def outcome(function, inputs, gradients):
    """Both results, and the gradients of all inputs."""
    results = function(*inputs)
    return *(r.detach() for r in results), *torch.autograd.grad(results, inputs, gradients)


def exact(inputs, gradients):
    """The same in float64, of the same numbers, by the definition."""
    def defined(x, y, a=1.0, b=1.0):
        mixed = a * x + b * y
        return mixed, mixed / (mixed.square().mean(-1, keepdim=True) + EPS).sqrt()
    return outcome(defined, [i.detach().double().requires_grad_() for i in inputs], [g.double() for g in gradients])


def fused(mixes):
    return fused_mix_norm if mixes else fused_add_norm


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


# --- values and gradients -------------------------------------------------------------------------------------------

@given(rows=st.integers(1, 20), width=st.integers(8, 200), mixes=st.booleans(), size=st.sampled_from([1e-3, 1.0, 100.0]),
       seed=st.integers(0, 99))
@settings(max_examples=60)
def test_in_fp32_it_is_the_definition(device, rows, width, mixes, size, seed):
    """Of any size, also where eps counts, but no row of so few channels that its sum vanishes. Gradients that cancel are held
    against what cancels."""
    inputs, gradients = problem(rows, width, mixes, device, size=size, seed=seed)
    mine, right = outcome(fused(mixes), inputs, gradients), exact(inputs, gradients)
    arriving = sum(g.double().norm() for g in gradients) * max(1, 1 / size)
    magnitudes = [r.norm() for r in right[:2]] + [arriving] * 2 + [arriving * i.detach().double().norm() for i in inputs[:2]]
    for value, truth, magnitude in zip(mine, right, magnitudes, strict=False):  # without scalars the last two say nothing
        assert value.dtype == torch.float32 and (value.double() - truth).norm() < 3e-6 * magnitude


@pytest.mark.parametrize("mixes", [MIX, ADD])
@pytest.mark.parametrize("dtype, bound", LOW)
def test_in_low_precision_it_is_off_by_its_rounding(device, dtype, bound, mixes):
    """No more than one unit in the last place, and than the plain one and a bit; half a percent of scale would show."""
    case = problem(200, 96, mixes, device, dtype)
    mine, plain, right = outcome(fused(mixes), *case), outcome(mix_norm if mixes else add_norm, *case), exact(*case)
    assert [m.dtype for m in mine] == [dtype] * 4 + [torch.float32] * (2 * mixes)
    for value, theirs, truth in zip(mine[:4], plain[:4], right[:4], strict=True):
        assert error(value, truth) < min(bound, 1.2 * error(theirs, truth))
        assert (value.double() * truth).sum().item() == pytest.approx(truth.square().sum().item(), rel=bound / 4)


@pytest.mark.parametrize("dtype, bound", LOW)
def test_gradients_of_the_scalars(device, dtype, bound):
    """Sums over all tokens and channels whose terms do not cancel: d points along x. A token left out would show."""
    (x, x0, a, b), _ = problem(200, 96, True, device, dtype)
    inputs, gradients = [x, x0, a, b], [(x + 2 * x0).detach(), torch.zeros_like(x)]
    mine, right = outcome(fused_mix_norm, inputs, gradients), exact(inputs, gradients)
    for value, truth in zip(mine[4:], right[4:], strict=True):
        assert value.shape == () and value.item() == pytest.approx(truth.item(), rel=1e-6)
    inputs, gradients = [x, x0, a, b], [torch.zeros_like(x), (x + 2 * x0).detach()]
    for value, truth in zip(outcome(fused_mix_norm, inputs, gradients)[4:], exact(inputs, gradients)[4:], strict=True):
        assert value.item() == pytest.approx(truth.item(), rel=bound)


def test_eps_is_that_of_rms_norm(device):
    """A row of almost nothing, in every dtype: with the dtype's own eps, or none, it would have another size."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((1, 64), 2.0**-12, dtype=dtype, device=device)
        torch.testing.assert_close(fused_add_norm(x, torch.zeros_like(x))[1], rms_norm(x), rtol=1e-6, atol=0)
        assert rms_norm(x)[0, 0].item() == pytest.approx(2**-12 / (2**-24 + EPS) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("mixes", [MIX, ADD])
def test_strides_do_not_matter(device, mixes):
    inputs, gradients = problem(6, 10, mixes, device)
    turned = [i.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() if i.dim() else i for i in inputs]
    broadcast = [gradients[0][:, :1].expand_as(gradients[0]), gradients[1]]
    dense = [g.contiguous() for g in broadcast]
    assert all(map(torch.equal, outcome(fused(mixes), turned, broadcast), outcome(fused(mixes), inputs, dense)))


def test_where_only_one_result_is_used(device):
    inputs, (gradient, _) = problem(5, 12, True, device)
    zero = torch.zeros_like(gradient)
    for which, gradients in ((0, [gradient, zero]), (1, [zero, gradient])):
        alone = torch.autograd.grad(fused_mix_norm(*inputs)[which], inputs, gradient)
        assert all(map(torch.equal, alone, outcome(fused_mix_norm, inputs, gradients)[2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixes", [MIX, ADD])
def test_the_operators_keep_what_they_declare(device, dtype, mixes):
    """Shapes, dtypes and strides of the fake ones, whatever those of the gradients; no aliases; autograd that can be traced."""
    inputs, gradients = problem(3, 8, mixes, device, dtype)
    gradients = [g.transpose(0, 2).contiguous().transpose(0, 2) for g in gradients]
    torch.library.opcheck(sum_and_norm, (*inputs, *[None] * (4 - len(inputs))))
    mixed, _, r = sum_and_norm(*inputs, *[None] * (4 - len(inputs)))
    kept = (*inputs, r) if mixes else (mixed, r)
    torch.library.opcheck(mix_norm_backward if mixes else add_norm_backward, [t.detach() for t in (*kept, *gradients)])


# --- in the model ---------------------------------------------------------------------------------------------------

def fused_model(**options):
    model = tiny_model(**options)
    model.kernels.mix_norm, model.kernels.add_norm = fused_mix_norm, fused_add_norm
    return model


def gradients_of(forward, model, **options):
    model.zero_grad()
    loss = forward(*batch(device=model.get_device()), **options)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("start, detach_x0", [(0, True), (2, True), (2, False)])
def test_the_model_and_its_suffixes(device, start, detach_x0):
    """The plain model's loss and gradients; nothing for what is frozen, and exact zeros in the scalars of its layers."""
    plain, model = tiny_model(device=device), fused_model(device=device)
    options = dict(active_start=start, detach_x0=detach_x0)
    (loss, grads), (expected_loss, expected) = gradients_of(model, model, **options), gradients_of(plain, plain, **options)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    for name, grad in grads.items():
        assert (grad is None) == (expected[name] is None), name
        assert grad is None or error(grad, expected[name].double()) < 1e-5, name
    assert all((grads[name] is None) == (start > 0) for name in ("resid_lambdas", "x0_lambdas"))


def test_sampling_with_a_cache(device):
    """Token by token as all at once."""
    model, (x, _) = fused_model(device=device), batch(rows=1, device=device)
    cache = KVCache.for_model(model, 1, TINY.sequence_len)
    with torch.no_grad():
        stepwise = torch.cat([model(x[:, t:t + 1], kv_cache=cache) for t in range(12)], dim=1)
        torch.testing.assert_close(stepwise, model(x[:, :12]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stepwise, tiny_model(device=device)(x[:, :12]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_in_a_compiled_model(device, whole):
    """Full steps and suffix steps, again and again, on the graphs of the warm-up, with the plain model's gradients."""
    torch._dynamo.reset()
    config = replace(TINY, n_layer=2)
    plain, model = tiny_model(config, device=device), fused_model(config=config, device=device)
    compiled = CompiledModel(model, whole=whole, backend="aot_eager")
    graphs = None
    for start in (0, 1, 0, 1):
        compiled.warm_up(*batch(seed=9, device=device), active_start=start)
        graphs = graphs or (graphs_compiled() if start else None)
        loss, grads = gradients_of(compiled, model, active_start=start)
        expected_loss, expected = gradients_of(plain, plain, active_start=start)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
        for name, grad in grads.items():
            assert (grad is None) == (expected[name] is None), name
            assert grad is None or error(grad, expected[name].double()) < 1e-5 or grad.norm() < 1e-6, name
    assert graphs_compiled() == graphs and compiled.eager_fallbacks == 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mixes", [MIX, ADD])
def test_compiled_it_is_one_graph_and_the_same(device, backend, mixes):
    torch._dynamo.reset()
    case = problem(7, 24, mixes, device, torch.bfloat16)
    compiled = torch.compile(fused(mixes), fullgraph=True, dynamic=False, backend=backend)
    assert all(map(torch.equal, outcome(compiled, *case), outcome(fused(mixes), *case)))


def test_without_a_gpu_the_feature_leaves_the_model_alone_and_says_so(capsys):
    config = parse_config(FEATURES, ["--fused-rmsnorm", "--device-type=cpu"])
    model = tiny_model()
    FusedRmsnorm(config).on_model(model, None)
    assert (model.kernels.mix_norm, model.kernels.add_norm) == (mix_norm, add_norm)
    assert "--fused-rmsnorm" in capsys.readouterr().out


# --- Triton ---------------------------------------------------------------------------------------------------------

TRITON = """
import torch
from nanochat.kernels.norms import backward_reference, backward_triton, forward_reference, forward_triton
torch.manual_seed(0)
scalars = torch.tensor(1.5), torch.tensor(-0.5)
for rows, width in ((1, 1), (5, 64), (3, 96), (2, 1000)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = (torch.randint(-8, 9, (2, rows, width)).to(dtype) / 4 for _ in range(2))  # their sums need no rounding
        gradients = [torch.randn(2, rows, width).to(dtype) for _ in range(2)]
        rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps  # the interpreter truncates bf16
        for a, b in (scalars, (None, None)):
            forward = forward_reference(x, y, a, b)
            kept = (*((forward[0], None, None, None) if a is None else (x, y, a, b)), forward[2])
            pairs = [*zip(forward_triton(x, y, a, b), forward),
                     *zip(backward_triton(*kept, *gradients), backward_reference(*kept, *gradients))]
            for mine, plain in pairs:
                assert (mine is None) == (plain is None)
                if mine is not None and mine.dtype == torch.float32:  # r and the sums are fp32, whatever x is
                    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=2e-5)
                elif mine is not None:
                    torch.testing.assert_close(mine, plain, rtol=rounding, atol=1e-5)
print("equal")
"""


def test_the_triton_kernels_in_the_interpreter():
    interpreted(TRITON)


PTX = """
from nanochat.kernels.norms import _backward_kernel, _forward_kernel
row, number = "*bf16", "*fp32"
forward = dict(x=row, y=row, a=number, b=number, mixed=row, normed=row, r=number, width="i32", eps="fp32")
backward = dict(x=row, y=row, a=number, b=number, r=number, d_mixed=row, d_normed=row, dx=row, dy=row, sums=number,
                rows="i32", width="i32")
for kernel, types, absent in ((_forward_kernel, forward, "a b"), (_backward_kernel, backward, "y a b dy sums")):
    for missing in ("", absent):
        constants = {name: None for name in missing.split()} | {"BLOCK": 1024}
        types = types | {name: "constexpr" for name in constants}
        aligned = {(place,): [["tt.divisibility", 16]] for place, (name, kind) in enumerate(types.items())
                   if kind == row or name == "width"}
        ptx = compile(ASTSource(kernel, types, constants, aligned), target, {"num_warps": 4}).asm["ptx"]
        print(ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32"), end=" ")
"""


@pytest.mark.parametrize("capability", [89, 90])
def test_the_triton_kernels_compile(capability):
    """Each tensor is read once and written once, 16 bytes at a time: x, y | x', n and x, y, dx', dn | dx, dy with the two
    scalars, x, y | x', n and x', dx', dn | d without."""
    assert compiled_for(capability, PTX).split() == "2 2 2 2 4 2 3 1".split()


# --- past 2^31 elements -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mixes", [MIX, ADD])
def test_more_than_2_31_elements(large_device, mixes):
    """Rows at both ends and around element 2^31, against the references on these rows alone. Where a sum is rounded the other
    way, what follows from it is off by some of bf16's steps; a row from elsewhere is off by its own size, which is about 1."""
    rows, width = 2**20 + 8, 2**11
    assert rows * width > 2**31
    generator = torch.Generator(large_device).manual_seed(0)
    x, y, d_mixed, d_normed = (torch.randn(rows, width, generator=generator, device=large_device, dtype=torch.bfloat16)
                               for _ in range(4))
    a, b = (torch.tensor(value, device=large_device) for value in (1.1, -0.3)) if mixes else (None, None)
    mixed, normed, r = sum_and_norm(x, y, a, b)
    if mixes:
        *gradients, _ = mix_norm_backward(x, y, a, b, r, d_mixed, d_normed)
    else:
        gradients = [add_norm_backward(mixed, r, d_mixed, d_normed)]
    for part in (slice(8), slice(2**20 - 4, 2**20 + 4), slice(-8, None)):
        forward = forward_reference(x[part], y[part], a, b)
        kept = (x[part], y[part], a, b) if mixes else (forward[0], None, None, None)
        backward = backward_reference(*kept, forward[2], d_mixed[part], d_normed[part])[:len(gradients)]
        for mine, right in zip((mixed, normed, *gradients), (*forward[:2], *backward), strict=True):
            torch.testing.assert_close(mine[part], right, rtol=2**-6, atol=0.02)
