"""The clock of the training loop: its parts, what it leaves out, and what survives a resume."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from nanochat.runtime.clock import Clock
from nanochat.runtime.other_load import OtherLoad

SHORT = 0.02  # seconds
CPU = torch.device("cpu")


def named(clock):
    return clock.train + clock.eval + clock.compile + clock.save


def a_loop(clock):
    """A loop with something of each kind; returns its seconds."""
    began = time.perf_counter()
    with clock.looping():
        with clock.training():
            time.sleep(SHORT)
        clock.last()
        for part in (clock.evaluating, clock.compiling, clock.saving):
            with part():
                time.sleep(SHORT)
        time.sleep(2 * SHORT)
    return time.perf_counter() - began


def test_a_loop_is_its_parts_and_what_has_no_name():
    clock = Clock(CPU)
    with clock.compiling():  # before the loop
        time.sleep(3 * SHORT)
    before = clock.compile
    seconds = a_loop(clock)
    assert all(getattr(clock, part) >= SHORT for part in ("train", "eval", "save")) and clock.compile - before >= SHORT
    assert clock.loop == pytest.approx(seconds, abs=SHORT / 2) and clock.unnamed >= 2 * SHORT
    assert clock.unnamed == pytest.approx(clock.loop - (named(clock) - before))


def test_what_waits_does_not_count():
    clock = Clock(CPU)
    with clock.looping():
        for outside in (clock.waiting, clock.left_out):
            with outside():
                time.sleep(10 * SHORT)
        time.sleep(SHORT)
    assert SHORT <= clock.loop == pytest.approx(clock.unnamed) and clock.loop < 10 * SHORT


def test_a_part_that_is_cut_short_counts_and_so_does_the_loop():
    clock = Clock(CPU)
    with pytest.raises(KeyboardInterrupt), clock.looping(), clock.evaluating():
        time.sleep(SHORT)
        raise KeyboardInterrupt
    assert clock.loop >= clock.eval >= SHORT > clock.unnamed >= 0


def test_it_goes_on_after_a_resume():
    """The checkpoint is of within the loop; what the loop did later is lost with the process, and done again."""
    first, second = Clock(CPU), Clock(CPU)
    with first.looping():
        with first.evaluating():
            time.sleep(2 * SHORT)
        time.sleep(SHORT)
        saved = json.loads(json.dumps(first.state_dict()))
        time.sleep(10 * SHORT)
    second.load_state_dict(saved)
    assert 3 * SHORT <= second.loop < 10 * SHORT and second.unnamed == pytest.approx(second.loop - second.eval)
    a_loop(second)
    assert second.loop >= saved["loop"] + 5 * SHORT and second.unnamed >= SHORT + 2 * SHORT
    assert second.unnamed == pytest.approx(second.loop - named(second))


def test_a_checkpoint_of_before_the_loop_was_timed():
    clock = Clock(CPU)
    clock.load_state_dict({"train": 5.0, "eval": 2.0, "compile": 1.0})
    assert (clock.loop, clock.unnamed, clock.save, clock.other_load) == (8.0, 0.0, 0.0, None)
    a_loop(clock)
    assert clock.loop > 8 and clock.unnamed == pytest.approx(clock.loop - named(clock))


def test_a_rollback_within_the_loop_does_not_turn_its_time_back():
    clock = Clock(CPU)
    with clock.looping():
        checkpoint = clock.state_dict()
        time.sleep(SHORT)
        now = clock.state_dict()
        clock.load_state_dict(checkpoint)
        time.sleep(SHORT)
        clock.load_state_dict(now)
    assert clock.loop >= 2 * SHORT and clock.unnamed == pytest.approx(clock.loop)


@contextmanager
def other_program():
    """A process that works on one core as long as the block lasts."""
    process = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.skipif(OtherLoad().began is None, reason="the system does not say")
def test_the_load_of_others_is_measured_in_the_loop_but_not_while_it_compiles_or_waits():
    clock = Clock(CPU)
    with other_program(), clock.looping():
        time.sleep(0.3)
        for outside in (clock.compiling, clock.waiting):
            with outside():
                time.sleep(0.3)
        saved = clock.state_dict()["load"]
    assert clock.other_load > 0.3 / os.cpu_count()
    assert 0.25 < clock.load.seconds < 0.6 and saved[0] == pytest.approx(clock.load.seconds, abs=0.05)
