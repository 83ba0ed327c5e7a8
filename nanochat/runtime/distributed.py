"""Ranks that wait for each other outside of any collective, however long that takes."""

from collections.abc import Callable
from datetime import timedelta
from itertools import count

import torch.distributed as dist

from nanochat.common import RankError, UserError, is_main_rank

PATIENCE = timedelta(seconds=60)  # of one look at the store; then the next one follows
_turns = count()


def on_main_rank_first(work: Callable, others: Callable | None = None):
    """Run `work` on rank 0, then `others` (by default the same work, which finds done what it leaves on disk) on the rest.

    Rank 0 may take hours, to prepare text say: the rest wait at the store of the process group, where no collective's timeout
    runs. If rank 0 fails, all do, and rank 0 says why; what fails on another rank alone is said by that rank.
    """
    if not dist.is_initialized():
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
