"""What every bench shares: repeats in turn, medians with spread, the machine's own matrix peak, one JSON envelope.

A figure is a ratio within one run: variants are timed in turn (A B A B ...), so that a machine that slows down slows
all of them, and medians are quoted with the quartiles beside them.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.common import Progress, UserError, write_atomic
from nanochat.device import device_name, synchronize
from nanochat.metrics import git_state

SCHEMA_VERSION = 1


def time_in_turn(variants: dict[str, Callable[[], None]], device: torch.device, repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, variant by variant, all of them in turn `repeats` times after `warmup` rounds not counted."""
    times = {name: [] for name in variants}
    progress = Progress("timing", total=(repeats + warmup) * len(variants))
    for round_ in range(warmup + repeats):
        for name, call in variants.items():
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if round_ >= warmup:
                times[name].append(time.perf_counter() - started)
            progress.update()
    progress.close()
    return times


def spread(values: list[float]) -> dict:
    """Median, quartiles and number of values."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": statistics.median(values), "q1": low, "q3": high, "n": len(values)}


def gemm(device: torch.device, dtype: torch.dtype, m: int = 4096, n: int = 4096, k: int = 1024) -> tuple[Callable[[], None], int]:
    """A matrix product on random data to time as this machine's peak, and its FLOPs."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, device=device, dtype=dtype)
    return lambda: torch.mm(a, b, out=out), 2 * m * n * k


def envelope(script: str, device: torch.device, config: dict, results: dict, elapsed: float, traces: dict | None = None) -> dict:
    """The JSON that every bench and attempt writes."""
    return {"schema_version": SCHEMA_VERSION, "script": script, "argv": sys.argv[1:], "git_commit": git_state()[0],
            "device": device_name(device), "torch_version": torch.__version__, "config": config, "results": results,
            "traces": traces or {}, "elapsed_sec": elapsed}


def check_writable(path: str | None) -> None:
    """UserError, before any work is done, where the JSON could not be written."""
    folder = Path(path).resolve().parent if path else None
    if folder and not folder.is_dir():
        raise UserError(f"--json-out {path}: there is no folder {folder}. Make it first, or choose another.")


def write_json(path: str | None, content: dict) -> None:
    if path:
        write_atomic(Path(path), json.dumps(content, indent=1) + "\n")
