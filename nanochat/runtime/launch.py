"""torchrun with a line instead of a traceback: `python -m nanochat.runtime.launch --nproc_per_node=2 -m scripts.base_train ...`

The flags are torchrun's. When a process fails, the launcher ends with its exit status. What the process could not say itself,
because it was killed, the launcher says: rank, machine, process, signal. With --max-restarts=N all ranks are started again, up
to N times; they go on from their last checkpoint. A wrong flag or a missing file would only fail again, and starts nothing.

Everything ends within a minute, even if a process is stopped or the network is gone.
"""

import logging
import os
import platform
import signal
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded: no warnings in C++'s words

from torch.distributed import DistNetworkError, run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from nanochat.cli.launch_environment import ATTEMPT, LAUNCHER, USER_ERROR, PeerLost

SECONDS_TO_END = 8  # that ranks have which another one has given up: they wait for it, or are stopped
SECONDS_TO_SAVE = 120  # that ranks have after a SIGTERM to the launcher, which they end with a checkpoint
STUCK = 10.0        # seconds after the end of a process without the launcher's having noticed: it waits for the network


class Agent(LocalElasticAgent):
    """torchrun's supervisor of the processes of one machine, which also says how they ended.

    failed: rank -> exit status of the processes that failed by themselves; the others were then ended.
    """

    def _start_workers(self, worker_group: WorkerGroup) -> dict:
        # in the store of the launchers, where each rendezvous has its own names, except for --rdzv-backend=static
        key = f"nanochat/attempt{worker_group.spec.max_restarts - self._remaining_restarts}"
        store: Any = worker_group.store
        if worker_group.group_rank == 0:
            store.set(key, uuid.uuid4().hex)
        os.environ[ATTEMPT] = store.get(key).decode()
        started = super()._start_workers(worker_group)
        self.failed: dict[int, int] = {}
        processes: Any = self._pcontext  # Any: torch's types do not know what it is after a start
        close, self.processes = processes.close, processes

        def close_after_a_word(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            if not self.failed:
                self.note_failures(worker_group)
            close(death_sig, SECONDS_TO_END if PeerLost.status in self.failed.values() else timeout)
        processes.close = close_after_a_word  # which torch calls as soon as a process has failed
        return started

    def note_failures(self, worker_group: WorkerGroup) -> None:
        """Remember which processes have failed, say what they could not say themselves, and whether they are started again."""
        for local_rank, handler in self.processes.subprocess_handlers.items():
            if status := handler.proc.poll():
                rank = worker_group.workers[local_rank].global_rank
                self.failed[rank] = status
                if status < 0:
                    say(f"rank {rank} (process {handler.proc.pid} on {platform.node()}) was ended by {signal_name(-status)}")
        if USER_ERROR in self.failed.values():  # a wrong flag, a missing file: it would fail again
            self._remaining_restarts = 0
        if self.failed and self._remaining_restarts:
            most = worker_group.spec.max_restarts
            say(f"starting all ranks again: {most - self._remaining_restarts + 1} of {most}")

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and self.failed:
            result.failures = {rank: found for rank, found in result.failures.items() if rank in self.failed} or result.failures
        return result


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def signal_name(number: int) -> str:
    known = {signum.value: signum.name for signum in signal.Signals}
    return f"signal {number}" + (f" ({known[number]})" if number in known else "") \
        + (": by hand, or by the system because memory was short" if known.get(number) == "SIGKILL" else "")


def exit_status(failures: dict[int, ProcessFailure]) -> int:
    """The status of the first process to fail, but for those that only say that another one did."""
    first = min(failures.values(), key=lambda failure: (failure.exitcode == PeerLost.status, failure.timestamp))
    return first.exitcode if first.exitcode > 0 else 128 - first.exitcode


def end_if_stuck() -> None:
    """End the launcher where a process of it has ended, and it does not come to see that: it asks other machines' launchers for
    news, and the network is down."""
    since = None
    while True:
        time.sleep(1.0)
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # there is none
            found = None
        since = (since or time.monotonic()) if found else None
        if since and time.monotonic() - since > STUCK:
            for child in children():
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            os._exit(PeerLost.status)


def children() -> list[int]:
    """The processes that this one has started and that still run; none where there is no /proc."""
    return [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


def main() -> int:
    for name in list(logging.root.manager.loggerDict):  # torch gives each its own level
        if name.startswith(("torch.distributed.run", "torch.distributed.elastic")):
            # how many threads it sets, which signal it got, which process it ended, what the store did not answer
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[LAUNCHER] = "1"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    vars(api)["LocalElasticAgent"] = Agent  # where launch_agent looks for it
    if hasattr(os, "waitid"):
        threading.Thread(target=end_if_stuck, daemon=True).start()
    args = run.parse_args(None)
    if args.rdzv_id == "none" and args.nnodes == "1":  # of several machines all must say the same
        args.rdzv_id = str(uuid.uuid4())  # by which a run that is started again knows its own folder
    try:
        run.run(args)
    except ChildFailedError as e:
        return exit_status(e.failures)
    except SignalException as e:
        return 128 + e.sigval
    except socket.gaierror as e:
        say(f"error: a host name cannot be resolved ({e.strerror}): that of --rdzv-endpoint, or this machine's own, "
            f"{platform.node()}. Write the address for the name, with each machine's own in --local-addr, or add both to "
            "/etc/hosts.")
        return USER_ERROR
    except (RendezvousError, DistNetworkError) as e:
        say(f"error: {platform.node()} cannot reach the launchers of the other machines at {args.rdzv_endpoint}: {e}")
        return PeerLost.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
