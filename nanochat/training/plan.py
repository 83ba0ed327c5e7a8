"""The plan of a run, for `python -m scripts.plan`: what `--explain` computes, and what has to be measured on this machine. No
torch: the measuring is done in other processes (plan_probe.py)."""

import json
import sys
from dataclasses import dataclass

from nanochat.cli.flags import above, flag
from nanochat.common import UserError, format_duration, format_table
from nanochat.features import FEATURES, Feature
from nanochat.recipe.memory_estimate import estimate_memory
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.other_load import SPOILT, spoilt_warning
from nanochat.training import plan_cache, plan_probe
from nanochat.training.config import Config, parse_config
from nanochat.training.explain import as_text, lines, memory_config, report, size_text, vocabulary
from nanochat.training.forecast import forecast, peak_memory
from nanochat.training.plan_cache import Probe
from nanochat.training.plan_probe import NotMeasured

CANDIDATES = ("--chunked-ce", "--recompute-activations", "--cast-once", "--compile-parts", "--bf16-momentum", "--fused-rmsnorm",
              "--fp8")  # flags that --gains tries; --deferred-loss-logging acts between steps, which a probe does not time
FOR_GPUS = ("--fused-rmsnorm",)  # of these, those that are accepted elsewhere and do nothing
TIE = 0.01  # share of a step's time that counts as no difference


class Plan(Feature):
    """The flags of scripts.plan itself, which are parsed together with those of base_train. It switches nothing on."""
    name = "plan"

    @dataclass
    class Config:
        """The plan: what base_train would take here with the flags above and below"""
        probe: bool = flag(True, "take steps to measure the time; --no-probe only computes, as base_train --explain does")
        probe_seconds: float = flag(10.0, "measure for about so long, building and compiling the model not counted", low=0.01,
                                    high=3600, requires={"probe": True})
        probe_again: bool = flag(False, "measure, also where the time of such steps is known from an earlier plan",
                                 requires={"probe": True})
        gains: bool = flag(False, "also measure what each optimization flag would gain here: about a minute a flag",
                           requires={"probe": True})
        watts: float = flag(-1.0, "the power that the machine draws while it trains, for the energy", requires={"probe": True})
        price_per_kwh: float = flag(-1.0, "of energy, in any currency, for the cost", requires={"watts": above(0)})
        json: bool = flag(False, "print JSON: bytes, seconds, kWh")

    @classmethod
    def enabled(cls, config) -> bool:
        return False

    @classmethod
    def validate(cls, config) -> list[str]:
        flags = config.features[cls.name]
        return [f"--{name} must be positive, got {value:g}" for name, value in
                (("watts", flags.watts), ("price-per-kwh", flags.price_per_kwh)) if value != -1 and value <= 0]


def parse_plan(argv: list[str], prog: str | None = None) -> tuple[Config, Plan.Config]:
    """The run that is planned, as base_train would parse it, and the flags of the plan. Raises: UserError."""
    config = parse_config((*FEATURES, Plan), argv, prog, "What would a run need and take here? It trains nothing.")
    return config, config.features.pop(Plan.name)


def probe_of(config: Config, shape: GPTConfig, flags: Plan.Config) -> tuple[Probe | None, str | None]:
    """The kept or a new probe, or None and why there is none."""
    if not flags.probe:
        return None, "--no-probe"
    if not flags.probe_again and (kept := plan_cache.kept_probe(config, shape)):
        return kept, None
    say(f"measuring steps for about {flags.probe_seconds:g} s, after the model is built" + " and compiled" * config.run.compile)
    try:
        probe = plan_probe.measure(config, shape, flags.probe_seconds)
    except NotMeasured as e:
        return None, str(e)
    plan_cache.keep(config, shape, probe)
    return probe, None


def expected(config: Config, shape: GPTConfig, probe: Probe, flags: Plan.Config) -> dict:
    """For JSON: the forecast of the run; energy and cost where their flags are given."""
    found = forecast(config, shape, probe)
    if flags.watts > 0:
        found["energy_kwh"] = flags.watts * found["estimated_time_sec"] / 3.6e6
    if flags.price_per_kwh > 0:
        found["cost"] = flags.price_per_kwh * found["energy_kwh"]
    return found


def gains(argv: list[str], config: Config, shape: GPTConfig, seconds: float, device_type: str) -> list[dict]:
    """What each of CANDIDATES would gain, for JSON. `speedup` (a spread, see runtime/timing.py) is None where a note says why."""
    found = []
    for name in CANDIDATES:
        row: dict = {"flag": name, "speedup": None, "estimated_memory": None, "note": None}
        try:
            candidate, _ = parse_plan([*argv, name])
            if candidate.flat() == config.flat():
                row["note"] = "already on"
            elif name in FOR_GPUS and device_type != "cuda":
                row["note"] = "for NVIDIA GPUs"
            else:
                row["estimated_memory"] = estimate_memory(shape, config.horizon.device_batch_size, memory_config(candidate)).total
                say(f"measuring {name}")
                row["speedup"] = plan_probe.measure_gain(config, candidate, shape, seconds)
        except (UserError, NotMeasured) as e:
            row["note"] = " ".join(str(e).split())
        found.append(row)
    return found


# ---- text and JSON

def measured_text(config: Config, shape: GPTConfig, probe: Probe, found: dict, flags: Plan.Config) -> str:
    """Probe and forecast as aligned lines."""
    evaluation, saves = found["estimated_eval_time_sec"], plan_cache.saves(config, shape)
    parts = [f"{size:,.0f} {name}" for name, size in peak_memory(config, shape, probe).items() if size]
    facts = {
        "measured": f"{probe.steps:,} steps{f' of the run {probe.run}' if probe.run else ''} on {probe.device}, {probe.dtype}, "
                    f"{'' if probe.compiled else 'not '}compiled ({probe.date}; --probe-again measures anew)",
        "micro-batch": f"{probe.rows} rows" + (f": more than that of at most {config.horizon.device_batch_size} need more than "
                                               f"{size_text(probe.memory_limit)}"
                                               if probe.rows < config.horizon.device_batch_size else ""),
        "step": f"{1000 * found['step_sec']:,.4g} ms, its quartiles {probe.spread:.0%} apart",
        "tokens per second": f"{found['tok_per_sec']:,.0f}",
        "training time": format_duration(found["estimated_train_time_sec"]),
        "evaluation time": f"at most {format_duration(evaluation)}, in bits per byte; CORE and samples are not counted"
                           if evaluation else "none: --eval-every",
        "compilation": f"{format_duration(found['estimated_compile_time_sec'])} when this was measured; less where graphs are "
                       "kept from before" if probe.compiled else "none",
        "saving": f"at most {format_duration(found['estimated_save_time_sec'])}, for {saves:,} checkpoint{'s' * (saves > 1)}",
        "time in total": f"about {format_duration(found['estimated_time_sec'])}, from the first step on; reading text is before",
        "peak memory": f"{found['estimated_peak_mem_mib']:,.0f} MiB" + (", of the process" if probe.device_type == "cpu" else "")
                       + (f": {', '.join(parts)}" if len(parts) > 1 else ""),
    }
    if "energy_kwh" in found:
        facts["energy"] = f"{found['energy_kwh']:.3g} kWh at {flags.watts:g} W"
    if "cost" in found:
        facts["cost"] = f"{found['cost']:.3g} at {flags.price_per_kwh:g} per kWh"
    notes = [spoilt_warning(probe.other_load)]
    if plan_cache.steps_differ(config) and not probe.run:
        notes.append("note: the steps of this schedule differ. Those that run and train all blocks were measured")
    return "\n".join([lines(facts), *filter(None, notes)])


def gains_text(found: list[dict], now: int) -> str:
    """The gains as a table. now: estimated bytes of memory without the flag."""
    rows = []
    for row in found:
        spread, size = row["speedup"], row["estimated_memory"]
        rows.append({"flag": row["flag"], "times as fast": spread and f"{spread['median']:.3f}",
                     "quartiles": spread and f"{spread['q1']:.3f} to {spread['q3']:.3f}", "rounds": spread and spread["n"],
                     "memory": size and f"{size / now:.2f} of {size_text(now)}", "": row["note"] or verdict(spread)})
    table = format_table([{name: "" if value is None else value for name, value in row.items()} for row in rows])
    loads = [row["speedup"]["other_load"] or 0.0 for row in found if row["speedup"]]
    return "\n".join(filter(None, [table, spoilt_warning(max(loads, default=None))]))


def verdict(spread: dict) -> str:
    """Whether the middle half of the rounds lies on one side, by more than noise is."""
    if (spread["other_load"] or 0.0) > SPOILT:
        return "not clear: other programs ran"
    return "faster" if spread["q1"] > 1 + TIE else "slower" if spread["q3"] < 1 - TIE else "no clear difference"


def say(text: str) -> None:
    """What is going on, beside the output that the user may keep."""
    print(text, file=sys.stderr, flush=True)


def show_plan(argv: list[str], prog: str | None = None) -> None:
    """Print the plan of a command line: each part as soon as it is known, or all of it as JSON. Raises: UserError."""
    config, flags = parse_plan(argv, prog)
    shape, found = config.model.shape(vocabulary(config)[0]), report(config)

    def show(text: str) -> None:
        if not flags.json:
            print(text, flush=True)
    show(as_text(found, config))
    probe, why_not = probe_of(config, shape, flags)
    found |= {"probe": probe and vars(probe), "not_measured": why_not, "expected": None, "gains": None}
    if probe:
        found["expected"] = expected(config, shape, probe, flags)
        show("\n" + measured_text(config, shape, probe, found["expected"], flags))
    else:
        show(f"\nnot measured: {why_not}")
    if probe and flags.gains:
        found["gains"] = gains(argv, config, shape, flags.probe_seconds, probe.device_type)
        show("\n" + gains_text(found["gains"], found["memory"]["total"]))
    if flags.json:
        print(json.dumps(found, indent=1))
