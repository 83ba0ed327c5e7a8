"""torchrun without a traceback of its own: `python -m nanochat.runtime.launch --nproc_per_node=2 -m scripts.base_train ...`

The flags are torchrun's. When a process fails, the launcher ends with that process's exit status and prints nothing: the process
has printed what was wrong.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    for name in ("run", "elastic.multiprocessing.api"):  # how many threads it sets, and which process it ended
        logging.getLogger(f"torch.distributed.{name}").setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode < 0:  # killed by a signal: it could say nothing itself
            print(f"rank {rank} was ended by signal {-failure.exitcode}", file=sys.stderr, flush=True)
            return 128 - failure.exitcode
        return failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
