"""A rank that is killed, hangs or is preempted: who ends, how soon, what is said, and how training goes on."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dev.two_hosts import Flags, play, unavailable_reason
from nanochat.cli.launch_environment import PeerLost
from nanochat.cli.paths import list_steps
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.runtime import heartbeat
from nanochat.runtime.heartbeat import ENDED, Heart
from nanochat.training import loop, run_folder
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from processes import started, tiny_flags, train_and_exit

ROOT = Path(__file__).parents[2]
TINY = ("--depth=1 --head-dim=16 --aspect-ratio=32 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
        "--warmup-steps=2 --eval-every=-1 --core-metric-every=-1 --sample-every=-1 --vocab-size=300 --device-type=cpu "
        "--dtype=float32 --no-compile --num-iterations=100000").split()
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of ranks in /proc")


class Launched:
    """A run of two ranks by the launcher. lines: what all of them have printed so far."""

    def __init__(self, base, tag, *flags, launcher=(), **environment):
        self.run_dir = base / "base_checkpoints" / tag
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat.runtime.launch", "--standalone", "--nproc-per-node=2", *launcher, "-m",
             "scripts.base_train", *TINY, f"--data={base / 'text'}", f"--model-tag={tag}", *flags],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"} | environment)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(iter(self.process.stdout.readline, "")), daemon=True)
        self.reader.start()

    def wait_for(self, done):
        """Wait until `done()`; the end of the processes is a failure."""
        while not done():
            assert self.process.poll() is None, self.text()
            time.sleep(0.05)

    def trains(self):
        rows = self.run_dir / "metrics.jsonl"
        self.wait_for(lambda: rows.exists() and len(rows.read_bytes().splitlines()) > 2)
        return self

    def pid(self, rank):
        """The process of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(pid) for pid in children
                    if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))

    def end(self):
        """The exit status of the launcher."""
        try:
            status = self.process.wait(60)
        finally:
            self.process.kill()
        self.reader.join(10)
        assert "Traceback" not in self.text(), self.text()
        return status

    def text(self):
        return "".join(self.lines)


# ---- a whole run

@pytest.mark.slow
@needs_proc
def test_a_run_survives_a_rank_that_is_killed_and_ends_with_one_that_hangs(base):
    """One run for both, as starting processes is what takes the time."""
    run = Launched(base, "survivor", "--save-every=2", "--keep-last=1", launcher=["--max-restarts=1"], NANOCHAT_PATIENCE="6")
    run.trains()
    run.wait_for(lambda: list_steps(run.run_dir))
    killed = run.pid(1)
    os.kill(killed, signal.SIGKILL)
    run.wait_for(lambda: "resumed" in run.text())
    run.wait_for(lambda: "lr x" in run.lines[-1])
    stopped, begun = run.pid(1), time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    assert run.end() == PeerLost.status
    assert time.monotonic() - begun < 30, "6 s of patience, and not the 30 s that torch gives a process to end"
    assert not Path(f"/proc/{stopped}").exists()

    said = [line for line in run.lines if line.startswith("error:") or "was ended by" in line or "starting" in line]
    assert len(said) == 3, run.text()
    assert f"rank 1 (process {killed} on " in said[0] and "was ended by signal 9 (SIGKILL)" in said[0]
    assert said[1] == "starting all ranks again: 1 of 1\n"
    assert f"rank 1 (process {stopped} on " in said[2] and "gave no sign of life for 6 s" in said[2]
    assert int(re.search(r"resumed .* at step (\d+)", run.text())[1]) >= 2


@pytest.mark.slow
def test_two_machines_that_lose_each_other_both_end(base, monkeypatch):
    """Network namespaces stand for machines (dev/two_hosts.py)."""
    if reason := unavailable_reason():
        pytest.skip(reason)
    monkeypatch.setenv("NANOCHAT_PATIENCE", "6")
    train = [*TINY, f"--data={base / 'text'}", "--model-tag=apart"]
    first, second = play(Flags(train=shlex.join(train), pull_at=3), base / "base_checkpoints" / "apart", show=False)
    assert first.process.returncode == second.process.returncode == PeerLost.status
    assert max(first.ended, second.ended) < 30
    for host, lost in (first, "rank 1 (process "), (second, "rank 0 (process "):
        said = [line for line in host.lines if "error:" in line]
        assert len(said) == 1 and lost in said[0] and "Traceback" not in "".join(host.lines), host.lines


def in_trouble(number, port, base, log, error):
    """One of two ranks. Rank 1 alone meets the error, in the evaluation after step 3."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "NANOCHAT_BASE_DIR": str(base), "NANOCHAT_PATIENCE": "3"}
    loop.program.SECONDS_FOR_RANK_0 = 0.5
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    loop.IN_TROUBLE = 0.5
    run = build_run(parse_config(FEATURES, tiny_flags(base, "in-trouble", "--num-iterations=9", "--dtype=float32",
                                               "--overwrite")))
    evaluate = run.evaluator.bits_per_byte

    def evaluate_or_fail():
        if number and run.state.step:
            raise error
        evaluate()
    run.evaluator.bits_per_byte = evaluate_or_fail
    train_and_exit(run)


@pytest.mark.slow
@pytest.mark.parametrize("error, said, status", [
    (MemoryError("played"), "oom: rank 1: out of memory.", 1),
    (UserError("its disk is full"), "failed: rank 1: its disk is full\n", 2)])
def test_what_one_rank_meets_alone_is_said(base, tmp_path, error, said, status):
    """Nothing is saved, as the other rank is in the evaluation; nobody waits for that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [started(in_trouble, number, port, base, tmp_path / str(number), error) for number in range(2)]
    for process in processes:
        process.join(90)
    assert [process.exitcode for process in processes] == [PeerLost.status, status]
    assert (tmp_path / "1").read_text().startswith(said)
    run_dir = base / "base_checkpoints" / "in-trouble"
    result = json.loads((run_dir / "result.json").read_text())
    assert result["exit_code"] == PeerLost.status and f"{result['status']}: {result['error']}".startswith(said.rstrip())
    assert not list(run_dir.glob(".step*")) and not list_steps(run_dir)


# ---- which checkpoint a run goes on from

@pytest.mark.parametrize("launch, attempt, trained, wanted, found", [
    ("mine", 0, True, "auto", "latest"), ("mine", 0, False, "auto", "-1"), ("other", 0, True, "auto", "latest"),
    ("mine", 1, True, "-1", "latest"), ("mine", 1, False, "-1", "-1"), ("mine", 1, True, "2", "latest"),
    ("mine", 0, True, "-1", "-1"), ("other", 1, True, "-1", "-1"), ("none", 1, True, "-1", "-1"), ("other", 1, True, "2", "2")])
def test_what_a_run_goes_on_from(tmp_path, monkeypatch, launch, attempt, trained, wanted, found):
    """A run that torchrun has started again goes on with what it has trained itself, and with nobody else's."""
    (tmp_path / "config.json").write_text(json.dumps({"launch": "mine"}))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    if trained:
        (tmp_path / "step_000004").mkdir()
    assert run_folder.step_to_resume(tmp_path, wanted) == found


# ---- the beats: three ranks in one process, which end themselves instead of it

PATIENCE = 1.5


class Network:
    """A store that all ranks share, and that some of them cannot reach for a while."""

    def __init__(self):
        from torch.distributed import HashStore
        self.store, self.cut_off = HashStore(), set()

    def connection(self, rank):
        def connect(seconds):
            return Connection(self, rank)
        return connect


class Connection:
    def __init__(self, network, rank):
        self.network, self.rank = network, rank

    def __getattr__(self, name):
        if self.rank in self.network.cut_off:
            raise RuntimeError("no route to host")
        return getattr(self.network.store, name)


class Rank(Heart):
    """why: what it would have said at its end."""
    why = None

    def end(self, why):
        self.why = why
        self.over.set()


@pytest.fixture
def ranks():
    network = Network()
    found = [Rank(rank, 3, network.connection(rank), PATIENCE) for rank in range(3)]
    for rank in found:
        rank.network = network
        rank.start()
    wait(lambda: all(len(rank.lines) == 3 for rank in found))
    yield found
    network.cut_off.clear()
    for rank in found:
        rank.stop()


def wait(done, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_both_sides_of_a_network_that_is_down_end_and_name_the_other(ranks, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setattr(heartbeat.platform, "node", lambda: "here")
    ranks[0].network.cut_off.add(2)
    wait(lambda: all(rank.why for rank in ranks))
    assert all("rank 2 (process" in rank.why and "no sign of life" in rank.why for rank in ranks[:2])
    assert "no connection" in ranks[2].why and "10.0.0.1" in ranks[2].why
    assert ranks[0].speaks() and not ranks[1].speaks(), "one line for a machine"


def test_a_shorter_interruption_costs_nothing(ranks):
    ranks[0].network.cut_off.add(2)
    time.sleep(PATIENCE * 0.6)
    ranks[0].network.cut_off.clear()
    time.sleep(PATIENCE)
    assert [rank.why for rank in ranks] == [None] * 3


def test_one_that_has_left_in_good_order_is_not_missed(ranks):
    ranks[2].stop()
    time.sleep(PATIENCE * 1.5)
    assert ranks[0].why is None and ranks[0].lines[2]["beat"] == ENDED


def test_who_is_gone_is_found_after_a_collective_has_failed(ranks):
    ranks[0].network.cut_off.add(2)
    time.sleep(3 * ranks[0].every)
    assert re.fullmatch(r"rank 2 \(process \d+ on .+\) is gone", ranks[0].who_is_gone(lambda: False))
    assert ranks[1].who_is_gone(lambda: False) == "", "rank 0 says it"
    assert ranks[0].who_is_gone(lambda: True) == "", "the launcher says it"
