"""When memory runs out: how devices say so, what to advise, and which micro-batch to take so that it does not."""

from dataclasses import replace

import torch

from nanochat.common import UserError, print0
from nanochat.recipe import memory_estimate as planner
from nanochat.runtime.device import evaluation
from nanochat.runtime.distributed import all_ranks_true
from nanochat.runtime.toolchain import cause_of


def out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways in which devices, the C++ side and Python say that memory is used up."""
    cause = cause_of(error)
    said = str(cause).lower()
    return isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(cause, (RuntimeError, OSError)) and any(words in said for words in (
            "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
            "can't start new thread", "storage size calculation overflowed")))


def memory_limit(device) -> int:
    """Bytes of memory that a run on this device may have in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return planner.host_memory(available=False)


def advice(run) -> str:
    """What to do after `run` ran out of memory, be it while it was built."""
    if run.shape is None:
        return "Read less text (--max-chars), or free memory."
    return planner.advice(run.shape, run.config.horizon.device_batch_size, memory_limit(run.device), how(run))


def check_memory(run) -> None:
    """MemoryError, before the model is built, where not even what every way to train needs has room on the device: weights,
    gradients, moments, and the residual stream of a micro-batch. To find out by trying may take the whole machine along: what
    a process is promised and what it can use are two things."""
    rows = 1 if run.config.horizon.auto_batch else run.config.horizon.device_batch_size
    plan, limit = planner.plan_memory(run.shape, rows, how(run)), memory_limit(run.device)
    stream = rows * run.shape.sequence_len * run.shape.n_embd * run.dtype.itemsize
    least = plan.weights + plan.gradients + plan.moments + stream
    if least > limit:
        raise MemoryError(f"at least {planner.gib(least)} are needed, and there are {planner.gib(limit)}")


def how(run) -> planner.How:
    """What the planner wants to know of a run."""
    return planner.How(run.dtype.itemsize, run.compile, cuda=run.device.type == "cuda", **run.features.memory())


def choose_micro_batch(run) -> int:
    """The largest micro-batch, of those that divide --device-batch-size, that fits: on CUDA tried, elsewhere estimated.

    Tried means a step and an evaluation on tokens that are all 0; weights, moments and feature states stay as they are.
    """
    candidates = planner.micro_batches(run.config.horizon.device_batch_size)
    if run.device.type == "cuda":
        fits = next((n for n in candidates if all_ranks_true(survives(run, n), run.device)), None)
    else:
        available = planner.host_memory(available=True) // run.ranks.world_size  # the ranks share the machine
        fits = planner.largest_fit(run.model.config, candidates, available, how(run))
    if fits is None:
        raise UserError(f"--auto-batch: no micro-batch fits. {advice(run)}")
    print0(f"--auto-batch: {fits} rows per micro-batch")
    return fits


def take_micro_batch(run, rows: int) -> None:
    """Let a run train with micro-batches of `rows`; tokens per step stay as they are."""
    run.config.horizon.device_batch_size = rows
    micro = rows * run.model.config.sequence_len * run.ranks.world_size
    run.horizon = replace(run.horizon, grad_accum_steps=run.horizon.total_batch_size // micro)


def survives(run, rows: int) -> bool:
    """Whether a step, as it is trained but uncompiled, and an evaluation with micro-batches of `rows` find the memory."""
    model = run.model
    try:
        tokens = torch.zeros((rows, model.config.sequence_len), dtype=torch.int64, device=run.device)
        for _ in range(2):  # the second micro-batch finds the first one's gradients there
            model(tokens, tokens).backward()
        run.optimizer.step(finite=torch.zeros((), dtype=torch.bool, device=run.device))
        with evaluation(model), run.features.eval_context(model):
            model(tokens, tokens, loss_reduction="none")
        return True
    except Exception as e:
        if not out_of_memory(e):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        run.optimizer.state.clear()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
