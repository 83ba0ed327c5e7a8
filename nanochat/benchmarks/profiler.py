"""Where the time of a step goes, by torch's profiler: milliseconds by the purpose of a kernel.

torch is imported where it is used: wrong flags are reported before it is loaded.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

from nanochat.runtime.timing import timed

if TYPE_CHECKING:
    import torch

UPDATE = "update: "  # prefix of the profiler ranges around the optimizer's updates
CATEGORIES = ("gemms", "attention", "loss", "norms_elementwise", "embedding", "muon", "adamw", "other", "host")
# The category of a kernel: that of the first pattern found in its name, or in the name of an operator around it.
KERNELS = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in (
    ("muon", rf"^{UPDATE}muon$"),
    ("adamw", rf"^{UPDATE}adamw$"),
    ("gemms", r"^aten::(_scaled_|_int_)?(add)?mm(_|\.|$)|^aten::(linear|mkldnn_linear)|^mkldnn::|^onednn::|^mkl::"
              r"|^nanochat::((add_)?weight_gradient|fp8_emulated_mm)$"),
    ("loss", r"log_?softmax|softmax_online|nll|loss|cross_?entropy|softcap|tanh|logit"),
    ("attention", r"softmax|attention|attn|flash|fmha|sdpa?_|bmm|masked_fill"),
    ("gemms", r"gemm|nvjet|xmma|cutlass|^triton_tem_|splitkreduce"),
    ("embedding", r"embedding|index|lookup"),
    ("norms_elementwise", r"^aten::|cpp_fused|^triton_|^nanochat::|accumulategrad|at::native|elementwise|^mem(cpy|set)"),
))
# Not work, but what surrounds it on the host: torch.compile's wrappers, autograd's engine and its nodes, the update ranges.
WRAPPERS = re.compile(r"## |Torch-Compiled|TorchDynamo|AOTDispatcher|CompiledF|Pregraph|autograd::engine|\w+Backward\d*$"
                      rf"|Optimizer\.|ProfilerStep|{UPDATE}")


def label_updates(optimizer) -> None:
    """Put the two updates of a MuonAdamW into profiler ranges, which distinguishes their kernels from all others."""
    from torch.profiler import record_function
    for kind in ("muon", "adamw"):
        setattr(optimizer, f"_step_{kind}", record_function(f"{UPDATE}{kind}")(getattr(optimizer, f"_step_{kind}")))


@cache
def category(names: tuple[str, ...]) -> str:
    """The category of a kernel or operator, from its name and those of the operators around it, the innermost first.

    `host` for mere wrappers, `other` where no pattern of KERNELS is found.
    """
    if WRAPPERS.match(names[0]):
        return "host"
    names = [name for name in names if not name.startswith("## ")]  # the name of a graph is a hash: any pattern may be in it
    return next((kind for kind, pattern in KERNELS if any(map(pattern.search, names))), "other")


def kernel_seconds(events: Iterable, on_cpu: bool) -> Counter:
    """Seconds of work in a profile (`torch.profiler`'s `events()`), by (category, name), without the host's.

    On a CPU the operators are the work, each without the operators it calls; on a GPU the kernels are, with the names of the
    operators that launch them.
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
    if not on_cpu:  # a kernel that belongs to no operator has only its own name
        for name, seconds in unlinked.items():
            spent[category((name,)), name] += max(seconds, 0.0)
    return Counter({key: seconds for key, seconds in spent.items() if key[0] != "host"})


def breakdown(step: Callable[[], None], device: "torch.device", seconds: float,
              steps: int = 2) -> tuple[dict[str, float], list[str]]:
    """Profile some more steps. Returns milliseconds of one by CATEGORIES, whose sum is `seconds`, and the names that count as
    `other`, the longest first.

    seconds: what a step takes without the profiler. A CPU's parts are scaled to it, as the profiler slows all of them down; a
    GPU's kernels run as fast as ever, and `host` is the time in which none runs.
    """
    from torch.profiler import ProfilerActivity, profile
    on_cpu = device.type == "cpu"
    with profile(activities=[ProfilerActivity.CPU] + ([] if on_cpu else [ProfilerActivity.CUDA])) as profiled:
        took, _ = timed(device, lambda: [step() for _ in range(steps)])
    spent = kernel_seconds(profiled.events(), on_cpu)
    busy = sum(spent.values()) / steps
    scale = steps * seconds / took if on_cpu else min(1.0, seconds / max(busy, 1e-12))  # concurrent kernels count twice
    parts = dict.fromkeys(CATEGORIES, 0.0)
    for (kind, _), value in spent.items():
        parts[kind] += 1000 * scale * value / steps
    parts["host"] = max(0.0, 1000 * seconds - sum(parts.values()))
    return parts, [name for (kind, name), _ in spent.most_common() if kind == "other"]
