"""Ranks and collectives: the only module that imports torch.distributed (beside the launcher, runtime/launch.py).

Every function here has a plain meaning for a process without a process group: it is rank 0 of one.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from nanochat.common import RankError, UserError, is_main_rank

PATIENCE = timedelta(seconds=60)  # of one look at the store; then the next one follows
_turns = count()


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that torchrun started; by default alone."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        return cls(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))))


def is_distributed() -> bool:
    """Whether this process is one of a process group."""
    return dist.is_initialized()


def join_process_group(ranks: Ranks, device: torch.device) -> None:
    """Join the process group of torchrun, by NCCL on CUDA and Gloo elsewhere; nothing to do for one process.

    Raises: RankError where the other ranks cannot be reached.
    """
    if ranks.world_size == 1 or dist.is_initialized():
        return
    on_gpus = device.type == "cuda"
    try:
        dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    except dist.DistError as e:
        raise RankError(f"rank {ranks.rank} cannot join the others at MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT="
                        f"{os.environ['MASTER_PORT']}: {str(e).splitlines()[0]}") from None


def leave_process_group() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_object(value):
    """Rank 0's value, any that can be pickled, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_ranks_true(value: bool, device: torch.device) -> bool:
    """Whether it is true on all ranks."""
    if not dist.is_initialized():
        return value
    answer = torch.tensor(int(value), device=device)
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer.item())


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean_and_max(means: list[torch.Tensor], maximum: torch.Tensor) -> None:
    """Replace the tensors `means` by their means over the ranks, and `maximum` by the largest of any rank, in place.

    Every rank must give tensors of the same shapes in the same order. All travel at once, so that their waits overlap.
    """
    if not dist.is_initialized():
        return
    handles = [dist.all_reduce(tensor, async_op=True) for tensor in means]
    for handle in [*handles, dist.all_reduce(maximum, dist.ReduceOp.MAX, async_op=True)]:
        handle.wait()
    torch._foreach_div_(means, dist.get_world_size())


def on_main_rank_first(work: Callable, others: Callable | None = None):
    """Run `work` on rank 0, then `others` (by default the same work, which finds done what it leaves on disk) on the rest.

    Rank 0 may take hours, to prepare text say: the rest wait at the store of the process group, where no collective's timeout
    runs. If rank 0 fails, all do, and rank 0 says why; what fails on another rank alone is said by that rank.
    """
    if not is_distributed():
        return work()
    store, key = dist.distributed_c10d._get_default_store(), f"nanochat/turn{next(_turns)}"
    if is_main_rank():
        try:
            result = work()
        except BaseException as e:
            store.set(key, f"failed: {e}")
            raise
        store.set(key, "done")
        return result
    while True:
        try:
            store.wait([key], PATIENCE)
            break
        except dist.DistStoreError as e:
            if "timeout" not in str(e).lower():
                raise
    if (answer := store.get(key).decode()) != "done":
        raise UserError(answer)
    try:
        return (others or work)()
    except UserError as e:
        raise RankError(f"rank {dist.get_rank()}: {e}") from None
