"""wandb, tensorboard and trackio beside metrics.jsonl. No torch, but for tensorboard's writer."""

import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nanochat.common import is_main_rank, print0
from nanochat.runtime.files import write_atomic
from nanochat.training.records import read_metrics


class Trackers:
    """Outside trackers behind one `log`: each holds what metrics.jsonl holds, every step once, also after resumes.

    A tracker is started with what it lacks of the steps before, from metrics.jsonl: all of them where it is switched on only
    now, the last ones where it lost them when the run was killed. What it holds already is not logged again. What it holds
    of another future than the one that begins now is purged; wandb and trackio cannot take steps back, and get a new run.

    One tracker that is missing or fails costs a message, never the run.
    """

    def __init__(self, names: list[str], run_name: str, run_dir: Path, config: dict, step: int = 0, same_run: bool = True):
        """For a run that goes on at `step`, with the rows before it in metrics.jsonl. same_run: with the same bits as when it
        was there before, if it was; otherwise the steps from there on are others than those logged."""
        self.names, self.run_name, self.run_dir, self.config = names if is_main_rank() else [], run_name, run_dir, config
        self.opened, self.given, self.failed = {}, {}, set()  # by name: trackers, {key: last step given}; names
        if is_main_rank():
            self._start(step, same_run)

    def go_back(self, step: int) -> None:
        """The run has gone back to `step`, and takes another way from there."""
        if is_main_rank():
            self.close()
            self._start(step, same_run=False)

    def _start(self, step: int, same_run: bool) -> None:
        try:
            self.memory = self._recall(step, same_run)
            states = self.memory["trackers"]
            left_out = [name for name in states if states[name]["open"] and name not in self.names]
            for name in left_out:  # killed, and not named now: what it holds will not be known
                del states[name]
            if states or left_out:
                self._remember()
        except Exception as e:
            print0(f"trackers.json cannot be used ({e}): the trackers begin anew")
            self.memory = {"branched": step, "trackers": {}}
        self.opened, self.given, self.failed = {}, {name: {} for name in self.names}, set()
        for name in self.names:
            try:
                state = self.memory["trackers"].setdefault(name, {"id": None, "last": {}, "open": False})
                self.opened[name] = _TRACKERS[name](self.run_name, self.run_dir, self.config, state, step)
                state["open"] = True
                self._remember()
                for row in read_metrics(self.run_dir / "metrics.jsonl"):
                    if row["step"] < step:
                        self._log(name, _values(row), row["step"])
            except ImportError:
                print0(f"{name} is not installed: going on without it (pip install {name})")
            except Exception as e:  # no account, no network, a full disk: whatever it is, training matters more
                print0(f"{name} could not be started ({e}): going on without it")
                self.failed.add(name)

    def _recall(self, step: int, same_run: bool) -> dict:
        """trackers.json, without what is not true of this run: values of another way from `step` on."""
        path = self.run_dir / "trackers.json"
        memory = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"branched": 0, "trackers": {}}
        if not same_run or step <= memory["branched"]:  # where the way that was taken last began, another may begin
            memory["branched"] = step
            for state in memory["trackers"].values():
                state |= {"id": None, "last": {key: min(last, step - 1) for key, last in state["last"].items()}}
        return memory

    def log(self, values: dict, step: int) -> None:
        for name in self.names:
            self._log(name, values, step)

    def _log(self, name: str, values: dict, step: int) -> None:
        if name not in self.opened or name in self.failed:
            return
        tracker = self.opened[name]
        new = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not tracker.holds(k, step)}
        if not new:
            return
        try:
            tracker.log(new, step)
            self.given[name].update(dict.fromkeys(new, step))
        except Exception as e:
            print0(f"{name} failed ({e}): going on without it")
            self.failed.add(name)

    def close(self) -> None:
        for name, tracker in self.opened.items():
            state = self.memory["trackers"][name]
            try:
                tracker.close()
                state |= {"open": False, "last": state["last"] | self.given[name]}
                self._remember()
            except Exception as e:
                print0(f"{name} failed to close ({e})")

    def _remember(self) -> None:
        write_atomic(self.run_dir / "trackers.json", json.dumps(self.memory, indent=1) + "\n")


class Tracker(NamedTuple):
    """One that was started.

    In trackers.json it leaves its state. id: of its run. last: of every key, the last step given to it before it was closed.
    open: not closed yet, or never, because the process was killed: it may have lost what it was given since it was opened.
    """
    log: Callable[[dict, int], None]
    close: Callable[[], None]
    holds: Callable[[str, int], bool]  # whether it has this value of this step


def _values(row: dict) -> dict:
    """What training logs of a row of metrics.jsonl."""
    if row["val_bpb"] is not None:
        return {"val/bpb": row["val_bpb"], "val/train_time_sec": row["train_time_sec"]}
    if "core_metric" in row:
        return {"core_metric": row["core_metric"]}
    if row["step_kind"] == "skipped" or "samples" in row:
        return {}
    return {f"train/{k}": v for k, v in row.items() if k != "step"}


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _wandb(run_name, run_dir, config, state, step):
    import wandb
    has_account = os.environ.get("WANDB_API_KEY") or os.path.exists(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    if not (has_account or os.environ.get("WANDB_MODE")):
        os.environ["WANDB_MODE"] = "offline"  # keep the records on disk
    if os.path.expanduser("~") == "~":  # no home directory, where wandb would look for its settings
        os.environ.setdefault("WANDB_CONFIG_DIR", str(run_dir / "wandb"))
    resumed = state["id"] is not None
    if not resumed:
        state |= {"id": _new_id(), "last": {}, "folders": []}

    def folders():
        return {path.name for path in (run_dir / "wandb").glob(f"offline-run-*-{state['id']}")}
    for killed in folders() - set(state["folders"]):  # what it has of the steps is not known: they are logged again
        (run_dir / "wandb" / killed).rename(run_dir / "wandb" / f"killed-{killed}")
    run = wandb.init(project="nanochat", name=run_name, dir=str(run_dir), config=config, id=state["id"], resume="allow",
                     allow_val_change=True)
    next_step = run.step if resumed else 0  # the server's word; offline always 0
    last = dict(state["last"])

    def close():
        run.finish()
        state["folders"] = sorted(folders())
    return Tracker(lambda values, step: run.log(values, step=step), close,
                   lambda key, step: step < next_step or step <= last.get(key, -1))


def _tensorboard(run_name, run_dir, config, state, step):
    from torch.utils.tensorboard import SummaryWriter
    folder = run_dir / "tensorboard"
    # Written out after every step, so whoever was killed has all; who was switched off or left out for a while has not
    held = step if state["open"] else max(state["last"].values(), default=0)
    first = min(step, held) if folder.exists() else 0
    state["last"] = dict.fromkeys(state["last"], first - 1)
    while list(folder.glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)  # readers order the files by their names, which tell seconds apart
    writer = SummaryWriter(str(folder), purge_step=first)

    def log(values, step):
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()
    return Tracker(log, writer.close, lambda key, step: step < first)


def _trackio(run_name, run_dir, config, state, step):
    import trackio
    resumed = state["id"] is not None and not state["open"]  # who was killed has lost the last half second
    if not resumed:
        state |= {"id": _new_id(), "last": {}}
    # it knows runs by their names, and two of them may have the same
    trackio.init(project="nanochat", name=f"{run_name}-{state['id']}", config=config, resume="must" if resumed else "never")
    last = dict(state["last"])
    return Tracker(lambda values, step: trackio.log(values, step=step), trackio.finish,
                   lambda key, step: step <= last.get(key, -1))


_TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio}
