"""Head and loss in one kernel: against float64 on any sizes, inside the chunked loss and a run, and the choice of it."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_losses import exact, outcome, problem

from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.kernels.cpp_kernels import cpp_unavailable_reason
from nanochat.kernels.cross_entropy import ChunkedCrossEntropy, chunked_gradients
from nanochat.kernels.head_loss import LARGER, choose_head_loss, head_loss_gradients, use_head_loss
from nanochat.kernels.linear import CastOnceLinear, Linear, refresh
from nanochat.runtime.tuner import Tuner
from nanochat.training.build import build_trainer_only, choose_kernels
from nanochat.training.config import parse_config

reason = cpp_unavailable_reason("head_loss")
needs_kernel = pytest.mark.skipif(reason is not None, reason=str(reason))
EPS, BF16 = 2.0**-24, 2.0**-8  # largest relative errors of rounding to fp32 and to bf16
SOFTCAP = 15


def draw(tokens, features, vocab, padding=0, size=1.0, ignored=0.2, seed=0):
    """x, weight and targets. What stands in the padding is no number: nothing may read it."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=random).bfloat16()
    weight = (torch.randn(vocab + padding, features, generator=random) * size / features**0.5).bfloat16()
    weight[vocab:] = math.nan
    targets = torch.randint(vocab, (tokens,), generator=random)
    targets[torch.rand(tokens, generator=random) < ignored] = -1
    return x, weight, targets, vocab


def check(case, chunk):
    """Against float64, of each number with its own bound.

    A logit z is a sum of C exact products, so it is off by C EPS |x| |w|, and exp(s) by that share of itself; exp itself adds
    2e-6 (FP32_ERROR of test_losses), and their sum, over 64 terms and then V / 64, EPS for each. A probability is a ratio of two
    such numbers. The gradient of a logit is rounded to bf16, unless it is the target's; for dW x / sum is, too; dx is. Both are
    sums in fp32.
    """
    x, weight, targets, vocab = case
    total, dx, dw = head_loss_gradients(x, weight, targets, vocab, chunk)
    assert [t.dtype for t in (total, dx, dw)] == [torch.float32, torch.bfloat16, torch.float32]
    X, W, wanted = x.double(), weight[:vocab].double(), targets >= 0
    tanh = (X @ W.t() / SOFTCAP).tanh()
    p = (SOFTCAP * tanh).softmax(1)
    hit = torch.zeros_like(p)
    hit[wanted, targets[wanted]] = 1
    slope, p, hit = 1 - tanh**2, p * wanted[:, None], hit * wanted[:, None]
    losses = -((SOFTCAP * tanh).log_softmax(1) * hit).sum(1)
    off = 2 * (EPS * len(W[0]) * (X.abs() @ W.abs().t()).amax(1, keepdim=True) + 2e-6 + EPS * (64 + vocab / 64))
    dz, both = (p - hit) * slope, p + hit
    low = p * slope * (1 - hit)  # what is rounded to bf16
    dx_off = (off * both + BF16 * low + EPS * (vocab + 4) * both) @ W.abs()
    dw_off = (off * both + 2 * BF16 * low + EPS * (len(x) + 4) * both).t() @ X.abs()
    assert (total.double() - losses.sum()).abs() <= 1.01 * (off[wanted].sum() + EPS * (len(x) + 20) * losses.sum())
    assert ((dx.double() - dz @ W).abs() <= 1.01 * (dx_off + BF16 * (dz @ W).abs())).all()
    assert ((dw[:vocab].double() - dz.t() @ X).abs() <= 1.01 * dw_off).all() and not dw[vocab:].any()
    return total, dx, dw


@needs_kernel
@settings(max_examples=40, derandomize=True, database=None)
@given(tokens=st.integers(1, 300), features=st.integers(1, 6).map(lambda n: 32 * n), vocab=st.integers(1, 700),
       padding=st.integers(0, 70), chunk=st.integers(1, 20).map(lambda n: 16 * n), size=st.sampled_from([0.01, 1.0, 20.0]),
       ignored=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 9))
def test_equals_the_definition(tokens, features, vocab, padding, chunk, size, ignored, seed):
    check(draw(tokens, features, vocab, padding, size, ignored, seed), chunk)


@needs_kernel
@pytest.mark.parametrize("features", [768, 1600])
def test_equals_the_definition_at_the_sizes_of_larger_models(features):
    check(draw(530, features, 1100, 84), 512)


@needs_kernel
@pytest.mark.parametrize("dx_or_dw", [1, 2], ids=["dx", "dw"])
def test_is_no_less_exact_than_products_by_pytorch(dx_or_dw):
    case = draw(600, 256, 2000, 48, ignored=0)
    case[1][2000:] = 0
    x, weight = (t.double().requires_grad_() for t in case[:2])
    logits = SOFTCAP * (x @ weight[:2000].t() / SOFTCAP).tanh()
    loss = torch.nn.functional.cross_entropy(logits, case[2], reduction="sum")
    right = (loss.detach(), *torch.autograd.grad(loss, (x, weight)))
    mine, plain = head_loss_gradients(*case, 256), chunked_gradients(*case, 256, False, False)
    assert (mine[dx_or_dw] - right[dx_or_dw]).norm() < (plain[dx_or_dw] - right[dx_or_dw]).norm()
    assert (mine[0] - right[0]).abs() < (plain[0] - right[0]).abs() + 1e-6 * right[0]


@needs_kernel
def test_no_tokens_and_no_targets():
    x, weight, targets, vocab = draw(70, 64, 100, 28)
    total, dx, dw = head_loss_gradients(x[:0], weight, targets[:0], vocab, 512)
    assert total == 0 and dx.shape == (0, 64) and dw.shape == weight.shape and not dw.any()
    x[3] = math.nan  # of a token that does not count
    assert not any(t.any() for t in head_loss_gradients(x, weight, torch.full_like(targets, -1), vocab, 64))


@needs_kernel
@pytest.mark.parametrize("target", [100, -2, 2**40])
def test_a_target_that_is_no_token_is_refused(target):
    x, weight, targets, vocab = draw(70, 64, 100, 28)
    targets[65] = target
    with pytest.raises(IndexError, match="1 targets are neither in the vocabulary of 100 nor -1"):
        head_loss_gradients(x, weight, targets, vocab, 64)


@needs_kernel
def test_what_is_not_a_number_shows():
    """It spoils its own token, and the gradient of the weight; an infinite logit is as capped as any."""
    x, weight, targets, vocab = draw(70, 64, 100, ignored=0)
    right = head_loss_gradients(x, weight, targets, vocab, 512)[1]
    bad = x.clone()
    bad[5, 7] = math.nan
    total, dx, dw = head_loss_gradients(bad, weight, targets, vocab, 512)
    assert total.isnan() and dw.isnan().all() and dx[5].isnan().all()
    assert torch.equal(dx[:5], right[:5]) and torch.equal(dx[6:], right[6:])
    weight[3] = 1e30
    assert head_loss_gradients(x, weight, targets, vocab, 512)[0].isfinite()


@needs_kernel
def test_the_same_bits_on_any_number_of_threads_and_any_stride():
    """Tasks become smaller with more threads; the order in which a number is summed does not change."""
    x, weight, targets, vocab = draw(1100, 128, 700, 4)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8, 40):
            torch.set_num_threads(n)
            results.append(head_loss_gradients(x, weight, targets, vocab, 1024))
    finally:
        torch.set_num_threads(threads)
    results.append(head_loss_gradients(x.t().contiguous().t(), weight.t().contiguous().t(), targets[:, None].expand(-1, 2)[:, 0],
                                       vocab, 1024))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_kernel
@pytest.mark.parametrize("reduction, compiled", [("mean", False), ("sum", True)])
def test_inside_the_chunked_loss(reduction, compiled):
    """With a head that casts its weight once too. Compiled it is one graph, and the same bits."""
    torch._dynamo.reset()
    case = (*problem(400, 64, 500, 512, torch.bfloat16, size=0.2), reduction)
    loss = ChunkedCrossEntropy(64, plain=Linear)
    use_head_loss(loss, "brgemm 96")
    assert loss.chunk_tokens == 96
    eager = outcome(loss, *case)
    for mine, right, bound in zip(eager, exact(*case), (2e-6, BF16, BF16), strict=True):
        assert (mine.double() - right).norm() < bound * right.norm()
    cast = CastOnceLinear.from_linear(case[1], torch.bfloat16)
    refresh([cast])
    function = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else loss
    assert all(map(torch.equal, eager, outcome(function, case[0], cast, *case[2:])))


# --- the choice -----------------------------------------------------------------------------------------------------

def choose(head=None, tokens=64, dtype=torch.bfloat16, **more):
    return choose_head_loss(head or Linear(64, 128), tokens, dtype, 100, **more)


@needs_kernel
def test_all_ways_are_timed_once_and_remembered(tmp_path):
    tuner, head = Tuner("cpu", tmp_path), Linear(64, 4096)
    first = choose(head, 2048, tuner=tuner)
    assert set(first.milliseconds) == {"torch", "brgemm", f"torch {1024 * LARGER}", f"brgemm {1024 * LARGER}"}
    assert choose(head, 2048, tuner=tuner) == first._replace(reason="measured before")
    assert set(choose(head, 2048, tuner=tuner, chunk_tokens=256).milliseconds) == {"torch", "brgemm"}
    head.own_weight_gradient = True
    assert choose(head, 1024, tuner=tuner).reason != "measured before" and head.weight.grad is None


@needs_kernel
def test_the_user_or_a_resume_decide():
    assert choose(wanted="torch", recorded="brgemm 4096")[:2] == ("torch", "--head-loss")
    assert choose(wanted="brgemm", recorded="torch")[:2] == ("brgemm", "--head-loss")
    assert choose(recorded="brgemm 4096")[:2] == ("brgemm 4096", "as before the resume")
    assert choose(recorded="brgemm 4096", chunk_tokens=64)[:2] == ("brgemm", "as before the resume")


@pytest.mark.parametrize("more, why", [(dict(dtype=torch.float32), "for bfloat16 on a CPU"), (dict(plain=False), "itself"),
                                       (dict(head=Linear(48, 128)), "")])
def test_where_the_kernel_does_not_fit_torch_serves(more, why):
    assert choose(**more, recorded="brgemm 4096")[:2] == ("torch", "the only one that works")
    assert choose(**more, recorded="torch 4096")[:2] == ("torch 4096", "as before the resume")
    with pytest.raises(UserError, match=f"--head-loss brgemm cannot be used here: .*{why}"):
        choose(**more, wanted="brgemm")


@needs_kernel
def test_a_run_goes_on_with_the_choice_of_its_checkpoint(base, capsys):
    """And one from before there was a choice with torch's products. Without --chunked-ce there is none."""
    flags = ["--depth=2", "--aspect-ratio=16", "--head-dim=16", "--max-seq-len=32", "--device-batch-size=2", "--dtype=bfloat16",
             "--total-batch-size=64", "--num-iterations=1", "--vocab-size=300", f"--data={base / 'text'}", "--no-compile",
             "--device-type=cpu"]
    assert "head loss" not in build_trainer_only(parse_config(FEATURES, flags)).plan.kernel_choices
    for before, name, chunk, function in (({}, "brgemm", 48, head_loss_gradients),
                                          ({"head loss": "torch"}, "torch", 48, chunked_gradients)):
        wanted = [] if before else ["--head-loss=brgemm"]
        trainer = build_trainer_only(parse_config(FEATURES, [*flags, "--chunked-ce", "--ce-chunk-tokens=48", *wanted]))
        loss = trainer.state.model.kernels.loss = ChunkedCrossEntropy(48, plain=Linear)
        choices = choose_kernels(trainer.plan, trainer.state.model, Tuner("cpu", folder=None), before)
        assert choices["head loss"]["name"] == name and loss.gradients is function and loss.chunk_tokens == chunk
    assert "cross-entropy: 48 tokens at a time, kernel: brgemm\n" in capsys.readouterr().out
