"""A sign of life from every rank, so that a run ends, and says why, when one is gone: killed, stopped, or cut off.

A collective waits for a rank that will never come: Gloo half an hour, NCCL ten minutes, and neither says which rank it was. So
each rank writes a beat to the store of the process group every few seconds, and reads those of the others. One whose beat
stands still for PATIENCE seconds is named, and this process ends with the status of PeerLost, for a launcher to start all again.
The beats come from a thread: a rank that prepares text, compiles or samples for an hour is as alive as one that trains.

Two threads: one talks to the store, and may be stuck in that when the network is down; the other judges. A network that comes
back within PATIENCE costs nothing: the first one opens a new connection each time an answer is overdue, because TCP itself
would try an old one again after ever longer pauses.
"""

import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress

from nanochat.cli.launch_environment import PeerLost, under_our_launcher

PATIENCE = 45.0  # seconds without a beat; a network may be down for 30 of them, and launchers want to end within 60
BEATS = 15       # in the time of PATIENCE
STARTING = 20    # times PATIENCE: for a rank that has never beaten; it may be reading its programs from a slow disk
WORD_SECONDS = 1.0  # for each answer of the store to a rank that is about to end
ENDED = "ended"  # instead of a number: this rank has left in good order

# What a collective or the store says of a peer that is gone: Gloo, NCCL and the store of the process group
BROKEN = re.compile("closed by peer|reset by peer|broken pipe|connection refused|connection was (?:closed|aborted)|"
                    "failed to recv|failed to send|timed out|no route to host|network is unreachable|remote process exited|"
                    "ncclRemoteError|ncclSystemError|socket error|heartbeat", re.IGNORECASE)

_heart: "Heart | None" = None


def start(ranks, connect: Callable) -> None:
    """Begin to beat, in the process of one of several ranks.

    ranks: with rank and world_size. connect: `(seconds) -> store`, a new connection to a store that all ranks share; a call of
    it, or of the store, that takes longer fails.
    """
    global _heart
    _heart = Heart(ranks.rank, ranks.world_size, connect, float(os.environ.get("NANOCHAT_PATIENCE") or PATIENCE))
    _heart.start()


def stop() -> None:
    """Stop beating, in good order; nothing where there is no beat."""
    global _heart
    if _heart:
        _heart.stop()
        _heart = None


def leave_word(status: str, error: str) -> None:
    """Say at the store why this rank is about to end, for the result.json that rank 0 writes; nothing where there is no beat."""
    if _heart:
        _heart.leave_word(status, error)


def word_of_another() -> tuple[str, str] | None:
    """Status and error with which another rank has ended, the lowest of those that have said so; None where none has."""
    return _heart.word_of_another() if _heart else None


class Heart:
    """The beats of this rank, and what it knows of the others'.

    lines: what each rank has said last: {"host", "pid", "beat"}. ages: seconds without a new beat, of each rank.
    """

    def __init__(self, rank: int, world_size: int, connect: Callable, patience: float):
        self.rank, self.world_size, self.connect, self.patience = rank, world_size, connect, patience
        self.every = patience / BEATS
        self.lines: dict[int, dict] = {}
        self.ages = dict.fromkeys(range(world_size), 0.0)
        self.reads = 0                          # of all beats
        self.silence = 0.0                      # seconds since the store has answered; counted once it has
        self.said = False                       # why this process ends, or that another process says so
        self.over = threading.Event()
        self.threads = [threading.Thread(target=work, name=f"heartbeat-{work.__name__}", daemon=True)
                        for work in (self.beat, self.judge)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.over.set()
        self.threads[0].join(2 * self.every)  # it says goodbye, unless the store is gone

    # --- the first thread

    def beat(self) -> None:
        """Write and read beats until it is over."""
        store, number, last = None, 0, time.monotonic()
        while True:
            ended = self.over.wait(self.every if number else 0)
            try:
                store = store or self.connect(max(1.0, 2 * self.every))
                number += 1
                line = {"host": platform.node(), "pid": os.getpid(), "beat": ENDED if ended else number}
                store.set(f"beat{self.rank}", json.dumps(line))
                if ended:
                    return
                names = {rank: f"beat{rank}" for rank in range(self.world_size)}
                seen = [rank for rank in names if rank in self.lines or store.check([names[rank]])]
                answers = store.multi_get([names[rank] for rank in seen])
            except Exception:  # torch has many, for a connection that is refused, reset, overdue
                store = None
                if ended:
                    return
                continue
            now = time.monotonic()
            # a pause of this process, such as Ctrl-Z, or of the network, is no silence of the others
            self.note(dict(zip(seen, map(json.loads, answers), strict=True)), min(now - last, 2 * self.every))
            last = now

    def note(self, lines: dict[int, dict], seconds: float) -> None:
        """Take in what all have said, `seconds` after the last time."""
        for rank in range(self.world_size):
            line = lines.get(rank)
            silent = line == self.lines.get(rank) and (line is None or line["beat"] != ENDED)
            self.ages[rank] = self.ages[rank] + seconds if silent else 0.0
        self.lines |= lines
        self.reads, self.silence = self.reads + 1, 0.0

    # --- the second thread

    def judge(self) -> None:
        """End this process when another rank, or the store, has been silent for too long."""
        last = time.monotonic()
        while not self.over.wait(self.every / 2):
            now = time.monotonic()
            if self.reads:
                self.silence += min(now - last, self.every)  # see above: this process may have been stopped
            last = now
            lost = [rank for rank, age in self.ages.items()
                    if age > self.patience * (1 if rank in self.lines else STARTING)]
            if lost or self.silence > self.patience:
                self.end(self.describe(lost))

    def describe(self, lost: list[int]) -> str:
        """What is wrong, in words: these ranks are silent, or where there are none the store, which is another machine's."""
        if any(rank not in self.lines for rank in lost):
            return (f"rank{'s' * (len(lost) > 1)} {', '.join(map(str, lost))} did not come within "
                    f"{STARTING * self.patience / 60:.0f} minutes. All ranks end")
        if lost:
            return (f"{self.names(lost)} gave no sign of life for {self.patience:.0f} s: stopped, or cut off from the network. "
                    "All ranks end")
        elsewhere = [rank for rank, line in self.lines.items() if line["host"] != platform.node()]
        of = f", on the machine of {self.names(elsewhere)}" if elsewhere else ""
        return (f"no connection for {self.patience:.0f} s to the store at {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')}{of}: that machine, or the network, is down. The ranks of {platform.node()} end")

    def end(self, why: str) -> None:
        """End this process at once: its main thread waits in a collective. The first rank of a machine says why."""
        if self.said:
            pass
        elif self.speaks():
            print(f"error: {why}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * self.every)  # a launcher ends all as soon as one has ended: not before that has been said
        os._exit(PeerLost.status)

    # --- both

    def names(self, ranks: list[int]) -> str:
        """Ranks in words, with their processes."""
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self.lines[rank]["host"], []).append(rank)
        return " and ".join(
            f"rank{'s' * (len(own) > 1)} {', '.join(map(str, own))} (process{'es' * (len(own) > 1)} "
            f"{', '.join(str(self.lines[rank]['pid']) for rank in own)} on {host})" for host, own in hosts.items())

    def speaks(self) -> bool:
        """Whether this rank prints for its machine: the first of those there that are alive."""
        here = platform.node()
        return not any(rank < self.rank and line["host"] == here and self.ages[rank] <= self.patience / 2
                       for rank, line in list(self.lines.items()))

    def leave_word(self, status: str, error: str) -> None:
        """See the function of this name."""
        with suppress(Exception):  # torch has many; the store may be gone
            self.connect(WORD_SECONDS).set(f"word{self.rank}", json.dumps([status, f"rank {self.rank}: {error}"]))

    def word_of_another(self) -> tuple[str, str] | None:
        """See the function of this name."""
        with suppress(Exception):
            store = self.connect(WORD_SECONDS)
            for name in (f"word{rank}" for rank in range(self.world_size) if rank != self.rank):
                if store.check([name]):
                    status, error = json.loads(store.get(name))
                    return status, error
        return None

    def who_is_gone(self, stopped: Callable[[], bool]) -> str:
        """Which ranks have not beaten since a collective has failed, in words; "" where none is found, or another is to say it.

        Takes some beats' time. stopped: whether this process has been told to end: its launcher has seen which rank was first.
        """
        before, reads, deadline = dict(self.lines), self.reads, time.monotonic() + 4 * self.every
        while self.reads < reads + 3 and time.monotonic() < deadline:
            if stopped():
                return ""
            time.sleep(self.every / 10)
        gone = [rank for rank, line in self.lines.items() if rank != self.rank and line == before.get(rank)]
        if not self.speaks():
            time.sleep(self.every)
            return ""
        return f"{self.names(gone)} is gone" if gone else "the connection to another rank was lost"


@contextmanager
def lost_peers_named(stopped: Callable[[], bool] = lambda: False):
    """Raise PeerLost for what a collective says when another rank is gone. stopped: see `Heart.who_is_gone`."""
    try:
        yield
    except Exception as e:
        if not _heart or not is_broken_connection(e):
            raise
        _heart.said = True
        why = _heart.who_is_gone(stopped)
        if stopped() and under_our_launcher():
            why = ""
        said = str(e).splitlines()[0]
        raise PeerLost(f"rank {_heart.rank} ends: {why} ({said})" if why else "") from e


def is_broken_connection(error: Exception) -> bool:
    """Whether an exception is what torch raises in a collective, or at the store, when another rank is gone."""
    return isinstance(error, RuntimeError) and bool(BROKEN.search(str(error)))
