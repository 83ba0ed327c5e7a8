"""A probe: some steps of a run, to measure what the run will take on this machine. `python -m scripts.plan` shows it.

The step is the real one, as `build_trainer` makes it: same model, micro-batch, kernels, compiler. Two things differ. Its tokens
are random, so that no text is read and no tokenizer trained: the time of a step does not depend on what the text says. And it has
at most two micro-batches, as some steps would take minutes: forward and backward of a micro-batch, and the update, are timed
apart, and a whole step is computed from them. Two, because the second finds the gradients of the first.

A probe runs in a process of its own: memory that runs out, or a kernel that crashes, ends that process only. Its result is kept
(plan_cache.py): the next plan takes it without measuring.

No torch at the top: the process that plans does not need it.
"""

import copy
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from nanochat.common import UserError, get_base_dir
from nanochat.features import FEATURES, Features
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime import timing
from nanochat.runtime.files import write_hashed
from nanochat.runtime.other_load import OtherLoad
from nanochat.training.config import Config
from nanochat.training.plan_cache import Probe, micro_batches

STRETCH_SECONDS = 0.25     # of consecutive steps of one side, where two take turns
ROUNDS = 4                 # of such turns, at least
MOST_COMPILED = 5          # steps that are left out because something was compiled in them
TOKENS, DOCUMENTS = 2**20, 2**10  # random ones, which the rows of a probe repeat
MOST_WRITTEN = 2**26       # bytes, to see how long a checkpoint takes

NO_MEMORY = ("memory ran out. Take a smaller --device-batch-size (--auto-batch chooses by itself), or add --chunked-ce, or "
             "--recompute-activations")


class NotMeasured(Exception):
    """Why a probe has no result, in words."""


# ---- measuring, in a process of its own

def measure(config: Config, shape: GPTConfig, seconds: float) -> Probe:
    """Take steps of the run for about so many seconds. Raises: NotMeasured."""
    return Probe(**in_process(take_probe, config, shape, seconds))


def measure_gain(config: Config, candidate: Config, shape: GPTConfig, seconds: float) -> dict:
    """How many times as fast a step of the candidate is: `median`, `q1`, `q3` and number `n` of rounds in which both took turns,
    for about so many seconds; and `other_load` meanwhile. Raises: NotMeasured."""
    return in_process(take_turns, config, candidate, shape, seconds)


def in_process(work: Callable, *arguments):
    """The result of work(*arguments), in a new process whose output is dropped. Raises: NotMeasured."""
    context = multiprocessing.get_context("spawn")  # nothing of this process is in it, neither threads nor memory
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work_in_process, args=(sender, work, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        result, why_not = receiver.recv()
    except EOFError:
        process.join()
        killed = ", as the system ends one where memory runs out" if process.exitcode == -signal.SIGKILL else ""
        raise NotMeasured(f"its process ended with status {process.exitcode}{killed}") from None
    process.join()
    if why_not:
        raise NotMeasured(why_not)
    return result


def work_in_process(sender, work: Callable, arguments: tuple) -> None:
    """What such a process does: it sends (result, None), or (None, why there is none)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    result = why_not = None
    try:
        result = work(*arguments)
    except UserError as e:
        why_not = str(e)
    except Exception as e:
        from nanochat.training.auto_batch import is_out_of_memory
        why_not = NO_MEMORY if is_out_of_memory(e) else f"{type(e).__name__}: {e}"
    sender.send((result, why_not))


def take_probe(config: Config, shape: GPTConfig, seconds: float) -> dict:
    """The fields of a Probe. Measure here: in a process that has taken no other steps, or its peak memory would be theirs."""
    from nanochat.runtime.compute_dtype import dtype_name
    from nanochat.runtime.device import device_name, evaluation
    from nanochat.training.auto_batch import memory_limit
    trainer = make_trainer(config, shape)
    plan, state = trainer.plan, trainer.state
    take_steps(trainer, 1)  # compiles, and makes what lasts
    load, steps, started = OtherLoad(), [], time.monotonic()
    while time.monotonic() - started < seconds or not steps:
        steps += take_steps(trainer, 1)
    others, step_peak = load.share(), trainer.peak_memory.step_peak()
    x, y = trainer.loader.next()
    with evaluation(state.model), state.features.eval_context(state.model):
        eval_seconds, _ = timing.timed(plan.device, lambda: state.model(x, y, loss_reduction="none"))
    trainer.loader.close()
    times = timing.spread([micro * plan.horizon.grad_accum_steps + update for micro, update in steps])
    micro, update = (statistics.median(column) for column in zip(*steps, strict=True))
    return dict(
        device=device_name(plan.device), device_type=plan.device.type, dtype=dtype_name(plan.dtype),
        compiled=plan.compile and not trainer.forward.eager_fallbacks, rows=plan.micro_batch_size,
        memory_limit=memory_limit(plan.device), micro_batch_sec=micro, update_sec=update,
        spread=(times["q3"] - times["q1"]) / times["median"], steps=len(steps), eval_micro_batch_sec=eval_seconds,
        compile_sec=state.clock.compile, save_sec=seconds_to_save(state), step_peak_mem_mib=step_peak,
        peak_mem_mib=max(step_peak, trainer.peak_memory.step_peak()), other_load=others, date=time.strftime("%Y-%m-%d"))


def seconds_to_save(state) -> float:
    """Seconds that a checkpoint takes, whose like is written in part at most; 0 where nothing can be written."""
    from nanochat.checkpoint_manager import total_bytes
    size = total_bytes(state.model.state_dict()) + total_bytes(state.optimizer.named_state())
    part = min(size, MOST_WRITTEN)
    try:
        with tempfile.TemporaryDirectory(dir=get_base_dir(), prefix=".plan-") as folder:
            started = time.monotonic()
            write_hashed(Path(folder) / "checkpoint", [bytes(2**16)] * math.ceil(part / 2**16))
            return size / part * (time.monotonic() - started)
    except OSError:
        return 0.0


def take_turns(config: Config, candidate: Config, shape: GPTConfig, seconds: float) -> dict:
    """Measure both here, in turn (A B, B A, A B, ...), so that a machine that slows down slows both."""
    rows = config.plan(shape).total_batch_size // shape.sequence_len
    trainers, times = [make_trainer(each, shape) for each in (config, candidate)], ([], [])

    def stretch(trainer, steps: int) -> float:
        """Seconds of a whole step of the run, on average over so many."""
        plan = trainer.plan
        return statistics.fmean(rows / plan.micro_batch_size * micro + update for micro, update in take_steps(trainer, steps))
    for trainer in trainers:
        take_steps(trainer, 1)
    began = time.monotonic()
    for trainer in trainers:
        take_steps(trainer, 1)
    steps = math.ceil(2 * STRETCH_SECONDS / (time.monotonic() - began))
    load, started = OtherLoad(), time.monotonic()
    while time.monotonic() - started < seconds or len(times[0]) < ROUNDS:
        for side in ((0, 1), (1, 0))[len(times[0]) % 2]:
            times[side].append(stretch(trainers[side], steps))
    for trainer in trainers:
        trainer.loader.close()
    return timing.speedup(times[1], times[0]) | {"other_load": load.share()}


def take_steps(trainer, count: int) -> list[tuple[float, float]]:
    """Seconds of a micro-batch and of the rest of the step, for so many steps in which nothing was compiled; of any, where too
    many were."""
    found, tries = [], MOST_COMPILED + count
    while len(found) < count:
        result, tries = trainer.finalize_step(trainer.launch_step()), tries - 1
        trainer.state.features.after_step(result.step, result.loss, result.time)
        spent, parts = result.time.total, (result.time.forward, result.time.backward)
        passes = spent if None in parts else sum(parts)  # not known on Apple GPUs: all of the step
        if not result.compiled or tries < count - len(found):
            found.append((passes / trainer.plan.horizon.grad_accum_steps, spent - passes))
    return found


def make_trainer(config: Config, shape: GPTConfig):
    """A Trainer at step 0 of a run on random tokens, with at most two micro-batches of --device-batch-size a step."""
    from nanochat.runtime.compute_dtype import pick_compute_dtype
    from nanochat.runtime.device import init_device
    from nanochat.training.build import build_trainer, plan_of
    short = copy.deepcopy(config)
    micro_batch = config.horizon.device_batch_size * shape.sequence_len
    short.horizon.total_batch_size = micro_batches(config, shape) * micro_batch
    short.horizon.num_iterations = config.plan(shape).num_iterations
    short.features["progressive_depth"].initial_depth = 0  # whole steps need the most memory, and a run ends with them
    device, ranks = init_device(config.run.device_type)
    dtype, _ = pick_compute_dtype(device, config.run.dtype)
    features = Features(short, FEATURES)
    tokens = RandomTokens(shape.vocab_size, short.horizon.total_batch_size)
    trainer = build_trainer(plan_of(short, device, ranks, dtype, features, None, tokens, shape, short.plan(shape)), features)
    trainer.loader.start(0)
    return trainer


class RandomTokens:
    """In the place of a TokenDataset: documents of random tokens, more than `least` of them. Small ids are more frequent, as
    those of a real tokenizer are."""

    def __init__(self, vocab_size: int, least: int):
        import numpy as np
        self.tokens = (vocab_size * np.random.default_rng(0).random(TOKENS) ** 2).astype(np.uint32)
        self.lengths, self.copies = np.full(DOCUMENTS, TOKENS // DOCUMENTS), 2 + 2 * least // TOKENS

    def split(self, name: str):
        from nanochat.dataset import Split
        return Split([self.tokens] * self.copies, [self.lengths] * self.copies, bos=0)
