"""The variables by which torchrun, or whoever starts several processes, tells each its place. No torch.

Half of them set would train a part of a run that nobody prints or saves, so they are checked as a whole.
"""

import os
import re
from collections.abc import Mapping

from nanochat.common import RankError, UserError

LAUNCHER = "NANOCHAT_LAUNCHER"  # set by nanochat/runtime/launch.py, which says itself how its processes ended
ATTEMPT = "NANOCHAT_ATTEMPT"    # also by it: another name at each start of the processes, the same on all machines
USER_ERROR = 2  # exit status
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class PeerLost(RankError):
    """Another rank is gone. Without a message where another process says so."""
    status = 75  # of the process: EX_TEMPFAIL, after which a launcher may start all ranks again


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def restarts() -> int:
    """How often torchrun has started all ranks again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def attempt_id() -> str:
    """What the processes that were started together have in common, and those before and after them have not. Under torchrun
    itself, only what --max-restarts starts again is told apart, not what another machine's coming or leaving does."""
    return os.environ.get(ATTEMPT) or str(restarts())


def launch_id() -> str | None:
    """What all processes of one launch by torchrun have in common, those that it starts again included; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name  # torchrun's default


def under_our_launcher() -> bool:
    return LAUNCHER in os.environ


def launch_problem(environ: Mapping[str, str]) -> str | None:
    """What is wrong with the launch variables, in words; None where they are complete, or absent."""
    given = [name for name in PLACE if name in environ]
    if not given:
        return None
    remedy = f"Start several processes with torchrun, which sets them all; for one process unset {', '.join(given)}"
    for name in [*given, *(["LOCAL_WORLD_SIZE"] if "LOCAL_WORLD_SIZE" in environ else [])]:
        if not re.fullmatch("[0-9]{1,9}", environ[name]):
            return f"the environment says {name}={environ[name]!r}, which is not a whole number. {remedy}."
    if missing := [name for name in PLACE if name not in given]:
        return f"the environment has {', '.join(given)}, but not {', '.join(missing)}. {remedy}."
    rank, size, local = (int(environ[name]) for name in PLACE)
    if rank >= size:
        return f"the environment says RANK={rank}, which is not below WORLD_SIZE={size}. {remedy}."
    of_node = int(environ.get("LOCAL_WORLD_SIZE", size))
    if local > rank or local >= of_node:
        return (f"the environment says LOCAL_RANK={local}, which does not go with RANK={rank} and {of_node} processes on a "
                f"machine (LOCAL_WORLD_SIZE). {remedy}.")
    if size > 1:
        if not environ.get("MASTER_ADDR"):
            return f"the environment has WORLD_SIZE={size}, but no MASTER_ADDR, the host of rank 0. {remedy}."
        if not re.fullmatch("[0-9]{1,5}", port := environ.get("MASTER_PORT", "")) or not 0 < int(port) < 2**16:
            return f"the environment has WORLD_SIZE={size} and MASTER_PORT={port!r}, which is no port of rank 0's. {remedy}."
    return None


def check_launch_environment(parallel: bool) -> None:
    """UserError where the variables contradict each other, or ask a program for several processes that runs as one."""
    if problem := launch_problem(os.environ):
        raise UserError(problem)
    if not parallel and world_size() > 1:
        raise UserError("this program runs as one process: start it without torchrun (WORLD_SIZE is "
                        f"{os.environ['WORLD_SIZE']}).")
