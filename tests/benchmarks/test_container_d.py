"""Container D's bench: the blocks that each schedule trains, equal time, the JSON, flags checked first."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "attempts" / "container_d_convergence"
sys.path.insert(0, str(FOLDER))  # as for a script that is run

import dynamic_block_update_schedule_bench as d
from nanochat.cli.flags import parse
from nanochat.common import UserError
from nanochat.features.suffix import relevance_of_blocks
from nanochat.recipe.suffix_policy import CostModel, SuffixFlags, SuffixPolicy, predicted_speedup
from nanochat.runtime.timing import latency_ms
from residual_stack import ResidualStack, Task

STEPS, LAYERS = 40, 4
TINY = (f"--dmodel=16 --n-layers={LAYERS} --hidden-mult=2 --batch-size=2 --seq-len=8 --steps={STEPS} --val-batches=2 "
        "--device=cpu --dtype=float32 --static-active-layers=1 --no-plot").split()
DYNAMIC = ("--dyn-warmup-steps=4 --dyn-probe-every=8 --dyn-refresh-every=0 --dyn-relevance-threshold=0.3 "
           "--dyn-freeze-start-frac=0.25 --dyn-freeze-start-step=-1 --dyn-final-full-frac=0.2 --dyn-min-active-layers=1").split()
EQUAL = ["--equal-time-budget", "--budget-clock=model"]


def bench(folder, *extra, status=0):
    """Run it in this process -> the JSON, which must be strict."""
    path = folder / "out" / "result.json"
    assert d.main([*TINY, *DYNAMIC, *extra, "--json-out", str(path)]) == status
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def examples():
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [shlex.split(re.sub(r"\$\(.*?\)", "now", command).split("_bench.py")[1]) for command in commands]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("plain"), "--eval-every=15")


@pytest.fixture(scope="module")
def equal_time(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("equal"), *EQUAL)


# --- what is trained --------------------------------------------------------------------------------------------------

def test_all_blocks_is_full_training_to_the_bit(tmp_path):
    traces = bench(tmp_path, f"--dyn-min-active-layers={LAYERS}", *EQUAL, "--warmdown-ratio=0.5")["traces"]
    full, dynamic = traces["full_update"], traces["dynamic_suffix"]
    assert dynamic["train_loss"] == full["train_loss"] and len(full["train_loss"]) == STEPS
    assert [v[2] for v in dynamic["validation"]] == [v[2] for v in full["validation"]]
    assert "probe" in dynamic["step_kind"] and set(dynamic["active_layers"]) == {LAYERS}


def test_frozen_parts_do_not_move():
    flags, suffix = parse([d.BenchFlags, SuffixFlags], TINY)
    flags, task = flags.filled(), Task(1, (2, 8), torch.device("cpu"), torch.float32)
    run = d.Training(flags, d.variants(flags, suffix)["static_suffix"], task, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for _ in range(3):
        run.train_step()
    for name, p in run.model.named_parameters():
        trained = name.startswith((f"blocks.{LAYERS - 1}.", "head."))
        assert trained != torch.equal(p, before[name]), name
        assert trained == (p.grad is not None) == (p in run.optimizer.state), name


def test_a_suffix_has_the_gradients_of_full_training():
    """Freezing what is below changes nothing in the gradients above."""
    model = ResidualStack(LAYERS, 16, 32).init_weights(0, branch=0.5)
    x, y = Task(1, (2, 8), torch.device("cpu"), torch.float32).batch(0)
    gradients = []
    for start in (0, 2):
        model.zero_grad(set_to_none=True)
        model.loss(x, y, start).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[1]) == {n for n in gradients[0] if n.startswith(("blocks.2", "blocks.3", "head"))}
    assert all(torch.equal(g, gradients[0][name]) for name, g in gradients[1].items())


@pytest.mark.parametrize("metric", ["grad_ratio", "saliency_abs_gp"])
def test_relevance_takes_any_blocks(metric):
    model = ResidualStack(2, 16, 32).init_weights(0, branch=0.5)
    model.loss(*Task(1, (2, 8), torch.device("cpu"), torch.float32).batch(0)).backward()
    for block, value in zip(model.blocks, relevance_of_blocks(model.blocks, metric), strict=True):
        pairs = [(p.grad, p.detach()) for p in block.parameters()]
        g, p = (torch.cat([t.flatten() for t in ts]) for ts in zip(*pairs, strict=True))
        assert value == pytest.approx((g.norm() / p.norm() if metric == "grad_ratio" else (g * p).abs().sum()).item(), rel=1e-4)


def test_batches_depend_on_seed_and_index_alone():
    one, other = (Task(seed, (2, 8), torch.device("cpu"), torch.float32) for seed in (1, 2))
    again = Task(1, (2, 8), torch.device("cpu"), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.batch(3), again.batch(3), strict=True))
    for x in (other.batch(3)[0], one.batch(4)[0], next(one.validation(1))[0]):
        assert not torch.equal(one.batch(3)[0], x)
    y = torch.cat([one.batch(i)[1] for i in range(200)]).flatten(0, 1)
    assert y.mean(0).abs().max() < 0.15 and (y.var(0) - 1).abs().max() < 0.15


def test_it_learns(result):
    for row in result["results"].values():
        assert row["val_loss_final"] < row["train_loss_start"]


# --- equal time -------------------------------------------------------------------------------------------------------

def test_equal_time_is_used_up_and_not_exceeded(equal_time):
    for name, row in equal_time["results"].items():
        assert STEPS - 1 < row["budget_used"] <= STEPS + 1e-6, name
        assert row["steps_done"] == row["steps_planned"], name
    steps = {name: row["steps_done"] for name, row in equal_time["results"].items()}
    assert steps["full_update"] == STEPS < steps["dynamic_suffix"] < steps["static_suffix"]


def test_the_phases_start_at_shares_of_the_planned_steps(equal_time):
    kinds, n = equal_time["traces"]["dynamic_suffix"]["step_kind"], equal_time["results"]["dynamic_suffix"]["steps_done"]
    assert kinds.count("recovery") == round(0.2 * n) and kinds[-1] == "recovery"
    plans = equal_time["traces"]["dynamic_suffix"]["steps_planned"]
    start = next(i for i, kind in enumerate(kinds) if kind == "suffix")
    assert start >= round(0.25 * max(p for step, p in plans if step <= start)) > 4


def test_counted_in_flops_a_run_repeats(equal_time, tmp_path):
    again = bench(tmp_path, *EQUAL)
    for name, trace in equal_time["traces"].items():
        for what in ("train_loss", "active_layers", "steps_planned", "relevance"):
            assert again["traces"][name][what] == trace[what], (name, what)


def test_the_cap_on_steps_holds_and_recovery_is_inside_it(tmp_path):
    result = bench(tmp_path, *EQUAL, "--max-steps-multiplier=1.1")
    assert [row["steps_done"] for row in result["results"].values()] == [40, 44, 44]
    assert result["traces"]["dynamic_suffix"]["step_kind"].count("recovery") == round(0.2 * 44)
    assert result["results"]["static_suffix"]["budget_used"] < STEPS - 1


def test_the_clock_budget_counts_seconds(tmp_path):
    """Where one slow step can take the time of many, only this is certain."""
    rows = bench(tmp_path, "--equal-time-budget")["results"]
    full_step = rows["full_update"]["train_time_sec"] / STEPS
    assert rows["full_update"]["steps_done"] == STEPS
    for row in rows.values():
        assert row["status"] == "ok" and row["steps_done"] <= 3 * STEPS
        assert row["budget_used"] == pytest.approx(row["train_time_sec"] / full_step)


def flags_of(schedule, *extra):
    flags, suffix = parse([d.BenchFlags, SuffixFlags], [*TINY, *DYNAMIC, *extra])
    return d.variants(flags.filled(), suffix)[schedule]


SHARE = [(1 + 2 * a / LAYERS) / 3 for a in range(LAYERS + 1)]


def test_plan_of_a_constant_schedule():
    static = SuffixPolicy(flags_of("static_suffix"), LAYERS, STEPS)  # every step costs half a full one
    assert d.plan(static, 0, STEPS, STEPS, 3 * STEPS, SHARE) == 2 * STEPS
    assert d.plan(static, 30, 10, STEPS, 3 * STEPS, SHARE) == 50
    assert d.plan(static, 0, STEPS, STEPS, 60, SHARE) == 60
    assert d.plan(static, 0, 1, STEPS, 60, SHARE) == STEPS


def test_plan_uses_the_policys_relevance():
    policy = SuffixPolicy(flags_of("dynamic_suffix"), LAYERS, STEPS)
    even = d.plan(policy, 0, STEPS, STEPS, 3 * STEPS, SHARE)          # 2 of 4 evenly relevant blocks hold 30 %
    policy.relevance = [0.0, 0.0, 0.0, 1.0]
    top = d.plan(policy, 0, STEPS, STEPS, 3 * STEPS, SHARE)
    policy.relevance = [1.0, 0.0, 0.0, 0.0]
    assert STEPS == d.plan(policy, 0, STEPS, STEPS, 3 * STEPS, SHARE) < even < top
    waiting = SuffixPolicy(flags_of("dynamic_suffix", "--dyn-require-stable"), LAYERS, STEPS)
    waiting.relevance = [0.0, 0.0, 0.0, 1.0]
    assert d.plan(waiting, 0, STEPS, STEPS, 3 * STEPS, SHARE) == STEPS
    waiting.freeze_step = 20                                          # the gate has opened
    assert d.plan(waiting, 20, STEPS - 20, STEPS, 3 * STEPS, SHARE) > STEPS


def test_a_new_plan_keeps_the_state_and_moves_a_future_freeze():
    flags = flags_of("dynamic_suffix")
    old = SuffixPolicy(flags, LAYERS, STEPS)
    old.relevance, old.budget = [1.0, 2.0, 3.0, 4.0], 3
    before, after = (d.make_policy(flags, LAYERS, 2 * STEPS, old, step) for step in (5, 15))
    assert before.relevance == after.relevance == old.relevance and before.budget == after.budget == 3
    assert (old.freeze_step, before.freeze_step, after.freeze_step) == (10, 20, 10)
    assert before.recovery_start == 2 * old.recovery_start


# --- what comes out ---------------------------------------------------------------------------------------------------

def test_the_json_is_complete(result):
    assert {"schema_version", "script", "argv", "git_commit", "device", "torch_version", "config", "results", "traces",
            "elapsed_sec"} == set(result)
    assert (ROOT / result["script"]).is_file() and result["argv"][:len(TINY)] == TINY
    assert list(result["results"]) == list(result["traces"]) == ["full_update", "static_suffix", "dynamic_suffix"]
    for name, row in result["results"].items():
        trace = result["traces"][name]
        assert {len(trace[what]) for what in ("train_loss", "active_layers", "step_kind", "seconds")} == {STEPS}
        assert row["steps_done"] == STEPS and row["status"] == "ok"
        assert (row["train_loss_start"], row["train_loss_end"]) == (trace["train_loss"][0], trace["train_loss"][-1])
        assert [v[0] for v in trace["validation"]] == [0, 15, 30, 40] and trace["validation"][-1][2] == row["val_loss_final"]
        assert row["mean_ms"] == pytest.approx(1000 * sum(trace["seconds"][1:]) / (STEPS - 1))
        assert row["p50_ms"] <= row["p90_ms"]
        active = trace["active_layers"]
        assert row["active_layers_mean"] == sum(active) / STEPS
        assert (row["active_layers_min"], row["active_layers_max"]) == (min(active), max(active))
        assert row["active_layers_steps"] == {str(a): active.count(a) for a in sorted(set(active))}
        assert row["probe_count"] == len(trace["relevance"]) >= trace["step_kind"].count("probe")
        cost = CostModel(**result["config"]["cost_sec"])
        assert row["speedup_predicted"] == pytest.approx(predicted_speedup(active, LAYERS, cost))
    full, static, dynamic = result["results"].values()
    assert full["speedup_vs_full"] == 1 and full["val_vs_full_pct"] == 0 and full["active_layers_min"] == LAYERS
    assert static["active_layers_max"] == 1 and static["speedup_vs_full"] == pytest.approx(full["mean_ms"] / static["mean_ms"])
    assert 1 <= dynamic["active_layers_mean"] < LAYERS and dynamic["probe_count"] > 1


def test_a_picture_is_saved_beside_it(tmp_path):
    pytest.importorskip("matplotlib")
    bench(tmp_path, "--plot", "--schedules", "static_suffix", "dynamic_suffix")
    assert (tmp_path / "out" / "result.png").stat().st_size > 10_000


def test_without_full_update_nothing_is_compared_with_it(tmp_path, capsys):
    row = bench(tmp_path, "--schedules", "static_suffix")["results"]["static_suffix"]
    assert row["speedup_vs_full"] is None and row["val_vs_full_pct"] is None and row["speedup_predicted"] > 1
    assert re.search(r"static_suffix +40 .* NA ", capsys.readouterr().out)


def test_divergence_is_a_result(tmp_path):
    result = bench(tmp_path, "--lr=1e30", "--schedules", "full_update", status=1)
    row = result["results"]["full_update"]
    assert row["status"] == "diverged" and row["steps_done"] < STEPS and row["train_loss_end"] is None


def test_percentiles():
    assert latency_ms([0.001 * i for i in range(1, 12)]) == pytest.approx({"mean_ms": 6, "p50_ms": 6, "p90_ms": 10})
    assert latency_ms([0.002]) == pytest.approx({"mean_ms": 2, "p50_ms": 2, "p90_ms": 2})


# --- flags ------------------------------------------------------------------------------------------------------------

def test_every_flag_in_the_readme_exists():
    known = {f"--{name.replace('_', '-')}" for group in (d.BenchFlags, SuffixFlags) for name in group.__dataclass_fields__}
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", (FOLDER / "README.md").read_text())) - {"--help", "--seed"}
    assert mentioned <= known and len(mentioned) > 35


@pytest.mark.slow
@pytest.mark.parametrize("argv", examples(), ids=lambda argv: argv[-1].split("/")[-1])
def test_the_readmes_examples_run(argv, tmp_path, monkeypatch):
    """As they are written they are accepted; with tiny sizes they run."""
    monkeypatch.chdir(tmp_path)
    parse([d.BenchFlags, SuffixFlags], argv, validate=d.schedule_problems)
    layers = argv[argv.index("--n-layers") + 1] if "--n-layers" in argv else 6
    assert d.main([*argv, *"--device=cpu --dmodel=8 --batch-size=1 --seq-len=4 --steps=50 --no-plot".split()]) == 0
    written = list(tmp_path.glob("attempts/results/container_d/dynamic_block_schedule_*.json"))
    assert len(written) == ("--json-out" in argv)
    for path in written:
        config = json.loads(path.read_text())["config"]
        assert config["n_layers"] == int(layers) and config["dtype"] == "bfloat16"


@pytest.mark.parametrize("preset", ["smoke", "default", "gpu"])
def test_presets_make_schedules(preset):
    flags, _ = parse([d.BenchFlags, SuffixFlags], ["--preset", preset, "--equal-time-budget"], validate=d.schedule_problems)
    filled = flags.filled()
    assert None not in [getattr(filled, name) for name in d.PRESETS[preset]] and filled.lr > 0 and filled.eval_every > 0


def test_a_flag_overrides_the_preset():
    flags = d.BenchFlags(preset="gpu", n_layers=3).filled()
    assert (flags.n_layers, flags.dmodel, flags.lr) == (3, 1024, pytest.approx(3e-4))


@pytest.mark.parametrize("wrong, names", [
    ("--schedules static_suffix --equal-time-budget", "--equal-time-budget"),
    ("--schedules nothing", "--schedules"),
    ("--static-active-layers 9", "--static-active-layers"),
    ("--dyn-min-active-layers 3 --dyn-max-active-layers 2", "--dyn-min-active-layers"),
    ("--dyn-freeze-start-frac 0.9", "--dyn-freeze-start-frac"),
    ("--block-update-schedule dynamic_suffix", "--schedules"),
    ("--lr 0", "--lr"),
    ("--eval-every 0", "--eval-every"),
    ("--max-steps-multiplier 0.5", "--max-steps-multiplier"),
    ("--json-out .", "--json-out"),
    ("--json-out {file}/x.json", "--json-out"),
])
def test_wrong_flags_are_refused_before_anything_is_done(wrong, names, tmp_path, monkeypatch):
    monkeypatch.setattr(d.BenchFlags, "open_device", lambda self: pytest.fail("it went on"))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match=names):
        d.main([*TINY, *DYNAMIC, "--json-out", str(tmp_path / "new" / "x.json"), *wrong.format(file=tmp_path / "file").split()])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_script_reports_all_problems_at_once_from_any_folder(tmp_path):
    code = f"""import sys, runpy
sys.argv = ["x", "--n-layers=1", "--dyn-probes-every=3", "--dtype=bf16"]
try: runpy.run_path({str(FOLDER / 'dynamic_block_update_schedule_bench.py')!r}, run_name="__main__")
except SystemExit as e: sys.exit(9 if "torch" in sys.modules else e.code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    for problem in ("--n-layers", "--dyn-probes-every", "--dtype"):
        assert problem in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_runs_as_a_script_from_anywhere(tmp_path):
    script = str(FOLDER / "dynamic_block_update_schedule_bench.py")
    done = subprocess.run([sys.executable, script, *TINY, "--steps=12", *DYNAMIC], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "k = " in done.stdout and re.search(r"^dynamic_suffix +12 ", done.stdout, re.M)
