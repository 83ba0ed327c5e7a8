"""What every bench and attempt shares: flags, repeats in turn, medians with spread, the machine's matrix peak, where a
step's time goes, another program's rate, one envelope.

A figure is a ratio within one run: variants are timed in turn (A B A B ...), so that a machine that slows down slows
all of them, and medians are quoted with the quartiles beside them. torch is imported where it is used: a wrong command
line is answered before it is loaded.
"""

import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from nanochat.cli.flags import LARGEST_SEED, flag, raise_problems
from nanochat.cli.paths import output_problem
from nanochat.common import UserError, resolve
from nanochat.runtime.files import write_atomic
from nanochat.runtime.timing import timed

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1
SHORT = 0.004  # seconds: calls that take less are best timed several at once, see `time_in_turn`
UPDATE = "update: "  # how the profile's ranges of the optimizer's rules begin
CATEGORIES = ("gemms", "attention", "loss", "norms_elementwise", "embedding", "muon", "adamw", "other", "host")
# Which kernel belongs where: the first line with a pattern in the kernel's name, or in that of an operator around it.
KERNELS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in (
    ("muon", rf"^{UPDATE}muon$"),
    ("adamw", rf"^{UPDATE}adamw$"),
    ("gemms", r"^aten::(_scaled_|_int_)?(add)?mm(_|\.|$)|^aten::(linear|mkldnn_linear)|^mkldnn::|^onednn::|^mkl::"),
    ("loss", r"log_?softmax|softmax_online|nll|loss|cross_?entropy|softcap|tanh|logit"),
    ("attention", r"softmax|attention|attn|flash|fmha|sdpa?_|bmm|masked_fill"),
    ("gemms", r"gemm|nvjet|xmma|cutlass|^triton_tem_|splitkreduce"),
    ("embedding", r"embedding|index|lookup"),
    ("norms_elementwise", r"^aten::|cpp_fused|^triton_|^nanochat::|accumulategrad|at::native|elementwise|^mem(cpy|set)"),
))
# Not work but what is around it on the host: torch.compile's wrappers, autograd's engine and its nodes, the rules' ranges.
WRAPPERS = re.compile(r"## |Torch-Compiled|TorchDynamo|AOTDispatcher|CompiledF|Pregraph|autograd::engine|\w+Backward\d*$"
                      rf"|Optimizer\.|ProfilerStep|{UPDATE}")


@dataclass
class AttemptFlags:
    """The attempt"""
    preset: str = flag("default", "the sizes that no flag gives: seconds or a minute on a small CPU, or for a GPU",
                       choices=("smoke", "default", "gpu"))
    device: str = flag("auto", "auto takes the best there is", choices=("auto", "cuda", "mps", "cpu"),
                       aliases=("--device-type",))
    dtype: str = flag("auto", "compute dtype; auto is bf16 where the hardware multiplies it natively",
                      choices=("auto", "bfloat16", "float32"))
    seed: int = flag(42, "seed of whatever is random", low=0, high=LARGEST_SEED)
    json_out: str | None = flag(None, "write the result here; a missing folder is made", metavar="PATH")
    plot: bool = flag(True, "draw the result beside --json-out, if matplotlib is installed")

    presets = {}  # each attempt's own: preset -> values of flags

    def validate(self) -> list[str]:
        return unwritable(self.json_out)

    def filled(self) -> "AttemptFlags":
        """These flags, with the preset's value for each that was left out."""
        chosen = self.presets[self.preset].items()
        return replace(self, **{name: value for name, value in chosen if getattr(self, name) in (None, [])})

    def open_device(self) -> "tuple[torch.device, torch.dtype]":
        from nanochat.runtime.device import init_device, pick_compute_dtype
        device, _ = init_device("" if self.device == "auto" else self.device)
        return device, pick_compute_dtype(device, self.dtype)[0]


def gemm(device: "torch.device", dtype: "torch.dtype", m: int = 4096, n: int = 4096,
         k: int = 1024) -> tuple[Callable[[], None], int]:
    """A matrix product on random data to time as this machine's peak, and its FLOPs."""
    import torch
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2 * m * n * k


def name_updates(optimizer) -> None:
    """Let a profile tell the kernels of a MuonAdamW's two rules from all others."""
    from torch.profiler import record_function
    for kind in ("muon", "adamw"):
        setattr(optimizer, f"_step_{kind}", record_function(f"{UPDATE}{kind}")(getattr(optimizer, f"_step_{kind}")))


@cache
def category(names: tuple[str, ...]) -> str:
    """What a kernel or an operator is for, by its name and those of the operators around it, the innermost first: one of
    CATEGORIES. `host` for mere wrappers, `other` where KERNELS has no line."""
    if WRAPPERS.match(names[0]):
        return "host"
    names = [name for name in names if not name.startswith("## ")]  # the name of a graph is a hash: any pattern may be in it
    return next((kind for kind, pattern in KERNELS if any(map(pattern.search, names))), "other")


def kernel_seconds(events: Iterable, on_cpu: bool) -> Counter:
    """Seconds of work in a profile (`torch.profiler`'s `events()`), by (category, name), the host's left out.

    On a CPU operators are the work, each without what it calls; on a GPU the kernels are, by the operators that launch them.
    """
    operators = [e for e in events if e.device_type.name == "CPU" and not e.is_async]
    on_device = [e for e in events if e.device_type.name != "CPU"]
    annotations = {e.name for e in on_device if e.is_user_annotation}  # ranges, drawn on the device's time line too
    spent, unlinked = Counter(), Counter()
    for e in on_device:
        if e.name not in annotations:
            unlinked[e.name] += e.time_range.elapsed_us() / 1e6
    for e in operators:
        around, parent = [e.name], e.cpu_parent
        while parent is not None:
            around.append(parent.name)
            parent = parent.cpu_parent
        if on_cpu:
            spent[category(tuple(around)), e.name] += e.self_cpu_time_total / 1e6
            continue
        for kernel in e.kernels:
            if kernel.name not in annotations:
                spent[category((kernel.name, *around)), kernel.name] += kernel.duration / 1e6
                unlinked[kernel.name] -= kernel.duration / 1e6
    if not on_cpu:  # what no operator owns up to is known by its name alone
        for name, seconds in unlinked.items():
            spent[category((name,)), name] += max(seconds, 0.0)
    return Counter({key: seconds for key, seconds in spent.items() if key[0] != "host"})


def breakdown(step: Callable[[], None], device: "torch.device", seconds: float,
              steps: int = 2) -> tuple[dict[str, float], list[str]]:
    """Where the time of a step goes: milliseconds by CATEGORIES, summing to `seconds`, and the names counted as `other`,
    the longest first. Profiles some more steps; `seconds` is what one takes unwatched.

    A CPU's shares are scaled to `seconds`, as being watched slows all of it; a GPU's kernels run as fast as ever, and `host`
    is the time without one.
    """
    from torch.profiler import ProfilerActivity, profile
    on_cpu = device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU] + ([] if on_cpu else [ProfilerActivity.CUDA])) as watched:
        took, _ = timed(device, lambda: [step() for _ in range(steps)])
    spent = kernel_seconds(watched.events(), on_cpu)
    busy = sum(spent.values()) / steps
    scale = steps * seconds / took if on_cpu else min(1.0, seconds / max(busy, 1e-12))  # kernels side by side count twice
    parts = dict.fromkeys(CATEGORIES, 0.0)
    for (kind, _), value in spent.items():
        parts[kind] += 1000 * scale * value / steps
    parts["host"] = max(0.0, 1000 * seconds - sum(parts.values()))
    return parts, [name for (kind, name), _ in spent.most_common() if kind == "other"]


def rate_of(command: str, pattern: str, skip: int) -> float:
    """Run another trainer's command line in a shell, and take its tokens/s from what it prints: the median of the numbers
    that `pattern` finds, its one group, the first `skip` left out. UserError if it fails or says too little."""
    done = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace")
    last = "\n".join(done.stdout.splitlines()[-15:])
    if done.returncode:
        raise UserError(f"{command}: exit status {done.returncode}. Its last lines:\n{last}")
    found = re.findall(pattern, done.stdout)
    try:
        rates = [float(number.replace(",", "").replace("_", "")) for number in found[skip:]]
    except ValueError as e:
        raise UserError(f"--against-regex {pattern!r} finds what is no number: {e}") from None
    if not rates:
        raise UserError(f"{command}: --against-regex {pattern!r} is found {len(found)} times in its output, of which the first "
                        f"{skip} do not count. Its last lines:\n{last}")
    return statistics.median(rates)


def envelope(script: str, device: "torch.device", config: dict, results: dict, elapsed: float, traces: dict | None = None,
             argv: list[str] | None = None) -> dict:
    """The JSON that every bench and attempt writes."""
    import torch

    from nanochat.runtime.device import device_name
    from nanochat.runtime.provenance import git_state
    return {"schema_version": SCHEMA_VERSION, "script": script, "argv": sys.argv[1:] if argv is None else argv,
            "git_commit": git_state()[0], "device": device_name(device), "torch_version": torch.__version__, "config": config,
            "results": results, "traces": traces or {}, "elapsed_sec": elapsed}


def unwritable(path: str | None) -> list[str]:
    """Why no result could be written to `--json-out PATH`, if so. Missing folders will be made, so the nearest one counts."""
    if not path:
        return []
    trouble = output_problem(path, make_folders=True)
    return [f"--json-out {trouble}"] if trouble else []


def check_writable(path: str | None) -> None:
    """UserError, before any work is done, where the JSON could not be written."""
    raise_problems(unwritable(path))


def write_json(path: str | None, content: dict) -> None:
    if path:
        target = resolve(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1)  # a list of numbers, and a dict without others in it, is a line
        write_atomic(target, re.sub(r"[\[{][^][{}]*[]}]", lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n")


def save(path: str | None, content: dict, draw: Callable | None = None) -> None:
    """Write the JSON, and beside it, where matplotlib is installed, the picture that `draw(figure, content)` makes."""
    write_json(path, content)
    if not path:
        return
    print(f"json: {path}")
    if draw is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("plot left out: pip install matplotlib")
        return
    picture = resolve(path).with_suffix(".png")
    figure = Figure(figsize=(11, 4), layout="constrained")
    draw(figure, content)
    figure.savefig(picture, dpi=100)
    print(f"plot: {picture}")
