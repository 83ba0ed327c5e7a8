"""The loss by chunks against the plain one and against float64: values, both gradients, memory, compiled, over an FP8 head."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from nanochat import fp8
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.fp8 import (
    Float8Linear,
    Float8LinearConfig,
    cast_loss_gradient,
    fp8_unavailable_reason,
    refresh_weights,
    scaled_mm,
)
from nanochat.gpt import Linear
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.cross_entropy import (
    CHUNK_BYTES,
    CPP_KERNELS,
    FP16_SCALE,
    ChunkedCrossEntropy,
    default_chunk,
    loss_and_gradient,
    loss_cpp,
    loss_reference,
    softcapped_cross_entropy,
)
from nanochat.runtime.compilation import CompiledModel, graphs_compiled
from nanochat.training.config import parse_config
from test_gpt import TINY, batch, tiny_model
from triton_kernels import compiled_for, interpreted

ROOT = Path(__file__).parents[2]
native = pytest.mark.skipif(cpp_unavailable_reason("loss") is not None, reason=str(cpp_unavailable_reason("loss")))


def loss_of_gpu(logits, targets, vocab):
    """The pass that a GPU takes, of logits on a CPU."""
    on_gpu = logits.cuda()
    losses = loss_and_gradient(on_gpu, targets.cuda(), vocab)
    logits.copy_(on_gpu)
    return losses.cpu()


PASSES = [pytest.param(loss_reference, id="plain"), pytest.param(loss_cpp, id="native", marks=native)]
if torch.cuda.is_available():
    PASSES.append(pytest.param(loss_of_gpu, id="gpu", marks=pytest.mark.device))


class Through(torch.nn.Linear):
    """A head with a forward of its own, so that chunks go through it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return x @ self.weight.to(x.dtype).t()


def problem(tokens=100, width=32, vocab=101, padded=128, dtype=torch.float32, head=Linear, seed=0, ignored=0.2, size=1.0,
            device="cpu"):
    """x (4, tokens / 4, width), a head, and targets of which a share is ignored. The padding's weights are huge."""
    torch.manual_seed(seed)
    layer = head(width, padded)
    with torch.no_grad():
        layer.weight[:vocab].normal_(std=size)
        layer.weight[vocab:] = 1e4
    x = torch.randn(4, tokens // 4, width).to(device, dtype).requires_grad_()
    targets = torch.randint(vocab, (4, tokens // 4))
    targets[torch.rand(targets.shape) < ignored] = -1
    return x, layer.to(device), targets.to(device), vocab


def outcome(loss_of, x, head, targets, vocab, reduction="mean", factor=1.0):
    """Loss, and its gradients for x and the head's weight."""
    loss = loss_of(x, head, targets, vocab, reduction)
    return loss.detach(), *torch.autograd.grad(loss * factor, (x, head.weight))


def exact(x, head, targets, vocab, reduction="mean"):
    """The same in float64, of the same numbers."""
    x, weight = x.detach().double().requires_grad_(), head.weight.detach().to(x.dtype).double().requires_grad_()
    capped = 15 * torch.tanh(F.linear(x, weight)[..., :vocab] / 15)
    loss = F.cross_entropy(capped.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


# Relative errors of gradients in fp32. A capped logit of up to 15 is off by an ulp or two, so exp of it by 2e-6 of its size; the
# fused kernel for CUDA takes it from other functions, with errors a few times as large.
FP32_ERROR = {"cpu": 2e-6, "cuda": 8e-6}


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


# --- loss and gradients ---------------------------------------------------------------------------------------------

@given(tokens=st.integers(1, 20).map(lambda n: 4 * n), chunk=st.integers(1, 90), vocab=st.integers(2, 200),
       padding=st.integers(0, 70), head=st.sampled_from([Linear, Through]), reduction=st.sampled_from(["mean", "sum"]),
       size=st.sampled_from([0.01, 1.0, 5.0]), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_in_fp32_it_is_the_plain_one(device, tokens, chunk, vocab, padding, head, reduction, size, seed):
    """Any sizes, any chunk, every token wanted or some or none of a chunk. A gradient of a logit is a probability, less one
    at the target, and so is off by FP32_ERROR at most, also where the model is sure and little of it is left."""
    case = x, layer, targets, vocab, _ = (*problem(tokens, 32, vocab, vocab + padding, head=head, seed=seed, ignored=0.5,
                                                   size=size, device=device), reduction)
    unit = FP32_ERROR[device.type]
    counted = (targets >= 0).sum().item()
    if counted == 0:
        return
    loss, dx, dw = outcome(ChunkedCrossEntropy(chunk, Linear), *case)
    _, right_dx, right_dw = exact(*case)
    assert loss.item() == pytest.approx(outcome(softcapped_cross_entropy, *case)[0].item(), rel=1e-6, abs=2.5 * unit)
    share = unit / counted if reduction == "mean" else unit
    for mine, truth, scale in ((dx, right_dx, layer.weight[:vocab].norm() * counted**0.5),
                               (dw, right_dw, x.norm() * vocab**0.5)):
        assert (mine - truth).norm() < unit * truth.norm() + share * scale
    assert not dw[vocab:].any()


@pytest.mark.parametrize("head", [Linear, Through])
@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=["bf16", "fp16"])
def test_in_low_precision_it_is_off_by_its_rounding(device, dtype, bound, head):
    """No more than one unit in the last place and than the plain one and a half; half a percent of scale would show."""
    case = problem(400, 64, 500, 512, dtype, head, size=0.2, device=device)
    chunked, plain = outcome(ChunkedCrossEntropy(48, Linear), *case), outcome(softcapped_cross_entropy, *case)
    right = exact(*case)
    assert [g.dtype for g in chunked] == [torch.float32, dtype, torch.float32]
    assert chunked[0].item() == pytest.approx(plain[0].item(), rel=FP32_ERROR[device.type] / 2)
    for mine, theirs, truth in zip(chunked[1:], plain[1:], right[1:], strict=True):
        assert error(mine, truth) < min(bound, 1.5 * error(theirs, truth))
        assert (mine.double() * truth).sum().item() == pytest.approx(truth.square().sum().item(), rel=bound / 4)


def test_twice_the_same_bits(device):
    case = problem(400, 64, 500, 512, torch.bfloat16, device=device)
    first, second = (outcome(ChunkedCrossEntropy(48, Linear), *case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_is_multiplied_by_the_gradient_that_arrives(device):
    """A factor in fp32 that bf16 does not have: rounding it would scale every gradient by the same 0.3 %."""
    case, chunked = problem(100, dtype=torch.bfloat16, device=device), ChunkedCrossEntropy(48, Linear)
    factor = 1 + 2**-8 + 2**-9
    for whole, scaled in zip(outcome(chunked, *case)[1:], outcome(chunked, *case, factor=factor)[1:], strict=True):
        share = (scaled.double() * whole.double()).sum() / whole.double().square().sum()
        assert share.item() == pytest.approx(factor, rel=3e-4)


def test_micro_batches_add_up(device):
    """Half the loss twice, as gradients are accumulated, into the same .grad."""
    x, head, targets, vocab = problem(ignored=0.0, device=device)
    for half in (slice(0, 2), slice(2, 4)):
        (ChunkedCrossEntropy(16, Linear)(x[half], head, targets[half], vocab) / 2).backward()
    _, dx, dw = exact(x, head, targets, vocab)
    assert error(x.grad, dx) < FP32_ERROR[device.type] and error(head.weight.grad, dw) < FP32_ERROR[device.type]


def test_nothing_to_predict_is_nan_with_zero_gradients_as_in_the_plain_one(device):
    case = problem(ignored=1.1, device=device)
    for loss_of in (softcapped_cross_entropy, ChunkedCrossEntropy(16, Linear)):
        loss, dx, dw = outcome(loss_of, *case)
        assert math.isnan(loss) and not dx.any() and not dw.any()
        assert outcome(loss_of, *case, "sum")[0] == 0


def test_single_losses_have_gradients_too(device):
    x, head, targets, vocab = problem(device=device)
    losses = ChunkedCrossEntropy(16, Linear)(x, head, targets, vocab, "none")
    assert losses.shape == targets.shape and not losses[targets < 0].any()
    dx, = torch.autograd.grad(losses.sum(), x)
    assert error(dx, exact(x, head, targets, vocab, "sum")[1]) < FP32_ERROR[device.type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_evaluation_is_the_plain_loss(device, reduction, dtype):
    case = (*problem(dtype=dtype, device=device), reduction)
    with torch.no_grad():
        chunked, plain = ChunkedCrossEntropy(48, Linear)(*case), softcapped_cross_entropy(*case)
    assert chunked.shape == plain.shape and not chunked.requires_grad
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=1e-6 if device.type == "cpu" else 1e-5)


def test_fp16_under_a_loss_scale(device):
    """As the gradient scaler does it: no gradient is lost that the plain one has."""
    case = problem(400, 64, 500, 512, torch.float16, size=0.2, device=device)
    _, dx, dw = outcome(ChunkedCrossEntropy(48, Linear), *case, factor=1024.0)
    right = exact(*case)
    assert error(dx / 1024, right[1]) < 2**-10 and error(dw / 1024, right[2]) < 2**-10


# --- the pass over the logits ---------------------------------------------------------------------------------------

def exact_pass(logits, targets, vocab):
    z = logits[:, :vocab].double().requires_grad_()
    losses = F.cross_entropy(15 * torch.tanh(z / 15), targets, ignore_index=-1, reduction="none")
    return losses.detach(), F.pad(torch.autograd.grad(losses.sum(), z)[0], (0, logits.size(1) - vocab))


@pytest.mark.parametrize("loss_of", PASSES)
@pytest.mark.parametrize("dtype", CPP_KERNELS)
@pytest.mark.parametrize("vocab, width", [(1, 1), (2, 16), (16, 16), (17, 64), (101, 128), (1000, 1008)])
@pytest.mark.parametrize("size", [0.1, 3.0, 1e4])
def test_losses_and_gradients_of_logits(loss_of, dtype, vocab, width, size):
    """Of any size: at 1e4 the cap is reached in fp32, and nothing overflows. What stands in the padding does not count."""
    torch.manual_seed(vocab)
    logits = (torch.randn(33, width) * size).to(dtype)
    logits[:, vocab:] = math.nan
    targets = torch.randint(-1, vocab, (33,))
    losses, gradient = exact_pass(logits, targets, vocab)
    torch.testing.assert_close(loss_of(logits, targets, vocab), losses.float(), rtol=1e-6, atol=1e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.double(), gradient, rtol=rounding, atol=2e-6)  # 1 - tanh^2 is lost near the cap
    assert not logits[:, vocab:].any() and not logits[targets < 0].any()


@pytest.mark.parametrize("loss_of", PASSES)
def test_what_is_not_a_number_shows(loss_of):
    """One bad logit spoils its own row, and no other; an infinite one is as capped as the plain loss has it."""
    logits, targets = torch.randn(3, 40), torch.tensor([5, 6, 7])
    logits[0, 20], logits[1, 21] = math.nan, math.inf
    expected = exact_pass(logits[1:], targets[1:], 40)
    losses = loss_of(logits, targets, 40)
    assert losses[0].isnan() and logits[0].isnan().any()
    torch.testing.assert_close(losses[1:], expected[0].float(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits[1:].double(), expected[1].nan_to_num(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("loss_of", PASSES[:2])
@pytest.mark.parametrize("target", [40, -2])
def test_a_target_that_is_no_token_is_refused(loss_of, target):
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|vocabulary of 40"):
        loss_of(torch.randn(2, 48), torch.tensor([3, target]), 40)


def test_small_probabilities_survive_in_fp16():
    """2e-8 is nothing in fp16, nor is its gradient, unless it is scaled before it is rounded."""
    logits = torch.full((1, 64), -12.0)
    logits[0, 0] = 9.0
    expected = exact_pass(logits, torch.tensor([0]), 64)[1][0, 1:]
    unscaled, scaled = logits.half(), logits.half()
    loss_reference(unscaled, torch.tensor([0]), 64)
    loss_reference(scaled, torch.tensor([0]), 64, FP16_SCALE)
    assert not unscaled[0, 1:].any()
    torch.testing.assert_close(scaled[0, 1:].double() / FP16_SCALE, expected, rtol=0.05, atol=0)


TRITON = """
import torch
from nanochat.kernels.cross_entropy import BLOCK, loss_reference, loss_triton
torch.manual_seed(0)
for vocab, width in ((40, 48), (BLOCK, BLOCK), (2 * BLOCK + 7, 2 * BLOCK + 64)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = (torch.randn(5, width) * 8).to(dtype)
        logits[:, vocab:], logits[1, 3] = float("nan"), 3e4
        targets = torch.tensor([0, vocab - 1, -1, vocab // 2, 3])
        mine, plain = logits.clone(), logits.clone()
        alone = loss_triton(mine, targets, vocab, gradient=False)
        assert torch.equal(mine.view(torch.uint8), logits.view(torch.uint8))
        losses = [loss_triton(mine, targets, vocab, 16.0), loss_reference(plain, targets, vocab, 16.0)]
        assert torch.equal(losses[0], alone)
        torch.testing.assert_close(*losses, rtol=2e-6, atol=5e-6)
        rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(mine, plain, rtol=rounding, atol=2e-5)
        assert not mine[:, vocab:].any() and not mine[2].any() and mine[0].any()
for wrong in (40, -2):
    assert loss_triton(torch.randn(1, 48), torch.tensor([wrong]), 40).isnan()
print("equal")
"""


def test_the_triton_kernel_in_the_interpreter():
    interpreted(TRITON)


PTX = """
from nanochat.kernels.cross_entropy import BLOCK, _loss_kernel
types = dict(logits="*bf16", targets="*i64", losses="*fp32", row_sums="*fp32", width="i32", vocab="i32", cap="fp32", scale="fp32")
constants = {"GRADIENT": True, "SUMS": False, "BLOCK": BLOCK}
source = ASTSource(_loss_kernel, types | dict.fromkeys(constants, "constexpr"), constants,
                   {(place,): [["tt.divisibility", 16]] for place in (0, 1, 2, 3, 4, 5)})
print(compile(source, target, {"num_warps": 8}).asm["ptx"])
"""


def check_both_ends(device, rows, width, vocab):
    """The pass over many logits, in bf16: its first and last rows are those of the reference implementation."""
    logits = torch.empty(rows, width, dtype=torch.bfloat16, device=device).normal_(std=3)
    targets = torch.randint(-1, vocab, (rows,), device=device)
    ends = torch.tensor([0, 1, rows - 2, rows - 1], device=device)
    expected = logits[ends]
    expected_losses = loss_reference(expected, targets[ends], vocab)
    losses = loss_and_gradient(logits, targets, vocab)
    torch.testing.assert_close(losses[ends], expected_losses, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits[ends], expected, rtol=2**-7, atol=2e-6)


def test_the_first_and_the_last_logits(device):
    check_both_ends(device, 67, 144, 130)


def test_more_logits_than_32_bits_count(large_device):
    check_both_ends(large_device, 2**31 // 32768 + 16, 32768, 32700)


@pytest.mark.parametrize("capability", [89, 90])
def test_the_triton_kernel_compiles_for_gpus(capability):
    """It reads and writes 16 bytes at a time."""
    ptx = compiled_for(capability, PTX)
    assert ptx.count("ld.global.v4.b32") == 2 and ptx.count("st.global.v4.b32") == 1


# --- memory ---------------------------------------------------------------------------------------------------------

MEMORY = """
import torch
from nanochat.runtime.device import peak_resident
from nanochat.gpt import Linear
from nanochat.kernels.cross_entropy import ChunkedCrossEntropy, softcapped_cross_entropy
peak = lambda: peak_resident() // 2**20
head, x, targets = Linear(16, 8192), torch.randn(1, 4096, 16, requires_grad=True), torch.zeros(1, 4096, dtype=torch.int64)
chunked = ChunkedCrossEntropy(128, Linear)
chunked(x[:, :128], head, targets[:, :128], 8192).backward()
peaks = [peak()]
for loss_of in (chunked, softcapped_cross_entropy):
    loss_of(x, head, targets, 8192).backward()
    peaks.append(peak())
    with torch.no_grad():
        loss_of(x, head, targets, 8192, "none")
    peaks.append(peak())
print(*(after - peaks[0] for after in peaks[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is given in other units, or not at all")
def test_the_logits_are_never_there_as_a_whole():
    """In fp32 they take 128 MiB, of a chunk of 128 tokens 4. Peaks in MiB over those of one chunk."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, capture_output=True, text=True)
    chunked, evaluated, plain, _ = map(int, done.stdout.split())
    assert chunked < 16 and evaluated < 64 and plain > 256, (done.stdout, done.stderr)


def test_default_chunks():
    """Large enough for the products, and else as large as their logits may be."""
    assert default_chunk(4096, torch.bfloat16, "cpu") == 1024 and default_chunk(32768, torch.bfloat16, "cpu") == 512
    for vocab in (4096, 32768, 50304):
        chunk = default_chunk(vocab, torch.bfloat16, "cuda")
        assert chunk % 16 == 0 and CHUNK_BYTES["cuda"] - 32 * vocab < chunk * vocab * 2 <= CHUNK_BYTES["cuda"]


# --- compiled -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_compiled_it_is_one_graph_and_the_same(backend, dtype):
    """In fp16 the pass over the logits is plain PyTorch on CPUs, compiled by itself."""
    if backend == "inductor":
        pytest.importorskip("torch._inductor")
    torch._dynamo.reset()
    chunked, case = ChunkedCrossEntropy(48, Linear), problem(dtype=dtype)
    compiled = torch.compile(chunked, fullgraph=True, dynamic=False, backend=backend)
    for a, b in zip(outcome(compiled, *case), outcome(chunked, *case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if dtype != torch.float16 else 2e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False])
def test_in_a_compiled_model(whole):
    """Full steps and suffix steps, again and again, on the graphs of the warm-up, with the plain model's gradients."""
    torch._dynamo.reset()
    plain, model = (tiny_model(replace(TINY, n_layer=2)) for _ in range(2))
    model.kernels.loss = ChunkedCrossEntropy(48, Linear)
    compiled = CompiledModel(model, whole=whole, backend="aot_eager")
    graphs = None
    for start in (0, 1, 0, 1):
        compiled.warm_up(*batch(seed=9), active_start=start)
        graphs = graphs or (graphs_compiled() if start else None)
        model.zero_grad(), plain.zero_grad()
        losses = compiled(*batch(), active_start=start), plain(*batch(), active_start=start)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        for loss in losses:
            loss.backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or error(p.grad, q.grad.double()) < 1e-5 or q.grad.norm() < 1e-6, name
    assert graphs_compiled() == graphs and compiled.eager_fallbacks == 0


# --- over an FP8 head -----------------------------------------------------------------------------------------------

E5M2_MAX = 57344.0


def fp8_head(head, **config):
    """`head` in FP8, for where it is; the padding's weights are small, as one scale serves the whole tensor."""
    with torch.no_grad():
        head.weight.clamp_(-3.0, 3.0)
    emulate = fp8_unavailable_reason(head.weight.device) is not None
    return Float8Linear.from_float(head, Float8LinearConfig(emulate=emulate, **config))


def cast_gradient(logits, targets, vocab):
    """Losses, and the gradient of the logits as it was cast, in float64, with what its transpose holds."""
    rows, width = logits.shape
    q, q_t = (torch.empty(size, dtype=torch.float8_e5m2, device=logits.device) for size in ((rows, width), (width, rows)))
    inverse = torch.empty((), device=logits.device)
    losses = cast_loss_gradient(logits, targets, vocab, q, q_t, inverse)
    assert inverse.item() == pytest.approx(1 / E5M2_MAX, rel=1e-7)
    return losses, q.double() * inverse, q_t.double() * inverse


def rounding_of_gradient(gradient):
    """By how much a gradient that is cast may be off: half a step of two bits of mantissa, half the smallest number of the format
    where it is smaller than that, and what fp32 leaves of a probability."""
    return 2.0**-3 * gradient.abs() + 2.0**-17 / E5M2_MAX + 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("vocab, width", [(16, 16), (101, 128), (1000, 1008)])
@pytest.mark.parametrize("size", [0.1, 3.0, 1e4])
def test_the_gradient_of_logits_is_rounded_once_to_fp8(device, dtype, vocab, width, size):
    torch.manual_seed(vocab)
    logits = (torch.randn(48, width) * size).to(device, dtype)
    logits[:, vocab:] = math.nan
    targets = torch.randint(-1, vocab, (48,), device=device)
    targets[5] = -1
    expected, gradient = exact_pass(logits, targets, vocab)
    losses, cast, cast_t = cast_gradient(logits.clone(), targets, vocab)
    torch.testing.assert_close(losses, expected.float(), rtol=1e-6, atol=1e-5)
    assert ((cast - gradient).abs() <= rounding_of_gradient(gradient)).all()
    assert torch.equal(cast_t, cast.t()) and not cast[:, vocab:].any() and not cast[targets < 0].any()
    assert (cast != 0).sum() > 0.1 * vocab * (targets >= 0).sum() or size > 100, "not flushed to zero"


@pytest.mark.parametrize("probability", [1.0, 2.0**-15, 2.0**-28])
def test_large_and_small_gradients_of_logits_fit_into_fp8(device, probability):
    """From -1, of a target without any probability, to far below a uniform guess over any vocabulary."""
    logits, targets = torch.zeros(16, 32, device=device), torch.full((16,), 5, device=device)
    logits[:, 0] = 200.0  # capped: 15, so this token has all of the probability but that of the next one
    logits[:, 1] = 15 * math.atanh(1 + math.log(probability) / 15) if probability < 1 else 200.0
    _, cast, _ = cast_gradient(logits.clone(), targets, 32)
    gradient = exact_pass(logits, targets, 32)[1]
    assert gradient.min() < -0.999
    assert ((cast - gradient).abs() <= (2.0**-3 + 1e-5) * gradient.abs() + 2.0**-17 / E5M2_MAX).all()
    assert (cast[:, 1] > 0.5 * probability).all() or probability == 1, "1 is the gradient of a logit at its cap: none"


def test_a_bad_logit_shows_in_fp8_too(device):
    logits, targets = torch.randn(16, 32, device=device), torch.arange(16, device=device)
    logits[3, 20] = math.nan
    losses, cast, _ = cast_gradient(logits, targets, 32)
    assert losses[3].isnan() and cast[3].isnan().any()
    assert losses.isnan().sum() == 1 and cast.isnan().any(1).sum() == 1


@pytest.mark.parametrize("chunk", [16, 80, 192, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", [{}, {"cache_weights": True, "weight_grad_bf16": True}], ids=["casting", "cached"])
def test_an_fp8_head_in_chunks(device, chunk, dtype, config):
    """Any chunk. Loss: of the logits that the head itself computes. Gradients: off from those of these logits by what the casts
    of dz, W and x may round away, and by the sums. A dz of e5m2 is off by up to 2^-3, a weight or input of e4m3 by 2^-4; or by
    half of the smallest number of the format."""
    x, head, targets, vocab = problem(192, 32, 101, 128, dtype, size=0.3, device=device)
    head = fp8_head(head, **config)
    if head.config.cache_weights:
        refresh_weights([head])
    loss, dx, dw = outcome(ChunkedCrossEntropy(chunk, Linear), x, head, targets, vocab, "sum")
    with torch.no_grad():  # a chunk has a scale of its own
        logits = torch.cat([head(part) for part in x.view(192, 32).split(chunk)])
    losses, dz = exact_pass(logits, targets.flatten(), vocab)
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    rows, weight = x.detach().view(192, 32).double(), head.weight.detach().double()
    d_dz = rounding_of_gradient(dz) * (dz != 0)
    d_rows, d_weight = (2.0**-4 * t.abs() + 2.0**-10 * t.abs().max() / 448 for t in (rows, weight))
    for mine, a, b, d_a, d_b, eps in ((dx.view(192, 32), dz, weight, d_dz, d_weight, torch.finfo(dtype).eps),
                                      (dw, dz.t(), rows, d_dz.t(), d_rows, 2.0**-8 if "cache_weights" in config else 1e-5)):
        off = d_a @ b.abs() + (a.abs() + d_a) @ d_b
        sums = (2.0**-7 if device.type == "cuda" else 1e-5) * ((a.abs() + d_a) @ (b.abs() + d_b))  # FP8 units add up 13 bits
        bound = off + sums
        assert ((mine.double() - a @ b).abs() <= bound + 2 * eps * ((a @ b).abs() + bound)).all()
        assert error(mine, a @ b) > 0.01, "this is FP8: e5m2 has two bits of mantissa"
    assert not dw[vocab:].any() and not dx.view(192, 32)[targets.flatten() < 0].any()
    assert error(dx, exact(x, head, targets, vocab, "sum")[1]) < 0.1  # not by chance of the logits


def test_an_fp8_head_multiplies_in_fp8(monkeypatch):
    """Three FP8 products for each of three chunks, and the gradient in e5m2 on the left of two of them."""
    products = []

    def noting(a, b, *options, **named):
        products.append((tuple(a.shape), a.dtype, tuple(b.shape), b.dtype))
        return scaled_mm(a, b, *options, **named)
    monkeypatch.setattr(fp8, "scaled_mm", noting)
    x, head, targets, vocab = problem(192, 32, 101, 128, torch.bfloat16, size=0.3)
    outcome(ChunkedCrossEntropy(64, Linear), x, fp8_head(head), targets, vocab)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert products == 3 * [((64, 32), e4m3, (32, 128), e4m3), ((64, 128), e5m2, (128, 32), e4m3),
                            ((128, 64), e5m2, (64, 32), e4m3)]


def test_an_fp8_head_without_anything_to_predict(device):
    x, head, targets, vocab = problem(192, 32, 101, 128, torch.bfloat16, ignored=1.1, device=device)
    case = x, fp8_head(head), targets, vocab
    loss, dx, dw = outcome(ChunkedCrossEntropy(64, Linear), *case)
    assert math.isnan(loss) and not dx.any() and not dw.any()
    assert outcome(ChunkedCrossEntropy(64, Linear), *case, "sum")[0] == 0


@pytest.mark.parametrize("tokens, chunk", [(100, 48), (96, 40)])
def test_an_fp8_head_takes_tokens_in_sixteens(tokens, chunk):
    x, head, targets, vocab = problem(tokens, 32, 101, 128)
    with pytest.raises(ValueError, match="multiples of 16"):
        ChunkedCrossEntropy(chunk, Linear)(x, fp8_head(head), targets, vocab)


def test_an_fp8_head_lets_no_overflow_pass(device):
    for bad in (math.inf, math.nan):
        x, head, targets, vocab = problem(64, 32, 101, 128, torch.bfloat16, size=0.3, device=device)
        with torch.no_grad():
            x[1, 2, 3] = bad
        loss, dx, dw = outcome(ChunkedCrossEntropy(32, Linear), x, fp8_head(head), targets, vocab)
        assert not loss.isfinite() and not dx.isfinite().all() and not dw.isfinite().all()


def fp8_head_model(dtype=torch.float32):
    """A tiny model with an FP8 head and the loss in chunks."""
    model = tiny_model(replace(TINY, n_layer=2), dtype=dtype)
    model.lm_head = fp8_head(model.lm_head, cache_weights=True)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    refresh_weights([model.lm_head])
    model.kernels.loss = ChunkedCrossEntropy(16, Linear)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "parts"])
def test_in_a_compiled_model_an_fp8_head_breaks_no_graph(whole):
    """Compiled whole it is one graph; and full steps and suffix steps have the gradients of the model in eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, model = fp8_head_model(), fp8_head_model()
    compiled = CompiledModel(model, whole=whole, backend="aot_eager")
    for start in (0, 1, 0):
        compiled.warm_up(*batch(seed=9), active_start=start)
        assert not torch._dynamo.utils.counters["graph_break"] and compiled.eager_fallbacks == 0
        assert not whole or graphs_compiled() == len(compiled.compiled_variants)
        model.zero_grad(), plain.zero_grad()
        losses = compiled(*batch(), active_start=start), plain(*batch(), active_start=start)
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        for loss in losses:
            loss.backward()
        assert model.lm_head.weight.grad.any()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or error(p.grad, q.grad.double()) < 1e-5 or q.grad.norm() < 1e-6, name


# --- the feature ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, advice", [
    (["--ce-chunk-tokens=64"], "--chunked-ce"), (["--chunked-ce", "--ce-chunk-tokens=100"], "--ce-chunk-tokens.* 96"),
    (["--chunked-ce", "--ce-chunk-tokens=-16"], "--ce-chunk-tokens"),
])
def test_invalid_flags_are_refused(flags, advice):
    with pytest.raises(UserError, match=advice):
        parse_config(FEATURES, flags)
