"""How fast are evaluation and sampling, against training and against the memory that the weights are read from?

    python -m dev.bench.inference --preset cpu-d4 --json-out inference.json -- --chunked-ce

The model is that of `dev.bench.train_step`, untrained: the time does not depend on its weights. All timings are interleaved.

Evaluation is a micro-batch's loss without gradients, as in training's evaluations; `PyTorch's` has the reference kernels but for
attention. A training step is three times the products of an evaluation and the optimizer's update, so evaluation should reach
three times the tokens per second or more.

Sampling is one token at a time, one row, up to half of the context: as the model is built, and as scripts.sample prepares it.
Each token reads all weights once. The limit is how long it takes to read so many bytes: the sum of a tensor of that size. Small
weights stay in the caches, and then Python and the calls are what takes the time.
"""

import statistics
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dev.bench import train_step
from nanochat.benchmarks.flags import OutputFlags
from nanochat.benchmarks.result_file import make_result, write_json
from nanochat.cli.flag_files import CONFIGS
from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import format_table, get_base_dir
from nanochat.features import FEATURES
from nanochat.runtime.other_load import OtherLoad, spoilt_warning
from nanochat.training.config import Config, DeviceFlags, parse_config

if TYPE_CHECKING:
    import torch


@dataclass
class BenchFlags(OutputFlags, DeviceFlags):
    """The bench; base_train's flags go after --"""
    preset: str = flag("cpu-d4", "shape and batch", choices=tuple(train_step.PRESETS))
    repeats: int = flag(7, "timings of each, interleaved", low=1)


def parse_command(argv: list[str]) -> tuple[BenchFlags, Config]:
    own, run_flags = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    flags, = parse([BenchFlags], own, prog="python -m dev.bench.inference")
    return flags, parse_config(FEATURES, [
        f"@{CONFIGS / flags.preset}.flags", *train_step.PRESETS[flags.preset].split(), f"--device-type={flags.device_type}",
        f"--dtype={flags.dtype}", *run_flags, "--model-tag=inference"])


class Sampling:
    """Called, it takes one more token of one row, by a model of its own."""

    def __init__(self, plan, prepared: bool):
        from nanochat.checkpoint_manager import build_model
        from nanochat.engine import KVCache, prepare_for_inference
        self.model = build_model(plan.shape, plan.dtype, plan.device).eval()
        if prepared:
            prepare_for_inference(self.model)
        self.cache = KVCache.for_model(self.model, 1, plan.shape.sequence_len)
        self.bytes = sum(layer.weight.numel() for layer in self.model.linears().values()) * plan.dtype.itemsize

    def __call__(self) -> None:
        import torch
        if self.cache.pos >= self.cache.seq_len // 2:
            self.cache.reset()
        with torch.no_grad():
            self.model(torch.zeros((1, 1), dtype=torch.int64, device=self.model.get_device()), kv_cache=self.cache).argmax()


def measure(flags: BenchFlags, config: Config) -> tuple[dict, list[dict], "torch.device"]:
    """The results by what was timed, rows for the table, and the device."""
    import torch

    from nanochat.gpt import Kernels
    from nanochat.runtime import timing
    from nanochat.runtime.device import evaluation
    step = train_step.Variant(config, get_base_dir())
    plan, model = step.trainer.plan, step.trainer.state.model
    x, y = step.trainer.loader.next()
    chosen = dict(vars(model.kernels))
    plain = vars(Kernels(attention=model.kernels.attention))

    def evaluate(kernels):
        def call():
            vars(model.kernels).update(kernels)
            with evaluation(model):
                model(x, y, loss_reduction="none")
            vars(model.kernels).update(chosen)
        return call
    as_built, prepared = Sampling(plan, prepared=False), Sampling(plan, prepared=True)
    weights = torch.ones(prepared.bytes // 4, device=plan.device)
    calls = {"training step": step, "evaluation, PyTorch's": evaluate(plain), "evaluation": evaluate(chosen),
             "sampling, as built": as_built, "sampling": prepared, "reading the weights": weights.sum}
    tokens = {"training step": plan.horizon.total_batch_size, "evaluation, PyTorch's": x.numel(), "evaluation": x.numel()}
    load = OtherLoad()
    times = timing.time_in_turn(calls, plan.device, flags.repeats, at_least=0.1)
    step.finish()
    step.trainer.loader.close()
    rates = {name: tokens.get(name, 1) / statistics.median(spent) for name, spent in times.items()}
    results = {name: {"tok_per_sec": rates[name], "seconds": timing.spread(times[name]), "tokens": tokens.get(name, 1)}
               for name in calls} | {"weights_bytes": prepared.bytes, "other_programs_share": load.share()}
    rows = [{"what": name, "tok/s": round(rate),
             "over training": round(rate / rates["training step"], 2) if name in tokens else None,
             "of the limit": None if name in tokens else round(rate / rates["reading the weights"], 3), "n": len(times[name])}
            for name, rate in rates.items()]
    return results, rows, plan.device


def main() -> None:
    flags, config = parse_command(sys.argv[1:])
    started = time.monotonic()
    with redirect_stdout(sys.stderr):  # the output of the runs
        results, rows, device = measure(flags, config)
    print(format_table(rows))
    if warning := spoilt_warning(results["other_programs_share"]):
        print(warning)
    write_json(flags.json_out, make_result("dev/bench/inference.py", device, vars(flags) | {"run": config.flat()}, results,
                                           time.monotonic() - started))


if __name__ == "__main__":
    cli(main)
