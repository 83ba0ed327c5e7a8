"""What dev/bench/on_gpu.py asks of a GPU, a program for each question, so that a crash costs one answer.

    python -m dev.bench.gpu_numbers --part machine --json-out machine.json
    python -m dev.bench.gpu_numbers --part training --run-flags=--fp8 --against plain.json --json-out fp8.json

| part | question |
| --- | --- |
| machine | which card, driver and versions are these, and do compiler, Triton and FP8 units work? |
| ceilings | how fast are a copy, a bf16 product and an FP8 product, and are the products right? |
| attention | which attention backends work, how fast are they on a d12 and a d24, and why do the others not? |
| training | what are the losses of 20 steps, of one variant; graphs, memory, time |

The exit status is 1 where the facts hold a `problem`. --tiny asks the same of a CPU in seconds, with FP8 emulated.
"""

import platform
import shlex
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from dev.bench import train_step
from nanochat.benchmarks.flags import OutputFlags
from nanochat.benchmarks.result_file import make_result, write_json
from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.common import format_table, get_base_dir, resolve
from nanochat.recipe.memory_estimate import estimate_memory
from nanochat.recipe.shape import shape_of_depth, window_sizes
from nanochat.runtime.files import read_json

if TYPE_CHECKING:
    import torch

SCRIPT = "dev/bench/gpu_numbers.py"
STEPS = 20
LOSS_TOLERANCE = 1e-2    # nats that a variant's loss of a step may be away from the plain run's
MEMORY_TOLERANCE = 0.05  # relative distance of the peak from the planner's estimate, which docs/devices.md gives as 4 %
BF16_ROUNDING = 2.0**-9  # largest relative error of rounding to bf16, and so of a whole tensor in the Euclidean norm
FAST_BITS, FAST_TERMS = 13, 32  # fast accumulation on Hopper: bits that a sum keeps, products that one instruction adds
PACKAGES = ("triton", "kernels", "flash-attn-4", "torchao", "numpy")
# The tiny run: configs/cpu-smoke.flags, so small that 20 steps take a second
TINY = ("--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=64 --vocab-size=512 --device-batch-size=8 "
        "--total-batch-size=512 --max-chars=400000 --no-compile --dtype=float32").split()
TINY_FP8 = "--fp8 --fp8-emulate --fp8-min-dim=16"


@dataclass
class PartFlags(OutputFlags):
    """The question"""
    part: str = flag("machine", "which", choices=("machine", "ceilings", "attention", "training"))
    tiny: bool = flag(False, "ask the CPU, with tiny tensors and FP8 emulated")
    rows: int = flag(8, "rows of a micro-batch", low=1)
    run_flags: str = flag("", "training: flags of base_train, of the variant", metavar="FLAGS")
    against: str | None = flag(None, "training: the result of the plain run, whose losses these should be", metavar="JSON")


def bench_flags(tiny: bool, rows: int, preset: str = "gpu-d12") -> list[str]:
    """Arguments of dev.bench.train_step: a d12 with 131 072 tokens per step, whose flags come after `--`; or the tiny run."""
    if tiny:
        return ["--preset=cpu-d4", "--device-type=cpu", "--", *TINY]
    return [f"--preset={preset}", "--device-type=cuda", "--", "--total-batch-size=131072", f"--device-batch-size={rows}"]


# --- machine ----------------------------------------------------------------------------------------------------------

def machine(flags: PartFlags, device: "torch.device") -> dict:
    """Versions, the card, and what works on it."""
    import torch

    from nanochat.fp8 import fp8_unavailable_reason
    from nanochat.runtime.compilation import compile_unavailable_reason
    from nanochat.runtime.device import device_name, peak_flops
    from nanochat.runtime.toolchain import triton_unavailable_reason
    facts = {"device": device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda,
             "python": platform.python_version(), "system": platform.platform(), "cores": torch.get_num_threads(),
             "packages": {name: installed(name) for name in PACKAGES}, "peak_flops": peak_flops(device),
             "fp8_unavailable": fp8_unavailable_reason(device)}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts |= {"capability": list(torch.cuda.get_device_capability(device)), "processors": card.multi_processor_count,
                  "memory_free": free, "memory_total": total, "cudnn": torch.backends.cudnn.version(), **nvidia_smi(device)}
    facts["compile_unavailable"] = compile_unavailable_reason(device)
    facts["triton_unavailable"] = triton_unavailable_reason() if device.type == "cuda" else "no GPU"
    troubles = [facts["compile_unavailable"], facts["triton_unavailable"]] if device.type == "cuda" else []
    return facts | {"problem": "; ".join(trouble for trouble in troubles if trouble) or None}


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def nvidia_smi(device: "torch.device") -> dict:
    """Driver, power limit and clocks as nvidia-smi gives them; {} where there is no such program."""
    names = "driver_version", "power.limit", "clocks.max.sm", "clocks.sm", "temperature.gpu"
    if not shutil.which("nvidia-smi"):
        return {}
    done = subprocess.run(["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],
                          capture_output=True, text=True, timeout=20)
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


# --- ceilings ---------------------------------------------------------------------------------------------------------

def ceilings(flags: PartFlags, device: "torch.device") -> dict:
    """Rates of a copy and of products, and the errors of the products against float64."""
    import torch

    from nanochat.fp8 import fp8_unavailable_reason
    from nanochat.runtime.tuner import measure
    n, m, k = (2**20, 256, 512) if flags.tiny else (2**29, 8192, 4096)  # elements that are copied, sizes of the products
    source, target = (torch.zeros(n, dtype=torch.bfloat16, device=device) for _ in range(2))
    seconds = measure({"copy": lambda: target.copy_(source)}, device)["copy"]
    facts, problems = {"copy_gb_per_sec": 4 * n / seconds / 1e9, "products": {}}, []
    emulated = fp8_unavailable_reason(device)
    for name in ("bf16", "fp8", "fp8, fast accumulation"):
        if name != "bf16" and emulated and not flags.tiny:
            facts["products"][name] = {"unavailable": emulated}
            continue
        call, exact, bound = product(name, m, k, device)
        error = ((call()[:len(exact)].double() - exact).norm() / exact.norm()).item()
        facts["products"][name] = {"tflop_per_sec": 2 * m * m * k / measure({name: call}, device)[name] / 1e12,
                                   "relative_error": error, "bound": bound, "m": m, "n": m, "k": k}
        if not error <= bound:
            problems.append(f"the product in {name} is wrong: its relative error against float64 is {error:.2g}, and "
                            f"{bound:.2g} is rounding")
    return facts | {"problem": "; ".join(problems) or None}


def product(name: str, m: int, k: int, device: "torch.device"):
    """A product (m, k) x (k, m) with its result in bf16: the call, the first rows of the exact result in float64, and the largest
    relative error that is rounding."""
    import torch

    from nanochat.fp8 import E4M3, scaled_mm
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(m, k, generator=random).to(device) for _ in range(2))
    if name == "bf16":
        a, b = a.bfloat16(), b.bfloat16()
        call, factor, bound = partial(torch.matmul, a, b.t()), 1.0, 2 * BF16_ROUNDING
    else:
        fast = name != "fp8"
        (a, inverse_a), (b, inverse_b) = (((x * (448 / x.abs().max())).to(E4M3), x.abs().max() / 448) for x in (a, b))
        call = partial(scaled_mm, a, b.t(), inverse_a, inverse_b, torch.bfloat16, fast_accum=fast)
        factor = inverse_a.double() * inverse_b.double()
        # each addition may drop what is below the last bit of the sum: a chain of them, at worst all in one direction
        bound = 2 * BF16_ROUNDING + (k / FAST_TERMS * 2.0**-FAST_BITS if fast else 0.0)
    return call, a[:512].double() @ b.double().t() * factor, bound


# --- attention --------------------------------------------------------------------------------------------------------

def attention(flags: PartFlags, device: "torch.device") -> dict:
    """Every backend on the shapes of a d12 and a d24, with full context and with the window of S layers: milliseconds of forward
    and backward, or the reason why it does not work; and the one that a run takes."""
    import torch

    from nanochat.flash_attention import BACKENDS, FULL, backend_unavailable_reason, make_attention
    from nanochat.runtime.compute_dtype import pick_compute_dtype
    from nanochat.runtime.tuner import Tuner, measure
    dtype, _ = pick_compute_dtype(device)
    shapes = {"tiny": (shape_of_depth(2, 16, 16, sequence_len=256), 2)} if flags.tiny else {
        "d12": (shape_of_depth(12), flags.rows), "d24": (shape_of_depth(24), max(1, flags.rows // 2))}
    backends, chosen, problems = [], {}, []
    for model, (shape, rows) in shapes.items():
        T, heads, D = shape.sequence_len, shape.n_head, shape.head_dim
        auto = make_attention(device, dtype, D, T, window_sizes(shape), rows=rows, heads=heads, tuner=Tuner(device, folder=None))
        chosen[model] = auto.names()
        random = torch.Generator().manual_seed(0)
        *inputs, grad = (torch.randn(rows, T, heads, D, generator=random).to(device, dtype) for _ in range(4))
        inputs = [x.requires_grad_() for x in inputs]

        def training_call(name, window, inputs=inputs, grad=grad):
            function = BACKENDS[name][0]()
            return lambda: torch.autograd.grad(function(*inputs, window), inputs, grad)
        for window in sorted({w if w < T else FULL for w in window_sizes(shape)}):
            reasons = {name: backend_unavailable_reason(name, window != FULL, device.type, dtype, D) for name in BACKENDS}
            times = measure({name: training_call(name, window) for name, reason in reasons.items() if reason is None}, device)
            backends += [{"model": model, "rows": rows, "window": window, "backend": name,
                          "ms": 1000 * times[name] if name in times else None, "reason": reason}
                         for name, reason in reasons.items()]
            problems += [f"attention {name}: {reason}" for name, reason in reasons.items() if reason and "are wrong" in reason]
    return {"dtype": str(dtype), "backends": backends, "chosen": chosen, "problem": "; ".join(problems) or None}


# --- training ---------------------------------------------------------------------------------------------------------

def training(flags: PartFlags, device: "torch.device") -> dict:
    """The first STEPS steps of a run, and how far their losses are from the plain run's."""
    from nanochat.runtime.compilation import graphs_compiled
    own, bench = shlex.split(flags.run_flags), bench_flags(flags.tiny, flags.rows)
    _, configs = train_step.parse_command([*bench, *own])
    config, = configs.values()
    variant = train_step.Variant(config, get_base_dir())
    trainer, seconds = variant.trainer, []
    while len(variant.losses) < STEPS:
        variant.stretch(1)
        seconds.append(variant.result.time.total)
    plan, compiled = trainer.plan, trainer.plan.compile
    estimate = estimate_memory(plan.shape, plan.micro_batch_size, plan.memory).total / 2**20
    modelled = device.type == "cuda" and all(feature.name != "fp8" for feature in trainer.state.features.enabled)
    facts = {
        "flags": own, "losses": variant.losses, "grad_norm": variant.result.grad_norm, "not_finite": variant.result.not_finite,
        "step_ms_median": 1000 * statistics.median(seconds),
        "tok_per_sec": plan.horizon.total_batch_size / statistics.median(seconds),
        "rows": plan.micro_batch_size, "tokens_per_step": plan.horizon.total_batch_size, "dtype": str(plan.dtype),
        "compile_sec": trainer.state.clock.compile, "compiled_graphs": graphs_compiled() if compiled else 0,
        "graph_breaks": dict(trainer.forward.graph_breaks) if compiled else {},
        "eager_fallbacks": trainer.forward.eager_fallbacks if compiled else None,
        "peak_mem_mib": variant.peak_mem_mib, "planned_mem_mib": estimate if modelled else None,
        "kernel_choices": plan.kernel_choices}
    plain = read_json(resolve(flags.against))["results"]["training"]["losses"] if flags.against else variant.losses
    mismatch = difference(variant.losses, plain)
    facts["loss_difference"] = max(abs(a - b) for a, b in zip(variant.losses, map(float, plain), strict=True))
    trainer.loader.close()
    return facts | {"mismatch": mismatch, "problem": mismatch or trouble_of(facts)}


def difference(losses: list[float], plain: list[float]) -> str | None:
    """The first step whose loss is not finite, or further from the plain run's than LOSS_TOLERANCE, in words."""
    for step, (loss, wanted) in enumerate(zip(losses, map(float, plain), strict=True)):
        if not abs(loss - wanted) <= LOSS_TOLERANCE:
            return f"the loss of step {step} is {loss:.4f}, and {wanted:.4f} in the plain run"
    return None


def trouble_of(facts: dict) -> str | None:
    """What is wrong with a run whose losses are right, in words."""
    if facts["eager_fallbacks"]:
        return "the model could not be compiled: the reason is in the log"
    peak, planned = facts["peak_mem_mib"], facts["planned_mem_mib"]
    if planned and abs(peak / planned - 1) > MEMORY_TOLERANCE:
        return f"the peak of {peak:.0f} MiB is not within {MEMORY_TOLERANCE:.0%} of the planner's {planned:.0f} MiB"
    return None


def main() -> int:
    flags, = parse([PartFlags], prog="python -m dev.bench.gpu_numbers")
    started = time.monotonic()
    from nanochat.runtime.device import init_device
    device, _ = init_device("cpu" if flags.tiny else "cuda")
    facts = {"machine": machine, "ceilings": ceilings, "attention": attention, "training": training}[flags.part](flags, device)
    write_json(flags.json_out, make_result(SCRIPT, device, vars(flags), {flags.part: facts}, time.monotonic() - started))
    print(format_table([{"fact": name, "value": str(value)} for name, value in facts.items()]))
    return 1 if facts["problem"] else 0


if __name__ == "__main__":
    cli(main)
