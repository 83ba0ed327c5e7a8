"""Ranks and collectives: the only module that imports torch.distributed (beside the launcher, runtime/launch.py).

Every function here has a plain meaning for a process without a process group: it is rank 0 of one.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.cli.launch_environment import attempt_id
from nanochat.common import RankError, UserError, is_main_rank
from nanochat.runtime import heartbeat

PATIENCE = timedelta(seconds=60)  # of one look at the store; then the next one follows
STORE_SECONDS = 1800.0  # torch's own limit for what ranks wait for at the store
_turns = count()


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those that torchrun started; by default alone."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # processes on this machine

    @classmethod
    def from_environment(cls) -> "Ranks":
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        return cls(*(int(os.environ.get(name, value)) for name, value in alone.items()))


def is_distributed() -> bool:
    """Whether this process is one of a process group."""
    return dist.is_initialized()


def join_process_group(ranks: Ranks, device: torch.device) -> None:
    """Join the process group of torchrun, by NCCL on CUDA and Gloo elsewhere; nothing to do for one process.

    Raises: RankError where the other ranks cannot be reached.
    """
    if ranks.world_size == 1 or dist.is_initialized():
        return
    heartbeat.start(ranks, connect_to_store)
    on_gpus = device.type == "cuda"
    try:
        own = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store when it starts all ranks again: without names of one's own, a rank may read there the
            # addresses of those that have ended
            own = {"store": connect_to_store(STORE_SECONDS), "rank": ranks.rank,
                   "world_size": ranks.world_size}
        dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None, **own)
    except dist.DistError as e:
        raise RankError(f"rank {ranks.rank} cannot join the others at MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT="
                        f"{os.environ['MASTER_PORT']}: {str(e).splitlines()[0]}") from None


def leave_process_group() -> None:
    """Leave the process group, if there is one."""
    heartbeat.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def connect_to_store(seconds: float) -> dist.Store:
    """A connection of one's own to the store of the process group; whatever takes longer than this raises a DistError."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
                          timeout=timedelta(seconds=seconds))
    return dist.PrefixStore(f"nanochat/{attempt_id()}", store)


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


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """The largest values of any rank, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def norm_over_ranks(norms: torch.Tensor) -> torch.Tensor:
    """Norms of vectors of which each rank has a part, from the norms of these parts."""
    return all_reduce_sum(norms.square()).sqrt() if dist.is_initialized() else norms


class Exchange(NamedTuple):
    """A collective under way. Its buffers must live until it has ended, so they are kept here."""
    handle: dist.Work
    received: torch.Tensor
    sent: torch.Tensor

    def wait(self) -> torch.Tensor:
        """What was received: at the end of the exchange on the host, on CUDA in the order of the current stream."""
        self.handle.wait()
        return self.received


def all_to_all_async(out: torch.Tensor, sizes: list[int]) -> Exchange:
    """Begin to send each rank its part of a row of elements.

    out: (sum of `sizes`,), the parts for ranks 0, 1, ... one after the other.   Received: (ranks x sizes[own rank],), from ranks
    0, 1, ...
    """
    rank, world_size = rank_and_world_size()
    received = out.new_empty(world_size * sizes[rank])
    handle = dist.all_to_all_single(received, out, [sizes[rank]] * world_size, sizes, async_op=True)
    return Exchange(handle, received, out)


def all_gather_async(own: torch.Tensor) -> Exchange:
    """Begin to send a row of elements to all ranks. own: (n,), with the same n on all ranks.   Received: (ranks, n)."""
    received = own.new_empty(dist.get_world_size() * own.numel())  # flat, as Gloo wants it
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    return Exchange(gather(received, own, async_op=True), received.view(-1, own.numel()), own)


def broadcast_async(tensor: torch.Tensor, owner: int) -> dist.Work:
    """Begin to send a contiguous tensor, of any shape and dtype, from its owner's memory into that of all others. It may be read
    once `wait()` of the result has returned."""
    return dist.broadcast(tensor.view(-1).view(torch.uint8), src=owner, async_op=True)  # not every backend knows every dtype


def in_step(items: Iterable, filler, device: torch.device) -> Iterator:
    """These items, and then `filler` for as long as another rank has some left: so every rank gets the same number."""
    own = iter(items)
    while True:
        item = next(own, None)
        if not all_reduce_max(torch.tensor(int(item is not None), device=device)).item():
            return
        yield filler if item is None else item


def grad_scaler(device: torch.device, enabled: bool) -> torch.amp.GradScaler:
    """Scales the loss of fp16 training. With several ranks, all of them leave out a step whose gradients overflow on any."""
    if not dist.is_initialized():
        return torch.amp.GradScaler(device.type, enabled=enabled)
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
    return ShardedGradScaler(device.type, enabled=enabled)


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
