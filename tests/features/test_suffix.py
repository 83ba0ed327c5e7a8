"""Dynamic suffix training in real runs: its decisions reach the model and the records, and "all blocks" is full training."""

import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.features.suffix import Suffix, cost_in_flops, cost_in_seconds, relevance_of_blocks
from nanochat.recipe.shape import GPTConfig, flops_per_token
from nanochat.recipe.suffix_policy import predicted_speedup
from nanochat.runtime.compilation import compile_parts
from nanochat.runtime.device import evaluation
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.loop import fit
from nanochat.training.records import read_metrics
from test_gpt import TINY, batch, tiny_model

ROOT = Path(__file__).parents[2]
STEPS = 12
DYNAMIC = ["--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=2", "--dyn-probe-every=4", "--dyn-refresh-every=8",
           "--dyn-relevance-threshold=0.5", "--dyn-freeze-start-frac=0.1", "--dyn-final-full-frac=0.17",
           "--dyn-min-active-layers=1"]


def argv(base, tag, *extra):
    return [*(f"--depth=4 --head-dim=8 --aspect-ratio=8 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
              f"--num-iterations={STEPS} --warmup-steps=2 --eval-every=6 --eval-tokens=256 "
              f"--core-metric-every=-1 --sample-every=-1 --vocab-size=300 --device-type=cpu --data={base / 'text'} "
              f"--model-tag={tag}").split(), *extra]


def train(base, tag, *extra):
    run = build_run(parse_config(FEATURES, argv(base, tag, *extra)))
    assert fit(run) == 0
    steps = [r for r in read_metrics(run.plan.run_dir / "metrics.jsonl") if r["loss"] is not None]
    return run.plan.run_dir, steps, json.loads((run.plan.run_dir / "result.json").read_text())


def weights(run_dir):
    return (run_dir / f"step_{STEPS:06d}" / "model.safetensors").read_bytes()


def test_decisions_reach_the_records(base, capsys):
    run_dir, steps, result = train(base, "dynamic", "--no-compile", *DYNAMIC)
    kinds = [r["step_kind"] for r in steps]
    assert kinds == ["warmup", "warmup", "probe", "suffix", "probe", "suffix", "suffix", "suffix", "refresh", "suffix",
                     "recovery", "recovery"]
    active = [r["active_layers"] for r in steps]
    assert all((layers == 4) == (kind != "suffix") and r["active_start"] == 4 - layers
               for layers, kind, r in zip(active, kinds, steps, strict=True))
    assert result["schedule"] == "dynamic_suffix" and result["active_layers_mean"] == pytest.approx(sum(active) / STEPS)
    assert result["active_layers_range"] == f"{min(active)}-4"
    full = [r["dt_ms"] for r, kind in zip(steps, kinds, strict=True) if kind in ("warmup", "recovery")]
    assert result["speedup_measured"] == pytest.approx((sum(full) / 4) / (sum(r["dt_ms"] for r in steps) / STEPS))
    state = json.loads((run_dir / f"step_{STEPS:06d}" / "state.json").read_text())
    parts = state["features"]["suffix"]["parts"]
    assert len(parts) == 4 and all(0 < sum(p) * 1000 <= dt for p, dt in zip(parts, full, strict=True))
    cost = cost_in_seconds(GPTConfig(**state["model_config"]), *(statistics.median(p) for p in zip(*parts, strict=True)))
    assert result["speedup_predicted"] == pytest.approx(predicted_speedup(active, 4, cost))
    of_the_warm_up = (statistics.median(p) for p in zip(*parts[:2], strict=True))
    early = cost_in_seconds(GPTConfig(**state["model_config"]), *of_the_warm_up)
    assert steps[-1]["cost_share"] == 1 and steps[3]["cost_share"] == pytest.approx(early.step(active[3], 4) / early.step(4, 4))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dynamic_suffix: "))
    assert f"measured {result['speedup_measured']:.2f}" in line and f"k {result['backward_over_forward']:.2f}," in line


def test_by_default_the_top_quarter_is_trained_to_the_end_once_frozen(base):
    _, steps, result = train(base, "defaults", "--no-compile", "--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=2")
    assert [(r["step_kind"], r["active_layers"]) for r in steps] == [("warmup", 4)] * 2 + [("full", 4)] * 6 + [("suffix", 1)] * 4
    assert result["guard_ended_at"] is None


def test_the_guard_reaches_the_records(base, capsys):
    """At this rate, which goes on growing, the loss rises from the freeze on."""
    more = ["--num-iterations=60", "--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=0", "--dyn-freeze-start-step=4",
            "--lr-multiplier=30", "--weight-decay=0", "--warmup-steps=58", "--no-compile", "--eval-every=-1"]
    _, steps, result = train(base, "guard", *more)
    ended = result["guard_ended_at"]
    assert ended and {r["active_layers"] for r in steps[ended:]} == {4} and {r["active_layers"] for r in steps[5:ended]} == {1}
    assert f"trained from step {ended} on" in capsys.readouterr().out


@pytest.mark.parametrize("extra, many", [([], False), (["--dyn-probe-every=4"], True), (["--dyn-refresh-every=9"], True),
                                         (["--dyn-final-recovery-mode=staged"], True)])
def test_where_two_graphs_serve_the_model_is_compiled_whole(base, extra, many):
    config = parse_config(FEATURES, argv(base, "whole", "--block-update-schedule=dynamic_suffix", "--dyn-warmup-steps=2",
                                         "--dyn-freeze-start-frac=0.3", *extra))
    assert Suffix(config).many_variants == many


@pytest.mark.slow
def test_all_blocks_is_full_training_to_the_bit(base):
    full, full_steps, _ = train(base, "full", "--no-compile")
    every, every_steps, _ = train(base, "every", "--no-compile", *DYNAMIC, "--dyn-min-active-layers=4")
    assert [r["loss"] for r in full_steps] == [r["loss"] for r in every_steps] and weights(full) == weights(every)
    assert all(r["active_start"] == 0 for r in every_steps)


def test_static_suffix_trains_the_top(base):
    _, steps, result = train(base, "static", "--no-compile", "--block-update-schedule=static_suffix", "--static-active-layers=1")
    assert {(r["step_kind"], r["active_start"]) for r in steps} == {("suffix", 3)}
    assert result["active_layers_range"] == "1-1" and result["speedup_measured"] is None


@pytest.mark.parametrize("metric", ["grad_ratio", "saliency_abs_gp"])
def test_relevance_is_what_it_says(metric):
    model = tiny_model()
    model(*batch()).backward()
    expected = []
    for block in model.transformer.h:
        pairs = [(p.grad, p.detach()) for p in block.parameters()]
        g, p = (torch.cat([t.flatten() for t in ts]).double() for ts in zip(*pairs, strict=True))
        expected.append((g.norm() / p.norm() if metric == "grad_ratio" else (g * p).abs().sum()).item())
    assert relevance_of_blocks(model.transformer.h, metric) == pytest.approx(expected, rel=1e-4)


def test_costs_add_up():
    config = GPTConfig()
    flops, seconds = cost_in_flops(config), cost_in_seconds(config, forward=0.1, backward=0.25, update=0.05)
    assert flops.step(config.n_layer, config.n_layer) == pytest.approx(flops_per_token(config))
    assert flops.backward_block == pytest.approx(2 * flops.forward_block)
    assert seconds.step(config.n_layer, config.n_layer) == pytest.approx(0.4)
    head = 6 * 32768 * 768 / flops_per_token(config)
    assert seconds.step(0, config.n_layer) == pytest.approx(0.1 + head * 0.25)  # nothing but the forward, and the head's backward


@pytest.mark.slow
@pytest.mark.parametrize("backend, config, graphs_enough", [
    ("aot_eager", TINY, 16), ("inductor", replace(TINY, n_layer=2), 8)], ids=["every start", "by inductor"])
def test_compiled_in_parts_it_follows_eager_and_compiles_nothing_twice(backend, config, graphs_enough):
    """Every start, forwards and backwards and evaluation between: gradients as in eager, and a second round adds no graph."""
    eager, parts = tiny_model(config), compile_parts(tiny_model(config), backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    for _ in range(2):
        for start in range(config.n_layer):
            x, y = batch(seed=start)
            for model in (eager, parts):
                model.zero_grad(set_to_none=True)
                model(x, y, active_start=start).backward()
            for (name, p), q in zip(eager.named_parameters(), parts.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if p.grad is not None:
                    torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
            with evaluation(parts):
                torch.testing.assert_close(parts(x, y), eager(x, y), rtol=0, atol=0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] <= graphs_enough


def test_a_clash_is_refused_before_text_and_torch_and_the_number_of_steps():
    code = """import sys, runpy
sys.argv = ["x", "--block-update-schedule=dynamic_suffix", "--dyn-min-active-layers=9", "--dyn-max-active-layers=3",
            "--data=/no/such/folder"]
try: runpy.run_module("scripts.base_train", run_name="__main__")
except SystemExit as e: sys.exit(9 if "torch" in sys.modules else e.code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--dyn-min-active-layers" in done.stderr and "--dyn-max-active-layers" in done.stderr


@pytest.mark.parametrize("extra, names", [
    (["--dyn-min-active-layers=3", "--dyn-max-active-layers=2"], ["--dyn-min-active-layers", "--dyn-max-active-layers"]),
    (["--block-update-schedule=static_suffix"], ["--block-update-schedule", "--dyn-warmup-steps"]),
    (["--dyn-probe-every=-1"], ["--dyn-probe-every"]),
])
def test_impossible_schedules_are_refused(base, extra, names):
    with pytest.raises(UserError) as e:
        parse_config(FEATURES, argv(base, "bad", *DYNAMIC, *extra))
    assert all(name in str(e.value) for name in names)
