"""Parts of a long measurement, each a program of its own with a limit of time, and one file that says what each has come to.

The file is written anew whenever something changes, so a kill at any moment leaves all that was known then. Started again, a
finished part is not run again. No torch: a program that crashes, hangs or spoils its GPU costs its own part and no other.
"""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.benchmarks.result_file import json_text, make_result
from nanochat.common import ROOT, UserError, print0
from nanochat.runtime.files import read_json, write_atomic
from nanochat.runtime.provenance import git_state

NO_TIME = "no time"
CUT_OFF = "cut off"  # by a kill, or because the time of the whole was over
GRACE = 5.0          # seconds between SIGTERM and SIGKILL


@dataclass
class Part:
    """One program, and what is to be known about it."""
    name: str                     # "numbers: ceilings"
    command: list[str]
    needs: float                  # seconds that it takes at least: with less time left it is not begun
    limit: float                  # seconds after which it hangs, and is ended
    facts: Callable[[], dict]     # from the files that it leaves, also where it failed; a fact "problem" says what is wrong
    output: Path | None = None    # a file of it that is to be new
    environment: dict[str, str] = field(default_factory=dict)
    impossible: str | None = None  # why it cannot be run on this machine
    decisive: bool = False        # whether those after it mean nothing where it has failed


class Summary:
    """FOLDER/summary.json, in the format of all results (nanochat/benchmarks/result_file.py). By name of a part: `status`,
    `reason` (where it is not `ok`), `seconds`, `git_commit`, `log`, `facts`.

    status: `running`, `ok`, `failed` or `left out`. device: the name of the machine's device, once a part has found it out.
    """

    def __init__(self, folder: Path, script: str, config: dict):
        self.folder, self.path, self.script, self.config = folder, folder / "summary.json", script, config
        self.started, self.device, self.results, self.before = time.monotonic(), "not known yet", {}, 0.0
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            try:
                content = read_json(self.path)
                self.device, self.results, self.before = content["device"], content["results"], content["elapsed_sec"]
                same = content["script"] == script and all(content["config"][name] == value for name, value in config.items())
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"{self.path} is damaged ({e}): name another folder, or delete this one.") from None
            if not same:
                raise UserError(f"{self.path} is of another kind of run ({content['config']}): name another folder.")

    def record(self, name: str, **fields) -> None:
        self.results[name] = fields
        self.write()

    def write(self) -> None:
        write_atomic(self.path, json_text(make_result(
            self.script, self.device, self.config, self.results, self.before + time.monotonic() - self.started)))

    def finished(self, name: str) -> bool:
        return self.results.get(name, {}).get("status") == "ok"

    def facts(self, name: str) -> dict:
        return self.results.get(name, {}).get("facts", {})

    def run(self, part: Part, time_left: float) -> bool:
        """Run a part, or record why it is left out. Returns whether it is `ok`."""
        if part.impossible or time_left <= part.needs:
            if part.impossible or self.results.get(part.name, {}).get("status") not in ("ok", "failed"):  # known before
                self.record(part.name, status="left out", reason=part.impossible or NO_TIME)
            print0(f"{part.name}: left out: {part.impossible or NO_TIME}")
            return False
        log, began = self.folder / "logs" / f"{slug(part.name)}.txt", time.monotonic()
        about = {"git_commit": git_state()[0], "log": str(log.relative_to(self.folder))}
        limit = min(part.limit, time_left)
        print0(f"{part.name}: running, at most {limit:.0f} s; output: {log}")
        self.record(part.name, status="running", reason=CUT_OFF, **about)
        if part.output:
            part.output.parent.mkdir(parents=True, exist_ok=True)
            part.output.unlink(missing_ok=True)
        try:
            code = execute(part.command, log, limit, part.environment)
        except BaseException as e:  # Ctrl-C, SIGTERM
            self.record(part.name, status="left out", reason=f"{CUT_OFF}: {type(e).__name__}", **about,
                        seconds=time.monotonic() - began, facts=part.facts())
            raise
        facts, status, reason = part.facts(), "failed", None
        if code is None:
            reason = f"longer than its limit of {part.limit:.0f} s"
            if limit < part.limit:
                status, reason = "left out", f"{NO_TIME}: {CUT_OFF} after {limit:.0f} s"
        elif code or facts.get("problem"):
            reason = facts.get("problem") or f"exit status {code}: {last_words(log)}"
        else:
            status = "ok"
        about |= {"seconds": round(time.monotonic() - began, 1), "facts": facts}
        self.record(part.name, status=status, **({"reason": reason} if reason else {}), **about)
        print0(f"{part.name}: {status}, {about['seconds']:.0f} s{f': {reason}' if reason else ''}")
        return status == "ok"


def slug(name: str) -> str:
    """The name of a part as that of a file."""
    return re.sub(r"\W+", "_", name)


def execute(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """Run a program, its command and its output in `log`. The exit status; None where it was ended after so many seconds, with
    all that it had started."""
    with open(log, "wb") as output:
        settings = [f"{name}={value}" for name, value in environment.items()]
        output.write(f"+ {shlex.join([*settings, *command])}\n".encode())
        output.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                   env=os.environ | environment, start_new_session=True, preexec_fn=end_with_parent)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                end_group(process)


def end_with_parent() -> None:
    """Let this process be killed when the one that started it is: nothing may go on using the GPU unseen. Linux only."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it has started: politely, then not."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(log: Path) -> str:
    """What a program that failed has said of it: the first line that begins with `error:`, else the last one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error:")), lines[-1])[:300]
