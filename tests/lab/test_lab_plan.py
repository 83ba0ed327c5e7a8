"""Profiles, templates and variants: what they expand to, and what is refused before anything runs."""

import json
import math

import pytest
from hypothesis import given, strategies as st

from nanochat.cli.flag_files import CONFIGS, profiles
from nanochat.common import UserError
from nanochat.lab.plan import (
    ALIASES,
    about_batch,
    horizon_of,
    interleaved,
    make_variants,
    matched,
    named_variants,
    pilot,
    read_profile,
    read_template,
    shorter,
    templates,
)
from nanochat.lab.rows import config_of
from nanochat.recipe.horizon import HORIZON_EXPONENT

SMOKE = read_profile("cpu-smoke")


@pytest.mark.parametrize("profile", profiles())
@pytest.mark.parametrize("template", templates())
def test_every_template_fits_every_profile(profile, template):
    read = read_template(template)
    base, found = make_variants(read_profile(profile), "", read.variants, read.match)
    flat = config_of(base.flags).flat()
    assert len({v.flags for v in found}) == len(found) and all(config_of(v.flags).flat() != flat for v in found)


def test_the_baseline_profile_is_the_plans():
    config = config_of(read_profile("plan-d12")).flat()
    assert [config[n] for n in ("depth", "head_dim", "window_pattern", "max_seq_len", "device_batch_size", "total_batch_size",
                                "eval_every", "eval_tokens", "num_iterations")] == [
        12, 128, "L", 512, 16, 16384, 100, 524288, 1500]


def test_template_b():
    read = read_template("B")
    _, found = make_variants(SMOKE, "", read.variants, read.match)
    pairs = {(c.warmdown_ratio, c.warmdown_shape) for c in (config_of(v.flags).optim for v in found)}
    assert pairs == {(r, s) for r in (0.2, 0.3, 0.4, 0.5) for s in ("linear", "cosine")} and len(found) == 8


def test_template_d_is_relative_to_the_profiles_rates_and_leaves_out_the_baseline():
    base, found = make_variants(SMOKE, "", read_template("D").variants, "steps")
    nominal = config_of(base.flags).optim
    factors = {(round(o.lr_multiplier / nominal.lr_multiplier, 6), round(o.wd_multiplier / nominal.wd_multiplier, 6))
               for o in (config_of(v.flags).optim for v in found)}
    assert factors == {(lr, wd) for lr in (0.9, 1.0, 1.1) for wd in (0.7, 1.0, 1.4)} - {(1.0, 1.0)} and len(found) == 8


@given(factor=st.sampled_from(["0.5", "0.7", "1.4", "2"]))
def test_a_relative_batch_divides_and_carries_the_law_along(factor):
    """LR goes with the square root of the batch, and tau = B / (eta lambda D) is kept (arXiv 2405.13698)."""
    base, (other,) = make_variants(SMOKE, "", {"x": f"--total-batch-size=x{factor}"}, "flops")
    plans = [c.plan(c.model.shape(512)) for c in (config_of(base.flags), config_of(other.flags))]
    ratio = plans[1].total_batch_size / plans[0].total_batch_size
    assert ratio == pytest.approx(float(factor), rel=0.13)
    assert plans[1].lr_factor / plans[0].lr_factor == pytest.approx(math.sqrt(ratio))
    assert plans[1].weight_decay / plans[0].weight_decay == pytest.approx(math.sqrt(ratio))


def test_a_relative_data_ratio_changes_the_steps_too():
    base, (less,) = make_variants(SMOKE, "", {"less": "--target-param-data-ratio=x0.8"}, "free")
    assert config_of(less.flags).horizon.num_iterations == round(0.8 * config_of(base.flags).horizon.num_iterations)


def test_shorter_and_matched_runs():
    base, (other,) = make_variants(SMOKE, "", {"deep": "--depth=4"}, "free")
    assert config_of(shorter(base, 0.94, "x").flags).horizon.num_iterations == 94
    row = {"train_time_sec": 10.0, "steps_done": 100, "tokens_seen": 51200, "flops_per_token": 1000, "flags": base.flags}
    pilot = {"train_time_sec": 8.0, "steps_done": 40}
    assert config_of(matched(other, row, pilot, "time").flags).horizon.num_iterations == 50
    horizon = config_of(matched(other, row, None, "flops").flags).horizon
    assert horizon.target_flops == 51200 * 1000 and horizon.num_iterations == -1


@pytest.mark.parametrize("profile", ["cpu-d4", "plan-d12"])
def test_the_shapes_of_template_f_come_with_a_narrow_transfer_of_their_rates(profile):
    """At equal FLOPs, three learning rates for each shape, and the baseline's tau = B / (eta lambda D) for all of them."""
    read = read_template("F")
    base, found = make_variants(read_profile(profile), "", read.variants, read.match)
    plan = horizon_of(config_of(base.flags))
    row = {"tokens_seen": plan.total_tokens, "flops_per_token": plan.flops_per_token, "flags": base.flags}
    seen, rates = [], {}
    for variant in found:
        config = config_of(matched(variant, row, None, "flops").flags)
        own = horizon_of(config)
        assert own.total_flops == pytest.approx(plan.total_flops, rel=0.01)
        tau, own_tau = (p.total_batch_size / (p.lr_factor * p.weight_decay * p.total_tokens) for p in (plan, own))
        assert own_tau == pytest.approx(tau, rel=0.002)
        seen.append(own.total_tokens / plan.total_tokens)
        law = seen[-1]**-HORIZON_EXPONENT  # fewer tokens, higher rates
        rates.setdefault((config.model.depth, config.model.head_dim), []).append(round(own.lr_factor / plan.lr_factor / law, 6))
    assert list(rates.values()) == [[0.9, 1.0, 1.1]] * 3
    assert min(seen) < 0.9 and 0.6 < min(seen) and max(seen) < 1.05  # shapes of about the baseline's cost per token


def test_weight_decay_follows_the_horizon_in_template_e():
    base, found = make_variants(read_profile("cpu-d4"), "", read_template("E").variants, "free")
    plans = [horizon_of(config_of(variant.flags)) for variant in (base, *found)]
    assert len(found) in (10, 11) and {round(p.total_tokens / plans[0].total_tokens, 2) for p in plans} == {0.85, 1.0, 1.15}
    for plan in plans:
        tau, own_tau = (p.total_batch_size / (p.lr_factor * p.weight_decay * p.total_tokens) for p in (plans[0], plan))
        assert own_tau == pytest.approx(tau)


def test_named_variants_are_kept_also_where_they_are_the_same():
    found = named_variants(SMOKE, "--depth=3", {"a": "", "b": "", "c": "--lr-multiplier=x2"}, "free")
    assert [v.name for v in found] == ["a", "b", "c"] and found[0].flags == found[1].flags
    a, c = (config_of(v.flags) for v in found[1:])
    assert a.model.depth == c.model.depth == 3 and c.optim.lr_multiplier == 2 * a.optim.lr_multiplier
    assert make_variants(SMOKE, "", {"a": ""}, "free")[1] == []  # in a comparison it would be nothing


def test_a_pilot_warms_up_for_the_same_share_of_its_steps():
    text = "--block-update-schedule=dynamic_suffix --dyn-warmup-steps=30"
    suffix, plain = (pilot(v, 0.5) for v in named_variants(SMOKE, "", {"suffix": text, "plain": ""}, "free"))
    assert (suffix.name, plain.name) == ("pilot-suffix", "pilot-plain")
    assert config_of(suffix.flags).features["suffix"].dyn_warmup_steps == 15
    assert {config_of(v.flags).horizon.num_iterations for v in (suffix, plain)} == {50}


def test_what_a_relative_batch_multiplies_is_said():
    assert "x1 is the baseline's 512 tokens; the law predicts" in about_batch(SMOKE)
    law = [flag for flag in SMOKE if not flag.startswith("--total-batch-size")]
    assert "the law" not in about_batch(law)


def test_seeds_are_paired_and_drift_falls_on_both_alike():
    order = [v for i in range(4) for v in interleaved(["A", "B"], i)]
    assert order == list("ABBAABBA")


@pytest.mark.parametrize("flags, says", [
    ("--no-such-flag", "--no-such-flag"), ("--seed=3", "--seed"), ("--model-tag=x", "--model-tag"),
    ("--num-iterations=5", "--match free"), ("--depth=0", "--depth"), ("'open", "'open"),
    ("--total-batch-size=100", "--total-batch-size"), ("--warmdown-shape=x2", "--warmdown-shape")])
def test_wrong_candidates_are_refused_by_name(flags, says):
    with pytest.raises(UserError) as refusal:
        make_variants(SMOKE, "", {"mine": flags}, "steps")
    assert says in str(refusal.value) and "mine" in str(refusal.value)


@pytest.mark.parametrize("flags", ["--eval-tokens=128", "--eval-every=1", "--data=x.txt", "--val-data=x.txt", "--max-chars=5000",
                                   "--vocab-size=300", "--target-metric-threshold=9", "--text-column=body"])
def test_a_candidate_cannot_change_what_is_measured(flags):
    """128 tokens of validation made the same weights look 19 % better."""
    with pytest.raises(UserError, match=f"mine: {flags.split('=')[0]} changes what is measured"):
        make_variants(SMOKE, "", {"mine": flags}, "steps")
    base, (other,) = make_variants(SMOKE, flags, {"mine": "--warmdown-shape=cosine"}, "steps")
    assert flags in base.flags and flags in other.flags


@pytest.mark.parametrize("name", ["baseline", "baseline-x", "control", "again", "pilot-x", "x-resumed"])
def test_names_of_the_labs_own_runs_are_taken(name):
    with pytest.raises(UserError, match=name):
        make_variants(SMOKE, "", {name: "--warmdown-shape=cosine"}, "steps")


@pytest.mark.parametrize("content", ["{", "[]", '{"match": "seeds"}', '{"variant": {}}', '{"variants": {"a b": "--depth=2"}}',
                                     '{"cross": {"a": "--depth=2"}}', '{"cross": [{"": ""}]}',
                                     '{"cross": [{"a": "--depth=2"}], "variants": {"a": "--depth=3"}}'])
def test_a_wrong_template_is_refused(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match="template"):
        read_template(str(tmp_path / "mine.json"))


def test_a_template_of_ones_own(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"grid": {"--depth": [2, 4]}, "variants": {"wide": "--aspect-ratio=32"}}))
    read = read_template(str(tmp_path / "mine.json"))
    assert read.match == "steps" and set(read.variants.values()) == {"--depth=2", "--depth=4", "--aspect-ratio=32"}


def test_every_combination_of_what_is_crossed_is_a_variant(tmp_path):
    crossed = [{"deep": "--depth=4", "flat": "--depth=2"}, {"": "", "slow": "--lr-multiplier=x0.9"}]
    (tmp_path / "mine.json").write_text(json.dumps({"cross": crossed, "variants": {"wide": "--aspect-ratio=32"}}))
    assert read_template(str(tmp_path / "mine.json")).variants == {
        "deep": "--depth=4", "deep_slow": "--depth=4 --lr-multiplier=x0.9",
        "flat": "--depth=2", "flat_slow": "--depth=2 --lr-multiplier=x0.9", "wide": "--aspect-ratio=32"}


def test_variants_that_are_not_implemented_are_left_out_where_the_template_says_so(tmp_path):
    content = {"if_implemented": True, "variants": {"a": "--fused-everything", "b": "--depth=3"}}
    (tmp_path / "mine.json").write_text(json.dumps(content))
    read = read_template(str(tmp_path / "mine.json"))
    assert read.missing == ["a"] and list(read.variants) == ["b"]


def test_an_unknown_profile_names_those_there_are():
    with pytest.raises(UserError, match="cpu-smoke"):
        read_profile("tpu")


@pytest.mark.parametrize("alias, name", ALIASES.items())
def test_earlier_names_of_profiles(alias, name):
    assert name in profiles() and read_profile(alias) == read_profile(name)


def test_a_profile_is_a_file_of_flags_too(tmp_path):
    (tmp_path / "mine.flags").write_text(f"@{CONFIGS}/cpu-smoke.flags --depth=3")
    assert read_profile(str(tmp_path / "mine.flags")) == [*SMOKE, "--depth=3"] and read_profile("") == []
    (tmp_path / "mine.flags").write_text("--run='open")
    with pytest.raises(UserError, match="mine.flags"):
        read_profile(str(tmp_path / "mine.flags"))


def test_a_variant_may_name_a_file_of_flags(tmp_path):
    (tmp_path / "wide.flags").write_text("--aspect-ratio=x2")
    (tmp_path / "seed.flags").write_text("--seed=3")
    base, (wide,) = make_variants(SMOKE, "", {"wide": f"--chunked-ce @{tmp_path}/wide.flags"}, "steps")
    shapes = [config_of(v.flags).model for v in (base, wide)]
    assert shapes[1].aspect_ratio == 2 * shapes[0].aspect_ratio
    with pytest.raises(UserError, match="--seed"):
        make_variants(SMOKE, f"@{tmp_path}/seed.flags", {"wide": "--aspect-ratio=32"}, "steps")
