"""Progressive depth in real runs: which blocks train when, what the records say, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import UserError
from nanochat.features import FEATURES, Features
from nanochat.recipe.depth_growth import cost_between, grows, growth_step
from nanochat.recipe.shape import flops_per_token
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.console import time_left
from nanochat.training.explain import as_text, report
from nanochat.training.loop import fit
from nanochat.training.records import read_metrics
from processes import anew

GROWING = ["--initial-depth=1", "--depth-growth-frac=0.5"]
LEFT_OUT = tuple(f"{kind}.{i}." for kind in ("transformer.h", "value_embeds") for i in (1, 2, 3))


def argv(base, tag, *extra):
    return anew([*(f"--depth=4 --head-dim=8 --aspect-ratio=8 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
                   f"--num-iterations=8 --warmup-steps=2 --eval-every=4 --eval-tokens=256 --no-compile "
                   f"--core-metric-every=-1 --sample-every=-1 --save-every=2 --vocab-size=300 --device-type=cpu "
                   f"--data={base / 'text'} --model-tag={tag}").split(), *extra])


def train(base, tag, *extra):
    run = build_run(parse_config(FEATURES, argv(base, tag, *extra)))
    assert fit(run) == 0
    steps = [r for r in read_metrics(run.plan.run_dir / "metrics.jsonl") if r["loss"] is not None]
    return run, steps, json.loads((run.plan.run_dir / "result.json").read_text())


def test_the_other_blocks_rest_until_they_join(base, capsys):
    run, steps, result = train(base, "growing", *GROWING)
    assert [(r["step_kind"], r["active_start"], r["active_layers"]) for r in steps] == [
        *[("shallow", 0, 1)] * 4, *[("full", 0, 4)] * 4]
    weights = {step: load_checkpoint(run.plan.run_dir, step)[0] for step in (2, 4, 6)}
    for name, before in weights[2].items():
        changed = not torch.equal(before, weights[4][name])
        assert changed != name.startswith(LEFT_OUT), name
        if name.endswith(("c_proj.weight", "c_fc.weight")):
            assert not torch.equal(weights[4][name], weights[6][name]), name
    assert (result["initial_depth"], result["depth_grown_at"]) == (1, 4) and result["shallow_step_share"] > 0
    assert "progressive depth: 4 steps with 1 of 4 blocks" in capsys.readouterr().out


def test_the_first_step_is_that_of_the_whole_model(base):
    """Its loss, gradient norms and evaluations too, as the blocks that are left out add nothing yet."""
    _, growing, result = train(base, "growing-first", *GROWING)
    _, whole, expected = train(base, "whole-first")
    assert growing[0]["loss"] == whole[0]["loss"] and growing[0]["batch_crc32"] == whole[0]["batch_crc32"]
    assert result["val_curve"][0][2] == expected["val_curve"][0][2]
    assert growing[1]["loss"] == pytest.approx(whole[1]["loss"], abs=0.05) and growing[-1]["loss"] != whole[-1]["loss"]


def test_a_block_that_was_trained_is_never_left_out(base):
    """Also where the run is made longer, so that growth would come later; and not in a run that began with all blocks."""
    longer = ["--num-iterations=20", "--resume-from-step=latest", "--allow-change"]
    train(base, "lengthened", *GROWING)
    _, steps, result = train(base, "lengthened", *GROWING, *longer)
    assert [r["active_layers"] for r in steps] == [1] * 4 + [4] * 16 and result["depth_grown_at"] == 4
    train(base, "was-whole")
    with pytest.raises(UserError, match="resume with --initial-depth=0"):
        train(base, "was-whole", *GROWING, *longer)


def test_results_may_be_read_late(base):
    run, steps, _ = train(base, "growing-late", *GROWING, "--deferred-loss-logging")
    _, at_once, _ = train(base, "growing-at-once", *GROWING)
    assert run.defers_metrics and [r["loss"] for r in steps] == [r["loss"] for r in at_once]


def test_blocks_are_frozen_only_once_all_are_there(base):
    suffix = ["--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=0", "--dyn-min-active-layers=1",
              "--dyn-relevance-threshold=0.01"]
    _, steps, result = train(base, "growing-suffix", *GROWING, *suffix, "--dyn-freeze-start-frac=0.75")
    assert [(r["step_kind"], r["active_start"], r["active_layers"]) for r in steps] == [
        *[("shallow", 0, 1)] * 4, *[("full", 0, 4)] * 2, *[("suffix", 3, 1)] * 2]
    assert result["active_layers_mean"] == 2.5  # of the steps in which all blocks were there
    with pytest.raises(UserError, match="frozen only once all are there"):
        train(base, "growing-early", *GROWING, *suffix, "--dyn-freeze-start-frac=0.25")
    with pytest.raises(UserError, match="before all are there"):  # known when the number of steps is
        train(base, "growing-derived", *GROWING, *suffix, "--num-iterations=-1", "--target-param-data-ratio=0.02",
              "--dyn-freeze-start-step=1")
    with pytest.raises(UserError, match="leave one of them out"):
        train(base, "growing-static", *GROWING, "--block-update-schedule=static_suffix", "--static-active-layers=1")


@pytest.mark.parametrize("wrong, advice", [
    (["--initial-depth=2", "--depth-growth-frac=0"], "above 0"), (["--initial-depth=2", "--depth-growth-frac=1"], "below 1"),
    (["--depth-growth-frac=0.5"], "would do nothing"), (["--initial-depth=-1"], "--initial-depth")])
def test_what_cannot_be_is_refused_with_advice(base, wrong, advice):
    with pytest.raises(UserError, match=advice):
        parse_config(FEATURES, argv(base, "refused", *wrong))


def test_a_model_that_is_no_deeper_begins_whole(base):
    """So a file of flags with an initial depth serves for any depth."""
    config = parse_config(FEATURES, argv(base, "shallow", "--initial-depth=4"))
    assert not Features(config, FEATURES).enabled
    _, steps, result = train(base, "shallow", "--initial-depth=9", "--num-iterations=2")
    assert [r["active_layers"] for r in steps] == [4, 4] and "initial_depth" not in result


@pytest.mark.parametrize("steps, blocks", [(1, [4]), (2, [1, 4])])
def test_all_blocks_join_in_the_last_step_at_the_latest(base, steps, blocks):
    _, rows, _ = train(base, f"last-{steps}", f"--num-iterations={steps}", "--initial-depth=1")
    assert [r["active_layers"] for r in rows] == blocks


def test_flops_are_those_that_are_done(base):
    """Of 8 steps 4 run one block: --target-flops counts that, and so does the mean of the records."""
    flags = argv(base, "flops", *GROWING)
    growing, whole = parse_config(FEATURES, flags), parse_config(FEATURES, argv(base, "flops"))
    shape = whole.model.shape(300)
    one = flops_per_token(replace(shape, n_layer=1))
    mean = growing.plan(shape).flops_per_token
    assert mean == pytest.approx((flops_per_token(shape) + one) / 2, abs=1)
    derived = parse_config(FEATURES, [*flags, "--num-iterations=-1", f"--target-flops={20 * 128 * mean}"])
    assert derived.plan(shape).num_iterations == 20


def test_the_explanation_says_when_the_others_join(base):
    growing, whole = (parse_config(FEATURES, argv(base, "explained", *more)) for more in (GROWING, []))
    assert "8 (set by --num-iterations), with 1 of the 4 blocks before step 4\n" in as_text(report(growing), growing)
    assert "8 (set by --num-iterations)\n" in as_text(report(whole), whole)


def test_the_time_left_counts_what_steps_cost():
    """Of 100 steps the first 60 cost a quarter: after 10 of them, each of a second, 50 are left, and 40 of 4 seconds."""
    def cost(start, end):
        return cost_between(start, end, growth=60, share=0.25)
    assert time_left(10, 100, [1.0] * 10, 10.0, -1.0, cost) == pytest.approx(50 + 40 * 4)
    assert time_left(80, 100, [1.0] * 30 + [4.0] * 20, 140.0, -1.0, cost) == pytest.approx(20 * 4)
    assert time_left(80, 100, [4.0] * 5, 140.0, 150.0, cost) == 10.0


def test_growth_is_at_a_share_of_the_steps():
    class Flags:
        initial_depth, depth_growth_frac = 2, 0.75
    assert growth_step(Flags, 1000) == 750 and grows(Flags, 3) and not grows(Flags, 2)
    Flags.initial_depth = 0
    assert not grows(Flags, 3)
