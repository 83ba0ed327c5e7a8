"""What a run will take, from what was measured of its steps on this machine before (plan_cache.py). No torch."""

from nanochat.recipe.depth_growth import mean_cost
from nanochat.recipe.shape import GPTConfig
from nanochat.training import plan_cache
from nanochat.training.config import Config
from nanochat.training.explain import process_memory
from nanochat.training.plan_cache import Probe

PARTS = ("train", "eval", "compile", "save")  # of the time of the training loop


def forecast(config: Config, shape: GPTConfig, probe: Probe) -> dict:
    """What a run of these flags will take on the machine of the probe, on one device, from its first step to its last: seconds by
    part and in total, and peak memory."""
    horizon = config.plan(shape)
    step = probe.step_sec(horizon.total_batch_size // shape.sequence_len)
    steps, depth = horizon.num_iterations, config.features["progressive_depth"]
    # a probe is of whole steps, a run of its own mixture
    train, limit = steps * step * (1.0 if probe.run else mean_cost(depth, shape)), config.run.max_train_seconds
    evaluations, rows = plan_cache.evaluations(config, shape), -(-plan_cache.evaluated_tokens(config) // shape.sequence_len)
    seconds = {"train": min(train, limit) if limit > 0 else train,
               "eval": evaluations * rows / probe.rows * probe.eval_micro_batch_sec,
               "compile": probe.compile_sec, "save": plan_cache.saves(config, shape) * probe.save_sec}
    return {
        "step_sec": step, "tok_per_sec": horizon.total_batch_size / step,
        **{f"estimated_{part}_time_sec": seconds[part] for part in PARTS}, "estimated_time_sec": sum(seconds.values()),
        "estimated_peak_mem_mib": sum(peak_memory(config, shape, probe).values()),
    }


def peak_memory(config: Config, shape: GPTConfig, probe: Probe) -> dict[str, float]:
    """The peak memory of a run in MiB, by origin: what the probe took, and what a run of these flags holds besides. A probe that
    is a run holds all of it."""
    found = {"steps": probe.peak_mem_mib if plan_cache.evaluations(config, shape) else probe.step_peak_mem_mib}
    if not probe.run and probe.device_type == "cpu":
        found |= {name: size / 2**20 for name, size in process_memory(config, shape).items() if name != "program"}
    return found


def forecast_for_result(config: Config, shape: GPTConfig) -> dict | None:
    """The `plan` of result.json: what the kept probe of these flags foretells; None where there is none."""
    if not (probe := plan_cache.kept_probe(config, shape)):
        return None
    found = forecast(config, shape, probe)
    return {name: value for name, value in found.items() if name.startswith("estimated_")}
