"""Timing by ratios: variants run in turn (A B A B ...), so that a machine that slows down slows all of them; medians are quoted
with the quartiles beside them. torch is imported where it is used: a wrong command line is answered before it is loaded.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanochat.common import Progress

if TYPE_CHECKING:
    import torch

SHORT = 0.004  # seconds: calls that take less are best timed several at once, see `time_in_turn`


def timed(device: "torch.device", call: Callable, *arguments) -> tuple[float, Any]:
    """Seconds that `call(*arguments)` takes with an idle device at both ends, by a GPU's own clock on CUDA, and what it
    returned."""
    from nanochat.runtime.device import synchronize
    synchronize(device)
    if device.type == "cuda":
        import torch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        result = call(*arguments)
        end.record()
        synchronize(device)
        return begin.elapsed_time(end) / 1000, result
    started = time.perf_counter()
    result = call(*arguments)
    synchronize(device)
    return time.perf_counter() - started, result


def time_in_turn(variants: dict[str, Callable[[], None]], device: "torch.device", repeats: int, warmup: int = 2,
                 at_least: float = 0.0, label: str = "timing") -> dict[str, list[float]]:
    """Seconds of each call, variant by variant, all of them in turn `repeats` times after `warmup` rounds not counted.

    at_least: calls that take less than so many seconds are timed several at a time, as many as take that long.
    label: what the progress says.
    """
    times, calls = {name: [] for name in variants}, dict.fromkeys(variants, 1)
    progress = Progress(label, total=(repeats + warmup) * len(variants))
    for round_ in range(warmup + repeats):
        for name, call in variants.items():
            seconds, _ = timed(device, lambda call=call, n=calls[name]: [call() for _ in range(n)])
            seconds /= calls[name]
            if round_ >= warmup:
                times[name].append(seconds)
            else:
                calls[name] = max(1, math.ceil(at_least / max(seconds, 1e-9)))
            progress.update()
    progress.close()
    return times


def spread(values: list[float]) -> dict:
    """Median, quartiles and number of values, with six digits: clocks do not have more to say."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {name: float(f"{v:.6g}") for name, v in (("median", middle), ("q1", low), ("q3", high))} | {"n": len(values)}


def speedup(seconds: list[float], baseline: list[float]) -> dict:
    """How many times as fast as the baseline, which was timed in turn with it: the spread of the ratios, pair by pair."""
    return spread([theirs / ours for ours, theirs in zip(seconds, baseline, strict=True)])


def latency_ms(seconds: list[float]) -> dict:
    """Mean, median and 90th percentile in milliseconds."""
    p90 = statistics.quantiles(seconds, n=10, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    return {"mean_ms": 1000 * statistics.fmean(seconds), "p50_ms": 1000 * statistics.median(seconds), "p90_ms": 1000 * p90}
