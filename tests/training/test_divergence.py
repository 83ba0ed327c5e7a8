"""What a run does after a step that is not finite, decided on results alone."""

import math

import pytest
import torch

from nanochat.common import Diverged
from nanochat.runtime.clock import StepTime
from nanochat.training.divergence import MAX_ROLLBACKS, MAX_SKIPS, DivergencePolicy, divergence, divergence_advice
from nanochat.training.run_stats import RunStats
from nanochat.training.step import StepResult


def result(step=7, loss=2.0, not_finite=()):
    return StepResult(step=step, lr_scale=1.0, loss=loss, grad_norm=1.0, not_finite=list(not_finite), trained=5,
                      stop_signal=0, time_is_up=False, batch_crc32=0, time=StepTime(1.0), compiled=False, peak_memory_mib=1.0,
                      columns={})


@pytest.mark.parametrize("loss, not_finite, fp16, is_trouble", [
    (2.0, [], False, False), (math.nan, [], False, True), (math.inf, [], True, True), (2.0, ["lm_head.weight"], False, True),
    (2.0, ["lm_head.weight"], True, False),  # the scaler has left the update out
])
def test_trouble_is_whatever_is_not_finite(loss, not_finite, fp16, is_trouble):
    trouble = divergence(result(loss=loss, not_finite=not_finite), overflow_is_normal=fp16)
    assert (trouble is not None) == is_trouble
    if trouble:
        assert "step 7" in trouble and all(name in trouble for name in not_finite)


def test_stop_ends_the_run():
    with pytest.raises(Diverged, match="not finite"):
        DivergencePolicy("stop").decide(result(), "not finite", RunStats(), saved_step=4)


def test_skips_are_counted_and_too_many_in_a_row_end_the_run():
    policy, stats = DivergencePolicy("skip"), RunStats()
    steps = [0, 1, *range(5, 5 + MAX_SKIPS - 1)]
    assert [policy.decide(result(step), "x", stats, saved_step=0) for step in steps] == ["skip"] * len(steps)
    assert stats.skipped_steps == steps
    with pytest.raises(Diverged):
        policy.decide(result(5 + MAX_SKIPS - 1), "x", stats, saved_step=0)


def test_a_rollback_needs_a_checkpoint_and_is_tried_a_few_times():
    policy, stats = DivergencePolicy("rollback"), RunStats()
    with pytest.raises(Diverged, match="no checkpoint"):
        policy.decide(result(), "x", stats, saved_step=0)
    assert policy.decide(result(), "x", stats, saved_step=4) == "rollback"
    stats.rollbacks = [[7, 4]] * MAX_ROLLBACKS
    with pytest.raises(Diverged):
        policy.decide(result(), "x", stats, saved_step=4)


@pytest.mark.parametrize("device, kernels, environment, named", [
    ("cuda", ["varlen", "sdpa"], {}, True), ("cuda", ["cudnn"], {}, True), ("cuda", ["fa3", "flash"], {}, False),
    ("cuda", ["sdpa"], {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}, False), ("cpu", ["sdpa"], {}, False)])
def test_cudnns_attention_is_named_where_it_may_have_run(monkeypatch, device, kernels, environment, named):
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    advice = divergence_advice(torch.device(device), {f"window {i}": {"name": name} for i, name in enumerate(kernels)})
    assert ("TORCH_CUDNN_SDPA_DEPRIORITIZED=1" in advice) == named and "--lr-multiplier" in advice
