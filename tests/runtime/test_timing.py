"""What a GPU takes for a call, told from what the program takes for launching it, on a GPU that is simulated; and in turn."""

import time

import pytest
import torch
from hypothesis import given, strategies as st

from nanochat.runtime.timing import FIRST_HOLD, LONGEST_HOLD, TRIES, device_timer, queued_seconds, time_in_turn


class SimulatedGpu:
    """Runs `kernels`, seconds each, in order, from when it was launched and the one before has ended; `launch` seconds for each
    launch."""

    def __init__(self, kernels, launch):
        self.kernels, self.launch, self.attempts = kernels, launch, 0

    def attempt(self, hold):
        self.attempts += 1
        now = free = hold  # the GPU is held until then; the first launch begins at 0
        for i, kernel in enumerate(self.kernels):
            free = max(free, (i + 1) * self.launch) + kernel
        launching = len(self.kernels) * self.launch
        return free - now, launching, launching <= hold


@given(kernels=st.lists(st.floats(1e-6, 1e-4), min_size=1, max_size=50), launch=st.floats(1e-6, LONGEST_HOLD / 101))
def test_the_gpu_s_own_time_is_found_whatever_the_launches_take(kernels, launch):
    gpu = SimulatedGpu(kernels, launch)
    seconds, hold = queued_seconds(gpu.attempt, FIRST_HOLD)
    assert seconds == pytest.approx(sum(kernels)) and gpu.attempts <= 2
    before = gpu.attempts
    assert queued_seconds(gpu.attempt, hold)[0] == pytest.approx(sum(kernels))
    assert gpu.attempts == before + 1, "the hold that was enough is kept"


def test_on_an_idle_gpu_the_launches_would_have_been_timed():
    gpu = SimulatedGpu([1e-5] * 40, launch=5e-5)  # 0.4 ms of work in 2 ms of launches
    assert gpu.attempt(0)[0] > 4 * queued_seconds(gpu.attempt, FIRST_HOLD)[0]


def test_a_call_that_waits_for_the_gpu_ends_the_tries():
    attempts = []

    def attempt(hold):
        attempts.append(hold)
        return 0.001, hold + 0.001, False  # the launches after the wait are always too late
    assert queued_seconds(attempt, FIRST_HOLD)[0] == 0.001
    assert len(attempts) <= TRIES and max(attempts) <= LONGEST_HOLD and attempts == sorted(attempts)


@pytest.mark.parametrize("queued", [False, True])
def test_variants_are_timed_in_turn(queued):
    calls = []
    variants = {name: lambda name=name, s=s: (calls.append(name), time.sleep(s)) for name, s in (("a", 0.004), ("b", 0.008))}
    times = time_in_turn(variants, torch.device("cpu"), repeats=3, warmup=1, queued=queued)
    assert calls == ["a", "b"] * 4 and all(len(times[name]) == 3 for name in variants)
    assert min(times["a"]) >= 0.004 and min(times["b"]) >= 0.008


def test_a_device_timer_finds_the_time_of_the_device(device):
    """A GPU that sleeps twice as many cycles takes twice as long, and the program is held up by neither."""
    seconds_of = device_timer(device)
    if device.type != "cuda":
        assert seconds_of(lambda: time.sleep(0.005)) >= 0.005
        return
    one, two = (min(seconds_of(lambda n=n: torch.cuda._sleep(n * 1_000_000)) for _ in range(3)) for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.2)
