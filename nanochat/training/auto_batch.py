"""When memory runs out: how devices say so, what to advise, and the largest micro-batch that fits.

A number of rows that was typed (--device-batch-size) is taken as it is. Without one, and under --auto-batch, it is the most that
may be taken: the largest divisor is, whose step and evaluation fit.
"""

from functools import partial

import torch

from nanochat.common import UserError, print0
from nanochat.recipe import memory_estimate
from nanochat.runtime.device import evaluation
from nanochat.runtime.distributed import all_ranks_true
from nanochat.runtime.toolchain import cause_of
from nanochat.training.state import RunPlan, TrainState
from nanochat.training.step import trial_step

SCARCE = 2**28  # bytes of main memory; where less is left, an error that does not say why is put down to that


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways in which devices, the C++ side and Python say that memory is used up."""
    cause = cause_of(error)
    said = str(cause).lower()
    if isinstance(cause, RuntimeError) and "could not create a primitive" in said:  # oneDNN, for this reason and for others
        return memory_estimate.host_memory(available=True) < SCARCE
    return isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(cause, (RuntimeError, OSError)) and any(words in said for words in (
            "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
            "can't start new thread", "storage size calculation overflowed")))


def memory_limit(device: torch.device) -> int:
    """Bytes of memory that a run on this device may use in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_estimate.host_memory(available=False)


def out_of_memory_advice(plan: RunPlan | None) -> str:
    """What to do after a run was out of memory; without a plan, because its text was still being read."""
    if plan is None:
        return "Read less text (--max-chars), or free memory."
    return memory_estimate.advice(plan.shape, plan.micro_batch_size, memory_limit(plan.device), plan.memory)


def check_memory(plan: RunPlan) -> None:
    """Raise a MemoryError, before the model is built, where a run cannot fit. Trying it could take the whole machine down: a
    process may be promised more memory than there is, and is ended by the system when it uses it.

    It cannot fit where the device does not hold what every way to train needs: weights, gradients, moments, and the residual
    stream of a micro-batch; on a CPU also half of what is estimated for the logits. (The blocks' activations do not count: a
    frozen prefix keeps none.)
    """
    rows = 1 if plan.config.horizon.takes_what_fits else plan.micro_batch_size
    estimate, limit = memory_estimate.estimate_memory(plan.shape, rows, plan.memory), memory_limit(plan.device)
    residual_stream = rows * plan.shape.sequence_len * plan.shape.n_embd * plan.dtype.itemsize
    least = estimate.weights + estimate.gradients + estimate.moments + residual_stream
    least = max(least, memory_estimate.all_weights(plan.shape, plan.memory))  # as the model is built, before ranks divide it
    if plan.device.type == "cpu":  # a GPU's allocator refuses what it does not have
        least += estimate.logits // 2
    if least > limit:
        raise MemoryError(f"at least {memory_estimate.gib(least)} are needed, and there are {memory_estimate.gib(limit)}")


def choose_micro_batch_size(plan: RunPlan, state: TrainState) -> int:
    """The largest micro-batch that fits on every rank, of those that divide --device-batch-size: on CUDA without the compiler
    tried, elsewhere estimated.

    Tried means a step and an evaluation on tokens that are all 0; weights, moments and feature states stay as they are. A
    compiled step cannot be tried without compiling it for each size; an uncompiled one in its place would take far more memory
    (its logits eight times as much) and so would halve the micro-batch for nothing. Its estimate was within 4 % of the peaks.
    Nor is one tried where ranks divide the weights: one that is out of memory would leave the others waiting.
    """
    rows = plan.config.horizon.device_batch_size
    if plan.device.type == "cuda" and not plan.compile and not state.sharding.divides_weights:
        fits = partial(fits_in_memory, plan, state)
    else:
        fits = partial(estimated_to_fit, plan, memory_at_hand(plan))
    candidates = memory_estimate.micro_batches(rows, plan.shape.sequence_len)
    chosen = next((n for n in candidates if all_ranks_true(fits(n), plan.device)), None)
    if chosen is None:
        raise UserError(f"no micro-batch fits. {out_of_memory_advice(plan)} To try all the same, give --device-batch-size a "
                        "number, without --auto-batch.")
    print0(f"micro-batches of {chosen} rows" + (f", as {rows} would need more memory than there is" if chosen < rows else ""))
    return chosen


def estimated_to_fit(plan: RunPlan, available: int, rows: int) -> bool:
    """Whether `rows` fit in so many bytes by the estimate. On CUDA an evaluation has to fit, too: it runs uncompiled."""
    fits = memory_estimate.largest_fit(plan.shape, [rows], available, plan.memory) is not None
    return fits and (plan.device.type != "cuda"
                     or memory_estimate.evaluation_memory(plan.shape, rows, plan.memory) <= memory_estimate.MARGIN * available)


def memory_at_hand(plan: RunPlan) -> int:
    """Bytes that a rank may use in all. Without --auto-batch a CPU's memory counts as a whole, whatever other programs use just
    now: the same command must give the same micro-batches, and so the same bits."""
    if plan.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(plan.device)
        return free + torch.cuda.memory_reserved(plan.device)  # the model is there already, and counts in the estimate too
    memory = memory_estimate.host_memory(available=plan.config.horizon.auto_batch)
    return memory // plan.ranks.local_world_size


def fits_in_memory(plan: RunPlan, state: TrainState, rows: int) -> bool:
    """Whether an uncompiled step and an evaluation with micro-batches of `rows` find the memory they need."""
    model, optimizer = state.model, state.optimizer
    try:
        tokens = torch.zeros((rows, plan.shape.sequence_len), dtype=torch.int64, device=plan.device)
        trial_step(model, optimizer, tokens)
        with evaluation(model), state.features.eval_context(model):
            model(tokens, tokens, loss_reduction="none")
        return True
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        return False
    finally:
        state.sharding.zero_grad()
        optimizer.state.clear()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
