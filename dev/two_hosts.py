"""Two hosts on one machine: train over a network of 1 Gbit/s and 1 ms, and pull the cable. Linux, as root.

    sudo .venv/bin/python -m dev.two_hosts --train "@configs/cpu-smoke.flags --device-batch-size=4 --model-tag=two"
    sudo .venv/bin/python -m dev.two_hosts --pull-at 20 --pull-for 30 --train "..."     # training goes on
    sudo .venv/bin/python -m dev.two_hosts --pull-at 20 --train "..."                   # for good: both end within 60 s
    sudo .venv/bin/python -m dev.two_hosts --pull-at 20 --launch "--nnodes=1:2 --max-restarts=1" --train "... --save-every=10"

A host is a network namespace with a name of its own; a pair of virtual network devices is the cable, shaped by tc. The hosts
share the disk, as they would share a network file system. Each runs nanochat.runtime.launch; they meet by rendezvous.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nanochat.cli.flags import flag, parse
from nanochat.cli.paths import child_environment, runs_dir
from nanochat.cli.program import cli
from nanochat.common import ROOT, UserError, format_table
from nanochat.lab.processes import last_step

HOSTS = ("node-a", "node-b")
PORT = 29400
ETC = Path("/etc/netns")
POLL_SECONDS = 0.1


@dataclass
class Flags:
    """Two hosts"""
    train: str = flag("@configs/cpu-smoke.flags --device-batch-size=4 --model-tag=two-hosts", "flags of scripts.base_train",
                      metavar='"FLAGS"')
    launch: str = flag("", "more flags of the launcher, on both hosts", metavar='"FLAGS"')
    nproc_per_node: int = flag(1, "processes of a host", low=1)
    pull_at: int = flag(-1, "pull the cable after this step; -1 never")
    pull_for: float = flag(0.0, "seconds until it is plugged in again; 0 leaves it out", low=0)
    rate: str = flag("1gbit", "of the network")
    delay: str = flag("1ms", "of the network, one way")


@dataclass
class Host:
    """A host that runs. lines: its output."""
    name: str
    process: subprocess.Popen
    lines: list[str]
    ended: float | None = None  # seconds, since the cable was pulled, or else since the start


def unavailable_reason() -> str | None:
    """Why this machine cannot play two hosts, in words; None where it can."""
    if not sys.platform.startswith("linux") or os.geteuid():
        return "network namespaces need Linux and root"
    if missing := [name for name in ("ip", "tc", "unshare") if not shutil.which(name)]:
        return f"{', '.join(missing)} not found (apt install iproute2 util-linux)"
    try:
        command(f"ip netns add {space(0)}")
        command(f"ip netns del {space(0)}")
    except UserError as e:
        return str(e)
    return None


def command(words: str) -> None:
    done = subprocess.run(shlex.split(words), capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{words}: {done.stderr.strip()}")


def device(number: int) -> str:
    return f"nano{os.getpid() % 10**6}{'ab'[number]}"  # names of devices have 15 letters at most


def space(number: int) -> str:
    return f"{HOSTS[number]}-{os.getpid()}"


@contextmanager
def network(rate: str, delay: str):
    """Two namespaces and a cable between them. Raises: UserError where the system does not let us."""
    made = []
    try:
        for number in (0, 1):
            command(f"ip netns add {space(number)}")
            made.append(space(number))
            names = ETC / space(number)  # `ip netns exec` lays what is in it over /etc
            names.mkdir(parents=True)
            (names / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{i + 1} {HOSTS[i]}\n" for i in (0, 1)))
        command(f"ip link add {device(0)} netns {made[0]} type veth peer name {device(1)} netns {made[1]}")
        for number, name in enumerate(made):
            command(f"ip -n {name} addr add 10.77.0.{number + 1}/24 dev {device(number)}")
            command(f"ip -n {name} link set lo up")
            command(f"ip -n {name} link set {device(number)} up")
            shape(name, device(number), rate, delay)
        yield
    finally:
        for name in made:
            command(f"ip netns del {name}")
            shutil.rmtree(ETC / name, ignore_errors=True)


def shape(name: str, device: str, rate: str, delay: str) -> None:
    """Limit rate and delay of a device; the rate alone, with a note, where the kernel has no netem."""
    qdisc = f"tc -n {name} qdisc add dev {device} root"
    try:
        command(f"{qdisc} netem delay {delay} rate {rate} limit 100000")
    except UserError:
        command(f"{qdisc} tbf rate {rate} burst 256kb latency 50ms")
        print("note: this kernel has no netem: the rate is limited, and there is no delay", flush=True)


def plug(up: bool) -> None:
    """Plug the cable into the second host, or pull it."""
    command(f"ip -n {space(1)} link set {device(1)} {'up' if up else 'down'}")


def start_host(number: int, flags: Flags, show: bool = True) -> Host:
    """Start the launcher on a host; its output is shown with the host's name before each line."""
    launcher = [sys.executable, "-m", "nanochat.runtime.launch", "--nnodes=2", f"--nproc-per-node={flags.nproc_per_node}",
                "--rdzv-backend=c10d", f"--rdzv-endpoint=10.77.0.1:{PORT}", "--rdzv-id=two-hosts",
                f"--local-addr=10.77.0.{number + 1}", *shlex.split(flags.launch), "-m", "scripts.base_train",
                *shlex.split(flags.train)]
    inside = f"hostname {HOSTS[number]} && exec {shlex.join(launcher)}"
    process = subprocess.Popen(
        ["ip", "netns", "exec", space(number), "unshare", "--uts", "sh", "-c", inside], cwd=ROOT, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=child_environment() | {"GLOO_SOCKET_IFNAME": device(number), "NCCL_SOCKET_IFNAME": device(number)})
    host = Host(HOSTS[number], process, [])

    def read() -> None:
        for line in process.stdout or ():
            host.lines.append(line.rstrip("\n"))
            if show:
                print(f"{host.name}: {host.lines[-1]}", flush=True)
    threading.Thread(target=read, daemon=True).start()
    return host


def play(flags: Flags, run_dir: Path, show: bool = True) -> list[Host]:
    """Train on two hosts, and do to the cable what the flags say; the hosts, which have ended."""
    with network(flags.rate, flags.delay):
        hosts = [start_host(number, flags, show) for number in (0, 1)]
        try:
            began = time.monotonic()
            out, done = False, flags.pull_at < 0
            while any(host.ended is None for host in hosts):
                time.sleep(POLL_SECONDS)
                for host in hosts:
                    if host.ended is None and host.process.poll() is not None:
                        host.ended = time.monotonic() - began
                if not done and last_step(run_dir) >= flags.pull_at:
                    plug(False)
                    out, done, began = True, True, time.monotonic()
                    print(f"cable pulled after step {last_step(run_dir)}", flush=True)
                elif out and 0 < flags.pull_for < time.monotonic() - began:
                    plug(True)
                    out = False
                    print(f"cable plugged in after {time.monotonic() - began:.0f} s", flush=True)
        finally:
            for host in hosts:
                host.process.terminate()
                host.process.wait()
    return hosts


def main() -> int:
    flags = parse([Flags], prog="python -m dev.two_hosts")[0]
    if trouble := unavailable_reason():
        raise UserError(f"{trouble}.")
    from nanochat.features import FEATURES
    from nanochat.training.config import parse_config
    hosts = play(flags, runs_dir() / parse_config(FEATURES, shlex.split(flags.train)).model_tag)
    rows = [{"host": host.name, "exit_status": host.process.returncode, "seconds": round(host.ended or 0.0, 1)} for host in hosts]
    print(format_table(rows))
    return max(host.process.returncode for host in hosts)


if __name__ == "__main__":
    cli(main)
