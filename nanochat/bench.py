"""What every bench and attempt shares: flags, repeats in turn, medians with spread, the machine's matrix peak, one envelope.

A figure is a ratio within one run: variants are timed in turn (A B A B ...), so that a machine that slows down slows
all of them, and medians are quoted with the quartiles beside them. torch is imported where it is used: a wrong command
line is answered before it is loaded.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat.common import Progress, write_atomic
from nanochat.flags import flag, raise_problems

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1


@dataclass
class AttemptFlags:
    """The attempt"""
    preset: str = flag("default", "the sizes that no flag gives: seconds or a minute on a small CPU, or for a GPU",
                       choices=("smoke", "default", "gpu"))
    device: str = flag("auto", "auto takes the best there is", choices=("auto", "cuda", "mps", "cpu"),
                       aliases=("--device-type",))
    dtype: str = flag("auto", "compute dtype; auto is bf16 where the hardware multiplies it natively",
                      choices=("auto", "bfloat16", "float32"))
    seed: int = flag(42, "seed of whatever is random", low=0)
    json_out: str | None = flag(None, "write the result here; a missing folder is made", metavar="PATH")

    def validate(self) -> list[str]:
        return unwritable(self.json_out)

    def filled(self, presets: dict[str, dict]) -> "AttemptFlags":
        """These flags, with the preset's value for each that was left out (None)."""
        chosen = presets[self.preset]
        missing = [f.name for f in fields(self) if f.name in chosen and getattr(self, f.name) is None]
        return replace(self, **{name: chosen[name] for name in missing})

    def open_device(self) -> "tuple[torch.device, torch.dtype]":
        from nanochat.device import init_device, pick_compute_dtype
        device, _ = init_device("" if self.device == "auto" else self.device)
        return device, pick_compute_dtype(device, self.dtype)[0]


def synchronize(device: "torch.device") -> None:
    """Wait until the device has done all it was given."""
    from nanochat import device as machine
    machine.synchronize(device)


def timed(device: "torch.device", call: Callable, *arguments) -> tuple[float, Any]:
    """Seconds that `call(*arguments)` takes with an idle device at both ends, and what it returned."""
    synchronize(device)
    started = time.perf_counter()
    result = call(*arguments)
    synchronize(device)
    return time.perf_counter() - started, result


def time_in_turn(variants: dict[str, Callable[[], None]], device: "torch.device", repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, variant by variant, all of them in turn `repeats` times after `warmup` rounds not counted."""
    times = {name: [] for name in variants}
    progress = Progress("timing", total=(repeats + warmup) * len(variants))
    for round_ in range(warmup + repeats):
        for name, call in variants.items():
            seconds, _ = timed(device, call)
            if round_ >= warmup:
                times[name].append(seconds)
            progress.update()
    progress.close()
    return times


def spread(values: list[float]) -> dict:
    """Median, quartiles and number of values."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "q1": low, "q3": high, "n": len(values)}


def latency_ms(seconds: list[float]) -> dict:
    """Mean, median and 90th percentile in milliseconds."""
    p90 = statistics.quantiles(seconds, n=10, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    return {"mean_ms": 1000 * statistics.fmean(seconds), "p50_ms": 1000 * statistics.median(seconds), "p90_ms": 1000 * p90}


def gemm(device: "torch.device", dtype: "torch.dtype", m: int = 4096, n: int = 4096, k: int = 1024) -> tuple[Callable[[], None], int]:
    """A matrix product on random data to time as this machine's peak, and its FLOPs."""
    import torch
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2 * m * n * k


def envelope(script: str, device: "torch.device", config: dict, results: dict, elapsed: float, traces: dict | None = None,
             argv: list[str] | None = None) -> dict:
    """The JSON that every bench and attempt writes."""
    import torch

    from nanochat.device import device_name
    from nanochat.metrics import git_state
    return {"schema_version": SCHEMA_VERSION, "script": script, "argv": sys.argv[1:] if argv is None else argv,
            "git_commit": git_state()[0], "device": device_name(device), "torch_version": torch.__version__, "config": config,
            "results": results, "traces": traces or {}, "elapsed_sec": elapsed}


def unwritable(path: str | None) -> list[str]:
    """Why no result could be written to `--json-out PATH`, if so. Missing folders will be made, so the nearest one counts."""
    if not path:
        return []
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        return [f"--json-out {path} is a folder: name a file in it"]
    nearest = next(folder for folder in target.parents if folder.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return []
    return [f"--json-out {path}: cannot write in {nearest}. Choose another place"]


def check_writable(path: str | None) -> None:
    """UserError, before any work is done, where the JSON could not be written."""
    raise_problems(unwritable(path))


def write_json(path: str | None, content: dict) -> None:
    if path:
        target = Path(path).expanduser()
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, json.dumps(content, indent=1) + "\n")
