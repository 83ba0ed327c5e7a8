"""The plan of a run: what is computed agrees with a run, what is measured is kept by machine and flags, and what cannot be
measured is said."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from nanochat.common import ROOT, UserError, resolve
from nanochat.features import FEATURES
from nanochat.recipe.depth_growth import shallow_share
from nanochat.training import plan, plan_cache, plan_probe
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.explain import memory, report
from nanochat.training.forecast import forecast, forecast_for_result
from nanochat.training.loop import every
from nanochat.training.plan_cache import Probe
from nanochat.training.plan_probe import NotMeasured
from processes import Served, tiny_flags, trained

PROBE = Probe(device="d", device_type="cpu", dtype="float32", compiled=False, rows=2, memory_limit=2**34, micro_batch_sec=0.3,
              update_sec=0.1, spread=0.05, steps=7, eval_micro_batch_sec=0.2, compile_sec=1.5, save_sec=0.5,
              step_peak_mem_mib=100.0, peak_mem_mib=120.0, other_load=0.0, date="2026-01-01")


def planned(*extra):
    """Flags of a run whose text does not exist, which a plan does not read."""
    return tiny_flags(Path("/no/such"), "planned", "--dtype=float32", "--num-iterations=9", *extra)


def shape_of(config):
    return config.model.shape(config.data.vocab_size)


def shown(capsys, argv):
    plan.show_plan(argv)
    return capsys.readouterr()


# ---- measured

@pytest.mark.slow
def test_a_plan_measures_once_and_foretells_the_run(base, capsys):
    """The estimate is within a factor of 30 of a run: on a machine that other tests use, it can say no more than that the units
    are right."""
    argv = planned("--json", "--probe-seconds=0.5", "--watts=100", "--price-per-kwh=0.5")
    first = shown(capsys, argv)
    found = json.loads(first.out)
    assert "measuring" in first.err and found["probe"]["rows"] == 2 and found["probe"]["steps"] >= 1
    assert not (base / "tokenizer").exists() and not (base / "tokens").exists(), "no text is read"
    expected = found["expected"]
    assert expected["estimated_train_time_sec"] == pytest.approx(9 * expected["step_sec"])
    assert expected["energy_kwh"] == pytest.approx(100 * expected["estimated_time_sec"] / 3.6e6)
    assert expected["cost"] == pytest.approx(expected["energy_kwh"] / 2)

    again = shown(capsys, [*argv, "--num-iterations=90", "--matrix-lr=0.01", "--eval-every=-1"])
    assert again.err == "" and json.loads(again.out)["probe"] == found["probe"], "the same steps are not measured again"
    assert json.loads(again.out)["expected"]["estimated_train_time_sec"] == pytest.approx(90 * expected["step_sec"])

    run_flags = [*tiny_flags(base, "foretold"), "--dtype=float32", "--num-iterations=9"]
    run = trained(build_run(parse_config(FEATURES, run_flags)))
    result = json.loads((run.plan.run_dir / "result.json").read_text())
    foretold = forecast_for_result(run.plan.config, run.plan.shape)
    assert foretold["estimated_train_time_sec"] == expected["estimated_train_time_sec"]
    assert 1 / 30 < foretold["estimated_train_time_sec"] / (9 * result["dt_median_ms"] / 1000) < 30


def test_two_sides_take_turns():
    config = parse_config(FEATURES, planned())
    spread = plan_probe.take_turns(config, config, shape_of(config), seconds=0.1)
    assert spread["n"] >= plan_probe.ROUNDS and 1 / 30 < spread["q1"] <= spread["median"] <= spread["q3"] < 30


def test_a_probe_has_the_run_s_micro_batch_and_at_most_two_of_them():
    config = parse_config(FEATURES, planned("--total-batch-size=640"))
    trainer = plan_probe.make_trainer(config, shape_of(config))
    assert trainer.plan.micro_batch_size == 2 and trainer.plan.horizon.grad_accum_steps == 2
    assert trainer.loader.next()[0].shape == (2, 32) and config.horizon.total_batch_size == 640
    micro, update = plan_probe.take_steps(trainer, 1)[0]
    assert micro > 0 and update > 0
    trainer.loader.close()


@pytest.mark.parametrize("work, arguments, why", [
    (os._exit, [3], "its process ended with status 3"), (os.abort, [], "its process ended with status -6"),
    (resolve, ["~no-such-user/x"], "there is no such home directory")])
def test_a_process_that_fails_is_no_result(work, arguments, why):
    """Whatever ends it: a crash, or an error that the user can mend."""
    with pytest.raises(NotMeasured, match=why):
        plan_probe.in_process(work, *arguments)


def test_what_is_not_measured_is_said(capsys):
    said = shown(capsys, planned("--no-probe")).out
    assert "parameters: total" in said and said.endswith("not measured: --no-probe\n")
    found = json.loads(shown(capsys, planned("--no-probe", "--json")).out)
    assert found["not_measured"] == "--no-probe" and found["probe"] is found["expected"] is None


def test_flags_that_do_not_apply_are_no_gains(monkeypatch):
    monkeypatch.setattr(plan, "CANDIDATES", ("--chunked-ce", "--recompute-activations", "--fused-rmsnorm"))
    argv = planned("--chunked-ce")
    config = parse_config(FEATURES, argv)
    found = plan.gains(argv, config, shape_of(config), 0.1, "cpu")
    assert [row["speedup"] for row in found] == [None] * 3
    assert found[0]["note"] == "already on" and "--no-compile" in found[1]["note"] and found[2]["note"] == "for NVIDIA GPUs"
    assert "already on" in plan.gains_text(found, 2**20)


# ---- kept

@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


def test_a_probe_is_kept_by_what_the_time_of_a_step_depends_on(empty):
    config = parse_config(FEATURES, planned())
    plan_cache.keep(config, shape_of(config), PROBE)

    def known(*extra):
        other = parse_config(FEATURES, planned(*extra))
        return plan_cache.kept_probe(other, shape_of(other))
    for same in ("--num-iterations=500", "--model-tag=other", "--matrix-lr=1", "--total-batch-size=256", "--save-every=4",
                 "--max-train-seconds=3", "--eval-every=5"):
        assert known(same) == PROBE, same
    for other in ("--depth=3", "--device-batch-size=4", "--total-batch-size=64", "--bf16-momentum", "--chunked-ce",
                  "--max-seq-len=64", "--vocab-size=400", "--dtype=auto", "--attention-backend=sdpa"):
        assert known(other) is None, other


@pytest.mark.parametrize("content", ["", "{", "[]", '{"probes": 3}', '{"probes": {}}', '{"probes": {"KEY": {"rows": 1}}}'])
def test_a_damaged_file_counts_as_no_probe(empty, content):
    config = parse_config(FEATURES, planned())
    shape = shape_of(config)
    plan_cache.keep(config, shape, PROBE)
    path, = (empty / "plan").iterdir()
    key, = json.loads(path.read_text())["probes"]
    path.write_text(content.replace("KEY", key))
    assert plan_cache.kept_probe(config, shape) is None and forecast_for_result(config, shape) is None
    plan_cache.keep(config, shape, PROBE)
    assert plan_cache.kept_probe(config, shape) == PROBE


def test_a_folder_that_cannot_be_written_costs_the_memory_alone(empty):
    (empty / "plan").write_text("")
    config = parse_config(FEATURES, planned())
    plan_cache.keep(config, shape_of(config), PROBE)
    assert plan_cache.kept_probe(config, shape_of(config)) is None


# ---- computed

@settings(max_examples=30)
@given(steps=st.integers(1, 60), eval_every=st.sampled_from([-1, 1, 3, 7, 50, 100]), batches=st.integers(1, 9))
def test_the_forecast_counts_what_the_loop_does(steps, eval_every, batches):
    config = parse_config(FEATURES, planned(f"--num-iterations={steps}", f"--eval-every={eval_every}",
                                            f"--total-batch-size={64 * batches}", "--eval-tokens=640"))
    found = forecast(config, shape_of(config), PROBE)
    evaluations = sum(eval_every > 0 and (step in (0, steps) or every(step, eval_every)) for step in range(steps + 1))
    assert found["estimated_train_time_sec"] == pytest.approx(steps * (batches * 0.3 + 0.1))
    assert found["estimated_eval_time_sec"] == pytest.approx(evaluations * 640 / 64 * 0.2)
    assert found["tok_per_sec"] == pytest.approx(64 * batches / (batches * 0.3 + 0.1))
    assert found["estimated_peak_mem_mib"] == (120.0 if evaluations else 100.0)


RESULT = {"status": "ok", "steps_done": 40, "device": "d", "dtype": "float32", "eager_fallbacks": 0, "other_load": 0.01,
          "tok_per_sec_median": 640.0, "tok_per_sec_avg": 500.0, "eval_time_sec": 3.0, "val_curve": [[0, 0, 3]] * 15,
          "compile_time_sec": 0.0, "save_time_sec": 0.25, "peak_mem_mib": 300.0}


def keep_run(result, *extra):
    config = parse_config(FEATURES, planned(*extra))
    plan_cache.keep_run(config, shape_of(config), result, [0.2] * result["steps_done"], device_type="cpu", rows=2,
                        memory_limit=2**34)


def foretold(*extra):
    config = parse_config(FEATURES, planned(*extra))
    return forecast_for_result(config, shape_of(config))


def test_a_run_tells_what_the_next_one_takes(empty):
    """128 tokens a step at 640 a second. A probe that was there is put back, one that is taken anew counts again."""
    config = parse_config(FEATURES, planned())
    plan_cache.keep(config, shape_of(config), PROBE)
    assert foretold("--num-iterations=40")["estimated_train_time_sec"] == pytest.approx(40 * (2 * 0.3 + 0.1))
    keep_run(RESULT, "--num-iterations=40")
    found = foretold("--num-iterations=400", "--matrix-lr=0.01")
    assert found["estimated_train_time_sec"] == pytest.approx(400 * 128 / 640)
    assert found["estimated_peak_mem_mib"] == 300 and found["estimated_save_time_sec"] == 0.25
    assert foretold("--num-iterations=42")["estimated_eval_time_sec"] == pytest.approx(3.0), "15 evaluations, as in the run"
    for other in ("--save-every=2", "--eval-every=-1", "--total-batch-size=256", f"--max-chars={2**20}"):
        assert foretold(other)["estimated_peak_mem_mib"] != 300, f"{other}: the probe says more than a run of other flags"
    assert "40 steps of the run planned" in "".join(plan.measured_text(
        config, shape_of(config), plan_cache.kept_probe(config, shape_of(config)), plan.expected(
            config, shape_of(config), PROBE, plan.Plan.Config()), plan.Plan.Config()))
    plan_cache.keep(config, shape_of(config), PROBE)
    assert plan_cache.kept_probe(config, shape_of(config)) == PROBE


@pytest.mark.parametrize("said", [{"status": "diverged"}, {"steps_done": 3}, {"other_load": 0.5}])
def test_a_run_that_says_little_is_not_kept(empty, said):
    keep_run(RESULT | said)
    assert foretold() is None


def test_where_steps_differ_the_mean_counts_and_the_length(empty):
    """The last steps of --block-update-schedule are shorter."""
    flags = ["--depth=4", "--block-update-schedule=dynamic_suffix", "--num-iterations=40"]
    keep_run(RESULT, *flags)
    assert foretold(*flags)["estimated_train_time_sec"] == pytest.approx(40 * 128 / 500)
    assert foretold(*flags, "--num-iterations=80") is None


@pytest.mark.slow
def test_the_memory_of_the_process_is_that_of_a_real_run(base, tmp_path):
    """Program, step, the copies of a checkpoint and the text: within 30 %. The model is large enough to be seen beside the
    program: 13 MiB of weights, 45 of copies."""
    argv = tiny_flags(base, "peak", "--dtype=float32", "--depth=4", "--aspect-ratio=64", "--head-dim=64", "--max-seq-len=512",
                      "--device-batch-size=4", "--total-batch-size=2048", "--num-iterations=4", "--save-every=2",
                      "--eval-every=-1", "--max-chars=100000")
    process = Served(argv, base, tmp_path / "log")
    assert process.wait() == 0, process.log.read_text()
    result = json.loads((base / "base_checkpoints" / "peak" / "result.json").read_text())
    foretold = report(parse_config(FEATURES, argv))["memory"]
    assert all(size > 0 for size in foretold["process"].values())
    assert (foretold["total"] + sum(foretold["process"].values())) / 2**20 == pytest.approx(result["peak_mem_mib"], rel=0.3)


def test_the_forecast_of_a_run_that_grows_counts_its_shallow_steps():
    """A probe is of whole steps: they need the most memory."""
    flags = planned("--depth=4", "--num-iterations=40")
    whole, growing = (parse_config(FEATURES, [*flags, *more]) for more in ([], ["--initial-depth=1", "--depth-growth-frac=0.5"]))
    shape = shape_of(whole)
    share = shallow_share(growing.features["progressive_depth"], shape)
    seconds = [forecast(config, shape, PROBE)["estimated_train_time_sec"] for config in (whole, growing)]
    assert 0.25 < share < 0.6 and seconds[1] == pytest.approx((0.5 + 0.5 * share) * seconds[0])
    trainer = plan_probe.make_trainer(growing, shape)
    assert trainer.state.features.enabled == [] and growing.features["progressive_depth"].initial_depth == 1
    trainer.loader.close()


def test_a_limit_of_time_ends_the_forecast_too():
    config = parse_config(FEATURES, planned("--max-train-seconds=1.25"))
    assert forecast(config, shape_of(config), PROBE)["estimated_train_time_sec"] == 1.25


def test_the_disk_is_that_of_a_real_run(base):
    """9 steps with a checkpoint every 4: two of them and the last one."""
    argv = [*tiny_flags(base, "disk"), "--dtype=float32", "--num-iterations=9", "--save-every=4"]
    run = trained(build_run(parse_config(FEATURES, argv)))
    foretold = report(run.plan.config)["disk"]
    checkpoints = sorted(run.plan.run_dir.glob("step_*"))
    sizes = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in checkpoints]
    assert foretold["checkpoints"] == len(checkpoints) == 3
    assert foretold["checkpoint"] == pytest.approx(max(sizes), rel=0.1) and foretold["total"] == 3 * foretold["checkpoint"]
    assert report(parse_config(FEATURES, [*argv, "--keep-last=1", "--save-every=1"]))["disk"]["checkpoints"] == 3


def test_the_micro_batch_that_fits_is_named(monkeypatch):
    config = parse_config(FEATURES, planned("--device-batch-size=8", "--total-batch-size=512"))
    shape = shape_of(config)
    all_of_it, whole = memory(config, shape), config.horizon.device_batch_size
    assert all_of_it["rows_that_fit"] == whole == 8 and all_of_it["advice"] is None
    short = int(all_of_it["total"] / 1.2)
    monkeypatch.setattr("nanochat.training.explain.host_memory", lambda available: short)
    found = memory(config, shape)
    assert found["rows_that_fit"] in (1, 2, 4) and f"--device-batch-size {found['rows_that_fit']}" in found["advice"]


# ---- the command line

@pytest.mark.parametrize("extra, message", [
    (["--price-per-kwh=0.3"], "--price-per-kwh would do nothing"), (["--watts=0"], "--watts must be positive"),
    (["--no-probe", "--gains"], "--gains would do nothing"), (["--probe-secnds=3"], "did you mean --probe-seconds"),
    (["--depht=3"], "did you mean --depth")])
def test_wrong_flags_of_plan_and_run_are_one_message(extra, message):
    with pytest.raises(UserError, match=message):
        plan.parse_plan([*planned(), *extra])


def test_the_run_that_is_planned_is_the_one_that_base_train_parses():
    argv = planned("--chunked-ce", "--deferred-loss-logging")
    config, flags = plan.parse_plan([*argv, "--watts=9", "--json"])
    assert asdict(config) == asdict(parse_config(FEATURES, argv)) and flags.watts == 9 and flags.json


def test_planning_needs_no_torch():
    code = "import sys, nanochat.training.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
