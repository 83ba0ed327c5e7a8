"""The transfer laws and the schedules: reference points by hand, invariants by property."""

import math

import pytest
from hypothesis import given, strategies as st

from nanochat.recipe.horizon import REFERENCE_BATCH, plan_horizon
from nanochat.recipe.schedules import lr_scale, muon_momentum, weight_decay_scale
from nanochat.recipe.shape import flops_per_token, scaling_params, shape_of_depth

depths = st.sampled_from([2, 4, 6, 8, 12, 16, 20, 26])


def plan(depth=12, device_batch_size=1, **kw):
    return plan_horizon(shape_of_depth(depth), device_batch_size=device_batch_size, **kw)


def test_the_reference_point_is_itself():
    horizon = plan(12, device_batch_size=32)
    assert horizon.total_batch_size == REFERENCE_BATCH and horizon.grad_accum_steps == 8
    assert horizon.lr_factor == horizon.scalar_lr_factor == 1 and horizon.weight_decay == pytest.approx(0.28)
    assert horizon.num_iterations == 12 * scaling_params(shape_of_depth(12)) // REFERENCE_BATCH


@given(depth=depths, ratio=st.floats(4, 40), multiplier=st.sampled_from([0.7, 1.0, 1.4]))
def test_tau_is_kept(depth, ratio, multiplier):
    """tau = B / (eta lambda D) is the reference's for every depth, ratio and batch multiplier (arXiv 2405.13698)."""
    horizon = plan(depth, target_param_data_ratio=ratio, batch_multiplier=multiplier)
    reference_tokens = 12 * scaling_params(shape_of_depth(12))
    tau = horizon.total_batch_size / (horizon.lr_factor * horizon.weight_decay * horizon.target_tokens)
    assert tau == pytest.approx(REFERENCE_BATCH / (0.28 * reference_tokens), rel=1e-4)
    shorter = max(1, reference_tokens / horizon.target_tokens)
    assert horizon.lr_factor == pytest.approx(math.sqrt(horizon.total_batch_size / REFERENCE_BATCH) * shorter**0.4, rel=1e-4)


@given(depth=depths, steps=st.integers(200, 4000), batch=st.sampled_from([2**11, 2**13, 2**16]))
def test_a_shorter_run_has_higher_rates_and_keeps_tau(depth, steps, batch):
    """Also where --num-iterations decides about the length; and a run of the reference's length has those of the batch alone."""
    reference_tokens = 12 * scaling_params(shape_of_depth(12))
    tau, factors = REFERENCE_BATCH / (0.28 * reference_tokens), []
    for length in (steps, 2 * steps):
        horizon = plan(depth, num_iterations=length, total_batch_size=batch)
        factors.append(horizon.lr_factor / math.sqrt(batch / REFERENCE_BATCH))
        assert horizon.scalar_lr_factor == pytest.approx(math.sqrt(batch / REFERENCE_BATCH))
        assert batch / (horizon.lr_factor * horizon.weight_decay * horizon.total_tokens) == pytest.approx(tau)
    assert factors[0] / factors[1] == pytest.approx(2**0.4)
    whole = plan(depth, num_iterations=-(-int(reference_tokens) // batch), total_batch_size=batch)
    assert whole.lr_factor == pytest.approx(math.sqrt(batch / REFERENCE_BATCH), rel=1e-3)


def test_a_run_of_a_few_steps_takes_the_rates_of_the_shortest_that_was_measured():
    first, second = (plan(4, num_iterations=n, total_batch_size=2**11) for n in (1, 100))
    assert first.lr_factor == second.lr_factor and first.weight_decay == second.weight_decay


@given(depth=depths, rows=st.integers(1, 48), ranks=st.sampled_from([1, 2, 8]))
def test_a_predicted_batch_always_divides(depth, rows, ranks):
    horizon = plan(depth, device_batch_size=rows, world_size=ranks)
    micro = rows * 2048 * ranks
    assert horizon.total_batch_size % micro == 0 and horizon.grad_accum_steps == horizon.total_batch_size // micro >= 1


def test_batch_grows_with_depth():
    batches = [plan(d).total_batch_size for d in (4, 8, 12, 20, 26)]
    assert batches == sorted(batches) and batches[0] < batches[-1]


def test_horizons_in_order_of_precedence():
    per_step = plan(4, total_batch_size=2**16)
    assert plan(4, num_iterations=7, target_flops=1e18, total_batch_size=2**16).num_iterations == 7
    flops = 123 * flops_per_token(shape_of_depth(4)) * 2**16
    assert plan(4, target_flops=flops, total_batch_size=2**16).num_iterations == 123
    assert per_step.num_iterations == per_step.target_tokens // 2**16
    assert plan(4, target_param_data_ratio=-1, num_iterations=5).num_iterations == 5


@given(total=st.integers(1, 10**6), rows=st.integers(1, 40))
def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(total, rows):
    micro = rows * 2048
    if total % micro == 0:
        assert plan(total_batch_size=total, device_batch_size=rows).total_batch_size == total
        return
    with pytest.raises(ValueError) as refusal:
        plan(total_batch_size=total, device_batch_size=rows)
    advice = str(refusal.value).split("use ")[1].split(", or change")[0].split(" or ")
    assert all(int(a.replace(",", "")) % micro == 0 and abs(int(a.replace(",", "")) - total) < micro for a in advice)


def test_lr_schedule_at_its_corners():
    at = lambda step, **kw: lr_scale(step, 1000, **kw)
    assert at(0) == 1 / 40 and at(39) == 1 and at(350) == 1
    assert at(1000) == pytest.approx(0.05) and at(675) == pytest.approx(0.05 + 0.95 / 2)
    assert at(675, warmdown_shape="cosine") == pytest.approx(0.05 + 0.95 / 2)
    assert at(500, warmdown_shape="cosine") > at(500)     # a cosine stays high for longer, then falls faster
    assert at(850, warmdown_shape="cosine") < at(850)
    assert at(999, warmdown_ratio=0.0, warmup_steps=0) == 1


@given(n=st.integers(1, 5000), ratio=st.floats(0, 1), shape=st.sampled_from(["linear", "cosine"]), data=st.data())
def test_schedules_stay_in_bounds_and_only_fall_after_warmup(n, ratio, shape, data):
    step = data.draw(st.integers(0, n))
    kw = dict(warmup_steps=min(40, n // 2), warmdown_ratio=ratio, warmdown_shape=shape)
    now, later = lr_scale(step, n, **kw), lr_scale(min(step + 1, n), n, **kw)
    assert 0 < now <= 1
    assert step < kw["warmup_steps"] or later <= now
    assert 0.85 <= muon_momentum(step, n, warmdown_ratio=ratio) <= 0.97
    assert weight_decay_scale(n, n) == pytest.approx(0, abs=1e-12) and weight_decay_scale(0, n) == 1


def test_muon_momentum():
    assert muon_momentum(0, 3000) == 0.85 and muon_momentum(400, 3000) == 0.97
    assert muon_momentum(200, 3000) == pytest.approx(0.91) and muon_momentum(3000, 3000) == pytest.approx(0.90)
