"""Timing by ratios: variants run in turn (A B A B ...), so that a machine that slows down slows all of them; medians are quoted
with the quartiles beside them. torch is imported where it is used: a wrong command line is answered before it is loaded.

A GPU runs what the program has put into its queue. One layer takes it a tenth of a millisecond, its launches take the program
several: timed on an idle GPU, such a call shows the program's time. In a training step the queue is never empty, so what a layer
costs there is the GPU's time alone: `device_timer` measures that. Whole steps are timed as they are, by `timed`.
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
FIRST_HOLD, LONGEST_HOLD = 0.001, 0.05  # seconds that a GPU is kept waiting while calls are put into its queue
TRIES = 4  # timings of a call whose launches are not all in the queue in time, as those of one that waits for the GPU never are
CYCLES = 3e9  # per second: no GPU has a faster clock, so a GPU waits for as long as it is told or longer


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


def device_timer(device: "torch.device") -> Callable[[Callable[[], Any]], float]:
    """A function: call -> seconds that it takes a GPU when all of it waits in the queue; elsewhere as by `timed`.

    The call runs several times where its launches took longer than expected. It must not wait for the GPU itself.
    """
    if device.type != "cuda":
        return lambda call: timed(device, call)[0]
    import torch
    hold = FIRST_HOLD

    def attempt(call: Callable[[], Any], hold: float) -> tuple[float, float, bool]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        torch.cuda._sleep(int(hold * CYCLES))
        begin.record()
        call()
        end.record()
        launching, too_late = time.perf_counter() - started, begin.query()  # the GPU is past `begin`: it did not wait for us
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1000, launching, not too_late

    def seconds(call: Callable[[], Any]) -> float:
        nonlocal hold
        found, hold = queued_seconds(lambda hold: attempt(call, hold), hold)
        return found
    return seconds


def queued_seconds(attempt: Callable[[float], tuple[float, float, bool]], hold: float) -> tuple[float, float]:
    """Seconds of a call with its launches queued, and the hold that was needed for that.

    attempt: seconds that the device is held -> (seconds of the call, seconds that its launches took, whether they were all in the
    queue before the device began).   hold: where to start, of an earlier call.
    """
    for _ in range(TRIES):
        seconds, launching, in_time = attempt(hold)
        if in_time or hold >= LONGEST_HOLD:
            break
        hold = min(max(2 * launching, 2 * hold), LONGEST_HOLD)
    return seconds, hold


def time_in_turn(variants: dict[str, Callable[[], None]], device: "torch.device", repeats: int, warmup: int = 2,
                 at_least: float = 0.0, label: str = "timing", queued: bool = False) -> dict[str, list[float]]:
    """Seconds of each call, variant by variant, all of them in turn `repeats` times after `warmup` rounds not counted.

    at_least: calls that take less than so many seconds are timed several at a time, as many as take that long.
    label: what the progress says.
    queued: the time of the device alone, for parts of a step; see `device_timer`.
    """
    seconds_of = device_timer(device) if queued else lambda call: timed(device, call)[0]
    times, calls = {name: [] for name in variants}, dict.fromkeys(variants, 1)
    progress = Progress(label, total=(repeats + warmup) * len(variants))
    for round_ in range(warmup + repeats):
        for name, call in variants.items():
            seconds = seconds_of(lambda call=call, n=calls[name]: [call() for _ in range(n)]) / calls[name]
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
