"""Queries, keys and values by one product: against float64, with every kind of layer, in the model, and chosen."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat.common import UserError
from nanochat.engine import KVCache
from nanochat.features import FEATURES
from nanochat.fp8 import Float8Linear, Float8LinearConfig
from nanochat.kernels import qkv
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.cpu_attention import _contiguous_heads
from nanochat.kernels.inference import InferenceLinear
from nanochat.kernels.linear import CastOnceLinear, Linear, refresh, use_own_weight_gradient
from nanochat.kernels.qkv import choose_qkv, fused_qkv, separate_qkv
from nanochat.kernels.rotary import _strided_by_token
from nanochat.runtime.compilation import CompiledModel
from nanochat.runtime.tuner import Tuner
from nanochat.training.build import build_trainer_only, choose_kernels
from nanochat.training.config import parse_config
from test_gpt import TINY, batch, gradients_of, tiny_model

reason = cpp_unavailable_reason("weight_gradient")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
EPS = 2.0**-24                                  # largest relative error of an fp32 operation
ROUNDING = {torch.float32: EPS, torch.bfloat16: 2.0**-8}
SIZES = 64, (64, 32, 32)                        # features of x, and of q, k and v: two query heads share a key head


def three_layers(device):
    torch.manual_seed(0)
    return [Linear(SIZES[0], n).to(device) for n in SIZES[1]]


def problem(dtype, device, tokens=(2, 50)):
    """x (2, 50, 64) and the gradients of q, k and v."""
    random = torch.Generator().manual_seed(1)
    x, *gradients = (torch.randn(*tokens, n, generator=random).to(device, dtype) for n in (SIZES[0], *SIZES[1]))
    return x.requires_grad_(), gradients


def outcome(function, layers, x, gradients):
    """q, k and v, the gradient of x, and those of the weights."""
    results = function(x, *layers)
    return *(r.detach() for r in results), *torch.autograd.grad(results, (x, *(layer.weight for layer in layers)), gradients)


def exact(layers, x, gradients):
    """The same in float64 by the definition, of x and the weights in the dtype of x; and the sums of magnitudes of each."""
    x, weights = x.detach().double(), [layer.weight.detach().to(x.dtype).double() for layer in layers]
    gradients = [g.double() for g in gradients]

    def results(x, weights, gradients):
        pairs = list(zip(gradients, weights, strict=True))
        return *(x @ w.t() for w in weights), sum(g @ w for g, w in pairs), *(g.flatten(0, 1).t() @ x.flatten(0, 1)
                                                                              for g in gradients)
    return results(x, weights, gradients), results(x.abs(), [w.abs() for w in weights], [g.abs() for g in gradients])


def kinds(device):
    """Name -> three layers with the same weights."""
    cast_once = [CastOnceLinear.from_linear(layer, torch.bfloat16) for layer in three_layers(device)]
    for layer in cast_once:
        layer.to(device)
    refresh(cast_once)
    return {"plain": three_layers(device), "cast once": cast_once, "mixed": [*cast_once[:1], *three_layers(device)[1:]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "cast once", "mixed"])
def test_equals_the_definition(device, dtype, kind):
    """As many terms as the sum has, and one rounding; the gradient of x sums over q, k and v together."""
    layers, (x, gradients) = kinds(device)[kind], problem(dtype, device)
    terms = [SIZES[0]] * 3 + [sum(SIZES[1])] + [100] * 3
    for got, right, size, n in zip(outcome(fused_qkv, layers, x, gradients), *exact(layers, x, gradients), terms, strict=True):
        assert ((got.double() - right).abs() <= 1.01 * (EPS * n * size + ROUNDING[dtype] * right.abs())).all()
    assert [t.dtype for t in outcome(fused_qkv, layers, x, gradients)] == [dtype] * 4 + [torch.float32] * 3


def test_is_no_less_exact_than_three_products(device):
    """Whose three gradients of x are rounded, and added in bf16."""
    layers, (x, gradients) = three_layers(device), problem(torch.bfloat16, device)
    right = exact(layers, x, gradients)[0][3]
    mine, plain = (outcome(function, layers, x, gradients)[3] for function in (fused_qkv, separate_qkv))
    assert (mine - right).norm() < 0.9 * (plain - right).norm()


def test_in_float64_both_are_the_same(device):
    layers, (x, gradients) = three_layers(device), problem(torch.float64, device)
    for mine, plain in zip(*(outcome(f, layers, x, gradients) for f in (fused_qkv, separate_qkv)), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6 if mine.dtype == torch.float32 else 1e-12, atol=1e-12)


class Products(TorchDispatchMode):
    """Counts matrix products."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return function(*args, **kwargs or {})


def test_it_is_one_product_and_two_for_its_gradients(device):
    layers, (x, gradients) = three_layers(device), problem(torch.bfloat16, device)
    for function, products in ((separate_qkv, 3), (fused_qkv, 1)):
        with Products() as forward:
            results = function(x, *layers)
        with Products() as backward:
            torch.autograd.grad(results, (x, *(layer.weight for layer in layers)), gradients)
        assert (forward.count, backward.count) == (products, 2 * products)


def test_our_kernels_for_cpus_take_the_views_without_a_copy():
    x, _ = problem(torch.bfloat16, "cpu")
    for t in fused_qkv(x, *three_layers("cpu")):
        heads = t.view(2, 50, -1, 32)
        assert not heads.is_contiguous() and _strided_by_token(heads) is heads and _contiguous_heads(heads) is heads


@needs_kernel
@pytest.mark.parametrize("compiled", [False, True])
def test_with_a_weight_gradient_of_its_own(compiled):
    """All three in one call of the C++ kernel, not rounded to bf16; the rest as before."""
    layers, (x, gradients) = three_layers("cpu"), problem(torch.bfloat16, "cpu")
    plain = outcome(fused_qkv, layers, x, gradients)
    use_own_weight_gradient(layers)
    function = torch.compile(fused_qkv, fullgraph=True, dynamic=False) if compiled else fused_qkv
    own, (right, sizes) = outcome(function, layers, x, gradients), exact(layers, x, gradients)
    assert all(map(torch.equal, own[:4], plain[:4]))
    for dw, truth, size in zip(own[4:], right[4:], sizes[4:], strict=True):
        assert ((dw.double() - truth).abs() <= 1.01 * EPS * 102 * size).all()
    with torch.no_grad():
        assert not fused_qkv(x, *layers)[0].requires_grad
    for layer in layers:
        layer.weight.requires_grad_(False)
    dx, = torch.autograd.grad(fused_qkv(x, *layers), x, gradients)
    assert torch.equal(dx, plain[3])


def test_other_layers_are_computed_one_by_one(device):
    """FP8 layers, those of generation, and a single one of them among plain layers."""
    x, gradients = problem(torch.bfloat16, device, tokens=(2, 48))
    plain = three_layers(device)
    fp8 = [Float8Linear.from_float(layer, Float8LinearConfig(emulate=True)) for layer in plain]
    for layers in (fp8, [plain[0], fp8[1], plain[2]]):
        assert all(map(torch.equal, *(outcome(f, layers, x, gradients) for f in (fused_qkv, separate_qkv))))
    fixed = [InferenceLinear.from_linear(layer, torch.bfloat16) for layer in plain]
    with torch.no_grad():
        assert all(map(torch.equal, fused_qkv(x, *fixed), separate_qkv(x, *fixed)))


# --- in the model -----------------------------------------------------------------------------------------------------

def fused_model(device, **options):
    model = tiny_model(device=device, **options)
    model.kernels.project_qkv = fused_qkv
    return model


def agree(loss, grads, expected_loss, expected, bound):
    assert abs(loss - expected_loss) <= bound * expected_loss
    for name, grad in grads.items():
        assert (grad is None) == (expected[name] is None), name
        assert grad is None or (grad - expected[name]).norm() <= bound * expected[name].norm() + 1e-2 * bound, name


@pytest.mark.parametrize("start, detach_x0", [(0, True), (2, True), (2, False)])
def test_the_model_and_its_suffixes_learn_the_same(device, start, detach_x0):
    """In float64, whose gradients are rounded to the master weights' fp32."""
    options = dict(active_start=start, detach_x0=detach_x0)
    plain, model = tiny_model(dtype=torch.float64, device=device), fused_model(device, dtype=torch.float64)
    agree(*gradients_of(model, model, device, **options), *gradients_of(plain, plain, device, **options), bound=1e-6)


def test_in_bf16_it_is_as_near_to_fp32(device):
    gradients = {}
    for name, dtype, function in (("exact", torch.float32, separate_qkv), ("separate", torch.bfloat16, separate_qkv),
                                  ("fused", torch.bfloat16, fused_qkv)):
        model = tiny_model(dtype=dtype, device=device)
        model.kernels.project_qkv = function
        gradients[name] = torch.cat([g.float().flatten() for g in gradients_of(model, model, device)[1].values()])
    distance = {name: (gradients[name] - gradients["exact"]).norm() for name in ("separate", "fused")}
    assert 0 < distance["fused"] < 1.2 * distance["separate"]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_in_a_compiled_model(device, whole):
    torch._dynamo.reset()
    config = replace(TINY, n_layer=2)
    plain, model = tiny_model(config, device=device), fused_model(device, config=config)
    compiled = CompiledModel(model, whole=whole, backend="aot_eager")
    for start in (0, 1, 0):
        compiled.warm_up(*batch(device=device), active_start=start)
        agree(*gradients_of(model, compiled, device, active_start=start), *gradients_of(plain, plain, device, active_start=start),
              bound=1e-4)
    assert compiled.eager_fallbacks == 0


def test_sampling_with_a_cache(device):
    """Token by token as all at once: keys and values of the cache come from views."""
    model, (x, _) = fused_model(device), batch(rows=1, device=device)
    cache = KVCache.for_model(model, 1, TINY.sequence_len)
    with torch.no_grad():
        stepwise = torch.cat([model(x[:, t:t + 1], kv_cache=cache) for t in range(12)], dim=1)
        torch.testing.assert_close(stepwise, model(x[:, :12]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stepwise, tiny_model(device=device)(x[:, :12]), rtol=1e-4, atol=1e-5)


# --- the choice -------------------------------------------------------------------------------------------------------

def test_both_ways_are_timed_once_and_remembered(device, tmp_path, monkeypatch):
    blocks = [tuple(three_layers(device))]

    def choose(**more):
        return choose_qkv(blocks, 128, torch.bfloat16, tuner=Tuner(device, tmp_path), **more)
    assert choose()[:2] == ("separate", "too short to matter")
    monkeypatch.setattr(qkv, "LEAST_WORK", 0)
    before = [layer.weight.clone() for layer in blocks[0]]
    first = choose()
    assert set(first.milliseconds) == {"separate", "fused"} and choose() == first._replace(reason="measured before")
    assert choose(recorded="fused")[:2] == ("fused", "as before the resume")
    assert choose(wanted="fused", recorded="separate").name == "fused" and choose(wanted="separate").name == "separate"
    assert all(map(torch.equal, before, (layer.weight for layer in blocks[0])))
    assert all(layer.weight.grad is None for layer in blocks[0])


def test_where_no_layer_is_plain_there_are_three_products(device):
    fp8 = tuple(Float8Linear.from_float(layer) for layer in three_layers(device))
    assert choose_qkv([fp8], 128, torch.bfloat16, recorded="fused")[:2] == ("separate", "the only one that works")
    with pytest.raises(UserError, match="--fused-qkv fused cannot be used here: no block has plain"):
        choose_qkv([fp8], 128, torch.bfloat16, wanted="fused")
    assert choose_qkv([fp8, tuple(three_layers(device))], 128, torch.bfloat16, recorded="fused").name == "fused"


def test_a_run_goes_on_with_the_choice_of_its_checkpoint(base):
    """And one from before there was a choice with three products."""
    trainer = build_trainer_only(parse_config(FEATURES, [
        "--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=32", "--device-batch-size=2", "--total-batch-size=64",
        "--num-iterations=1", "--vocab-size=300", f"--data={base / 'text'}", "--no-compile", "--device-type=cpu"]))
    model, tuner = trainer.state.model, Tuner("cpu", folder=None)
    for before, name, function in (({}, "separate", separate_qkv), ({"device": "cpu"}, "separate", separate_qkv),
                                   ({"qkv": "fused"}, "fused", fused_qkv)):
        choices = choose_kernels(trainer.plan, model, tuner, before)
        assert choices["qkv"]["name"] == name and model.kernels.project_qkv is function
    assert trainer.plan.kernel_choices["qkv"]["name"] == "separate"
