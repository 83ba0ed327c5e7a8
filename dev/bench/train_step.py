"""How fast is a training step, which share of the machine's matrix rate is that, and where does its time go?

    python -m dev.bench.train_step --preset cpu-d4 --json-out step.json
    python -m dev.bench.train_step --preset cpu-d4 --variants eager compiled parts
    python -m dev.bench.train_step --preset gpu-d12 --with '--chunked-ce' --with '--chunked-ce --fused-rmsnorm'
    python -m dev.bench.train_step --preset cpu-d4 --against 'cd ../other && python train.py' -- --depth 6 --dtype bfloat16

The step is the real one: runs as `scripts.base_train` makes them, on the sources of the running Python, tokenized once under
$NANOCHAT_BASE_DIR/bench. A preset is a file of base_train's flags in configs/ and a few below; the flags after `--` follow them,
and those of each --with come last, so that the last value counts. All timings are interleaved in one process: stretches of five
consecutive steps of each variant (--consecutive), and a plain matrix product of the same dtype, whose best rate is the peak that
the steps are compared with. The device is idle at both ends of a stretch, and inside it only where the run itself waits: so
--deferred-loss-logging, which waits for no step but the last, can show what it saves. Reported are seconds per step.
`hardware` is what bf16 products can reach at most: on a CPU the rate of the matrix instruction repeated on registers, on a GPU
the datasheet's; empty for other dtypes. Model FLOPs are counted as in result.json (6 per matmul parameter, 12 x width x window
for attention); `causal` counts only visible keys. The steps are the first of a run: later phases of a schedule are not measured.

The breakdown comes from torch's profiler, on two more steps of each variant, and from a table of kernel names
(nanochat/benchmarks/profiler.py). Muon and AdamW are everything that runs in their update. Any other kernel is classified by its
name, or the name of the operator around it: matrix products (without casts of weights), attention with all batched products, loss
with its softcap, embedding with lookups and their gradient. `host` is the time in which no kernel runs. Limits of the method:
  - a kernel that the compiler fused from several parts counts whole for the first of loss, attention and embedding in its name,
    else as norms and elementwise: embedding includes gates and norms that were fused with a lookup;
  - one of our own kernels that does more than its products, as attention's do, counts whole for its name;
  - `norms_elementwise` is the rest: norms, rotary positions, residuals, activations, casts, adding gradients;
  - an eager elementwise kernel has the name of its operator, not of its caller: the loss's casts and divisions count there;
  - on a CPU the profiler names compiled kernels on Linux and Windows only: elsewhere they count as host. On Apple GPUs it sees
    none, and there is no breakdown.
"""

import os
import re
import shlex
import statistics
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from nanochat.benchmarks.flags import OutputFlags
from nanochat.benchmarks.profiler import breakdown, label_updates
from nanochat.benchmarks.result_file import make_result, write_json
from nanochat.benchmarks.yardsticks import external_rate, make_gemm, make_instruction_loop
from nanochat.cli.flag_files import CONFIGS
from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import UserError, format_table, get_base_dir
from nanochat.features import FEATURES
from nanochat.recipe.depth_growth import initial_shape
from nanochat.recipe.shape import flops_per_token
from nanochat.runtime import timing
from nanochat.runtime.other_load import OtherLoad, spoilt_warning
from nanochat.training.config import Config, DeviceFlags, parse_config

if TYPE_CHECKING:
    import torch

STEP = "--num-iterations=1000 --data=python --max-chars=8000000 --initial-depth=0"  # all blocks from the first step on
CPU, GPU = (f"{STEP} --vocab-size=4096 --total-batch-size=16384", f"{STEP} --vocab-size=32768 --total-batch-size=524288")
PRESETS = {  # behind the flags of configs/NAME.flags
    "cpu-d4": CPU, "cpu-d6": CPU, "gpu-d12": f"{GPU} --device-batch-size=16", "gpu-d24": GPU,
}
VARIANTS = {"compiled": "", "eager": "--no-compile", "parts": "--compile-parts"}  # flags
CONSECUTIVE = 5  # steps of a stretch: enough that the wait at its end is a small part of what waiting after each step costs
TAKES_FLAGS = ("--with", "--against", "--against-regex")  # their values may begin with a dash


@dataclass
class BenchFlags(OutputFlags, DeviceFlags):
    """The bench; base_train's flags go after --"""
    preset: str = flag("cpu-d4", "shape and batch", choices=tuple(PRESETS))
    variants: list[str] = flag(["compiled"], "how the step is run", choices=tuple(VARIANTS))
    with_flags: list[str] = flag([], "add a variant: compiled, with these flags of base_train; may be repeated",
                                 aliases=("--with",), metavar="FLAGS")
    repeats: int = flag(5, "stretches of steps counted per variant, and per round under --against", low=1)
    consecutive: int = flag(CONSECUTIVE, "steps of a stretch, at whose ends alone the device has to be idle", low=1)
    against: str | None = flag(None, "another trainer's command line, run whole, interleaved with our steps", metavar="COMMAND")
    against_regex: str = flag(r"tok/sec: ([\d,.]+)", "finds the tokens/s in its output, as the one group", metavar="REGEX")
    against_skip: int = flag(3, "how many of these at the beginning do not count", low=0)
    rounds: int = flag(3, "rounds under --against, with one run of it in each", low=1)

    def validate(self) -> list[str]:
        problems = super().validate()
        try:
            if re.compile(self.against_regex).groups != 1:
                problems.append(f"--against-regex needs one group, around the number, got {self.against_regex!r}")
        except re.error as e:
            problems.append(f"--against-regex {self.against_regex!r} is no regular expression: {e}")
        return problems


def parse_command(argv: list[str]) -> tuple[BenchFlags, dict[str, Config]]:
    """The bench's flags, and the run of each variant by name. UserError as for base_train's own command line."""
    own, run_flags = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    for i in reversed(range(len(own) - 1)):
        if own[i] in TAKES_FLAGS:  # argparse would take a value like --chunked-ce for one of our flags
            own = [*own[:i], f"{own[i]}={own[i + 1]}", *own[i + 2:]]
    flags, = parse([BenchFlags], own, prog="python -m dev.bench.train_step")
    preset = [f"@{CONFIGS / flags.preset}.flags", *PRESETS[flags.preset].split()]
    base = [*preset, f"--device-type={flags.device_type}", f"--dtype={flags.dtype}", *run_flags]
    wanted, configs = {name: VARIANTS[name] for name in flags.variants} | {text: text for text in flags.with_flags}, {}
    for i, (name, more) in enumerate(wanted.items()):
        try:
            configs[name] = parse_config(FEATURES, [*base, *shlex.split(more), f"--model-tag=train_step_{i}"])
            configs[name].horizon.auto_batch = False  # of a profile: variants are compared on the same micro-batches
        except (UserError, ValueError) as e:  # ValueError: quotes that do not close
            raise UserError(f"{name}: {e}") from None
    return flags, configs


class Variant:
    """A trainer, without the lock, folder and records of a run, that has taken the two steps which do what is done only once.
    Called, it takes another step, as nanochat/training/loop.py does: of a run with --deferred-loss-logging, the step before is
    read when this one has been launched, and this one stays pending.

    losses: of the steps that have been read, in nats.
    """

    def __init__(self, config: Config, base_dir):
        import torch

        from nanochat.training.build import build_trainer_only
        held = torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0  # by the variants before this one
        # a tokenizer of its own for each size of vocabulary
        os.environ["NANOCHAT_BASE_DIR"] = str(base_dir / "bench" / f"vocabulary_{config.data.vocab_size}")
        self.trainer, self.pending, self.losses = build_trainer_only(config), None, []
        os.environ["NANOCHAT_BASE_DIR"] = str(base_dir)  # for the other trainer
        label_updates(self.trainer.state.optimizer)
        for _ in range(2):
            self()
        self.finish()
        self.peak_mem_mib = self.result.peak_memory_mib - held / 2**20

    def __call__(self) -> None:
        launched = self.trainer.launch_step()
        self.finish()
        self.pending = launched
        if not self.trainer.plan.config.run.deferred_loss_logging:
            self.finish()

    def stretch(self, steps: int) -> None:
        """Take consecutive steps, and read the results of all of them."""
        for _ in range(steps):
            self()
        self.finish()

    def finish(self) -> None:
        """Read the results of the last step, if that has not been done."""
        if self.pending:
            self.result, self.pending = self.trainer.finalize_step(self.pending), None
            self.losses.append(self.result.loss)
            self.trainer.state.features.after_step(self.result.step, self.result.loss, self.result.time)


def measure(flags: BenchFlags, configs: dict[str, Config]) -> tuple[dict, "torch.device"]:
    """The `results` of the bench's JSON, by variant, and the device."""
    import torch

    from nanochat.runtime.compute_dtype import dtype_name
    from nanochat.runtime.device import peak_flops as datasheet_peak
    torch._inductor.config.cpp.enable_kernel_profile = True  # names a CPU's compiled kernels; asks for new graphs
    base_dir, variants, rounds = get_base_dir(), {}, []
    for name, config in configs.items():
        variants[name] = Variant(config, base_dir)
    first = next(iter(variants.values())).trainer
    device = first.plan.device
    # so large that the rate no longer grows, so many that the launch does not matter
    size, products = ((8192, 8192, 4096), 16) if device.type == "cuda" else ((4096, 4096, 1024), 2)
    peak_call, peak_flops = make_gemm(device, first.plan.dtype, *size)
    calls = {name: partial(variant.stretch, flags.consecutive) for name, variant in variants.items()}
    calls["gemm"] = lambda: [peak_call() for _ in range(products)]
    instruction = make_instruction_loop(first.plan.dtype) if device.type == "cpu" else None
    if instruction:
        calls["instruction"] = instruction[0]
    times, load = {name: [] for name in calls}, OtherLoad()
    for _ in range(flags.rounds if flags.against else 1):
        if flags.against and device.type == "cuda":
            torch.cuda.empty_cache()  # the other trainer takes the memory that ours keeps for its next step
        theirs = external_rate(flags.against, flags.against_regex, flags.against_skip) if flags.against else None
        now = timing.time_in_turn(calls, device, flags.repeats, warmup=1)
        for name in variants:
            now[name] = [seconds / flags.consecutive for seconds in now[name]]
        rounds.append((theirs, {name: statistics.median(spent) for name, spent in now.items()}))
        for name, spent in now.items():
            times[name] += spent
    peak, results, others = products * peak_flops / min(times.pop("gemm")), {}, load.share()
    hardware = datasheet_peak(device) if first.plan.dtype == torch.bfloat16 else None  # the datasheet's is of bf16
    if instruction:
        hardware = instruction[1] / min(times.pop("instruction"))
    for name, variant in variants.items():
        plan = variant.trainer.plan
        tokens, shape = plan.horizon.total_batch_size, initial_shape(plan.config.features["progressive_depth"], plan.shape)
        seconds = timing.spread(times[name])
        rate = tokens / seconds["median"]
        parts, unknown = breakdown(variant, device, seconds["median"]) if device.type != "mps" else (None, None)
        results[name] = {
            "tok_per_sec_median": rate,
            "model_flops_per_sec": rate * flops_per_token(shape),
            "gemm_peak_flops_per_sec": peak, "hardware_peak_flops_per_sec": hardware,
            "gemm_peak_share": rate * flops_per_token(shape) / peak,
            "gemm_peak_share_causal": rate * flops_per_token(shape, causal=True) / peak,
            # on a CPU the peak is the process's and never falls, so it is known for the first variant only
            "peak_mem_mib": variant.peak_mem_mib if device.type == "cuda" or variant.trainer is first else None,
            "other_programs_share": others,  # of all cores' time while this was timed
            "seconds": seconds, "breakdown_ms": parts, "breakdown_unknown": unknown,
            "tokens_per_step": tokens, "rows": plan.micro_batch_size,
            "micro_batches": plan.horizon.grad_accum_steps, "dtype": dtype_name(plan.dtype),
            "compiled": plan.compile and not variant.trainer.forward.eager_fallbacks,
        }
        if flags.against:
            pairs = [(tokens / ours[name], theirs) for theirs, ours in rounds]
            ratios = [ours / theirs for ours, theirs in pairs]
            results[name]["against"] = {"tok_per_sec": [{"ours": ours, "theirs": theirs} for ours, theirs in pairs],
                                        "ratios": ratios, "ratio_median": statistics.median(ratios)}
        variant.trainer.loader.close()
    return results, device


def show(results: dict) -> None:
    """The tables."""
    print(format_table([{
        "variant": name, "tok/s": round(r["tok_per_sec_median"]), "step ms": round(1000 * r["seconds"]["median"], 1),
        "GFLOP/s": round(r["model_flops_per_sec"] / 1e9), "GEMM peak": round(r["gemm_peak_flops_per_sec"] / 1e9),
        "hardware": (peak := r["hardware_peak_flops_per_sec"]) and round(peak / 1e9),
        "share": round(r["gemm_peak_share"], 3), "causal": round(r["gemm_peak_share_causal"], 3),
        "MiB": r["peak_mem_mib"] and round(r["peak_mem_mib"]), "n": r["seconds"]["n"]} for name, r in results.items()]))
    if warning := spoilt_warning(next(iter(results.values()))["other_programs_share"]):
        print(warning)
    rows = []
    for name, r in results.items():
        if parts := r["breakdown_ms"]:
            parts = parts | {"sum": sum(parts.values())}
            for unit, scale in ((f"{name}, ms", 1), (f"{name}, %", 100 / parts["sum"])):
                rows.append({"part": unit} | {part: round(ms * scale, 1) for part, ms in parts.items()})
    if rows:
        print("\n" + format_table(rows))
    for name, r in results.items():
        if r["breakdown_unknown"]:
            print(f"{name}: other is {', '.join(r['breakdown_unknown'][:8])}")
    for name, r in results.items():
        if against := r.get("against"):
            ratios, pairs = against["ratios"], against["tok_per_sec"]
            print(f"\n{name} against the other trainer\n" + format_table([
                {"round": i + 1, "ours": round(pair["ours"]), "theirs": round(pair["theirs"]), "ratio": round(ratio, 3)}
                for i, (pair, ratio) in enumerate(zip(pairs, ratios, strict=True))]))
            print(f"ratio: median {against['ratio_median']:.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


def main() -> None:
    flags, configs = parse_command(sys.argv[1:])
    started = time.monotonic()
    with redirect_stdout(sys.stderr):  # the output of the runs
        results, device = measure(flags, configs)
    show(results)
    config = vars(flags) | {"runs": {name: config.flat() for name, config in configs.items()}}
    write_json(flags.json_out, make_result("dev/bench/train_step.py", device, config, results, time.monotonic() - started))


if __name__ == "__main__":
    cli(main)
