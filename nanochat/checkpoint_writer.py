"""Writing checkpoints: each whole or not there at all, beside training, by one process or by all ranks together.

A folder is written under a hidden name, synced and renamed, so a crash leaves the old state or the new one; it is deleted the
other way round. One that a resumed run writes again replaces it only if the weights are the same, else the one that was there
is set aside as step_000600~1.
"""

import copy
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from nanochat.checkpoint_files import SCHEMA_VERSION, safetensors_blocks, total_bytes
from nanochat.checkpoint_names import MANIFEST, MODEL, OPTIMIZER, STATE, optimizer_name, remove_saving_file
from nanochat.checkpoint_shards import SHARED, RankFailed, RankMissing, SharedSaves
from nanochat.cli.paths import list_steps, step_dir
from nanochat.common import UserError, print0
from nanochat.runtime.files import read_sealed, seal, set_aside, sync_folder, write_hashed


def save_checkpoint(run_dir: Path, step: int, model_tensors: dict, optimizer_tensors: dict, state: dict,
                    ranks: SharedSaves | None = None) -> Path:
    """Write the checkpoint of `step`; returns its folder. UserError, with the bytes needed, where the disk does not take it.

    ranks: of rank 0 of several, whose others write their parts of the optimizer's state meanwhile.
    """
    target = step_dir(run_dir, step)
    writing, replaced = hidden_folder(target, "writing"), hidden_folder(target, "replaced")
    state = json.dumps(state | {"schema_version": SCHEMA_VERSION, "step": step}, indent=1).encode()
    own = total_bytes(model_tensors) + total_bytes(optimizer_tensors) + len(state)
    optimizer = optimizer_name(0, ranks.world_size if ranks else 1)
    try:
        shutil.rmtree(writing, ignore_errors=True)
        if free_bytes(run_dir) < own + (ranks.others if ranks else 0):
            raise OSError("there is no room")
        writing.mkdir(parents=True)
        if ranks:
            ranks.begin(writing)
        files = {MODEL: write_hashed(writing / MODEL, safetensors_blocks(model_tensors)),
                 optimizer: write_hashed(writing / optimizer, safetensors_blocks(optimizer_tensors)),
                 STATE: write_hashed(writing / STATE, [state])}
        if ranks:
            files |= ranks.collect(writing)
        write_hashed(writing / MANIFEST, [seal({"schema_version": SCHEMA_VERSION, "files": files}).encode()])
        sync_folder(writing)
        if target.exists():
            os.rename(target, replaced)
        os.rename(writing, target)
        sync_folder(run_dir)
        retire(replaced, target)
    except (OSError, RankFailed) as e:
        shutil.rmtree(writing, ignore_errors=True)
        needed = own + (ranks.others if ranks else 0)
        advice = SHARED if isinstance(e, RankMissing) else \
            f"It needs {needed:,} bytes, and {free_bytes(run_dir):,} are free. Make room"
        raise UserError(f"could not save the checkpoint of step {step} in {run_dir}: {getattr(e, 'strerror', None) or e}. "
                        f"{advice}; earlier checkpoints are as they were.") from e
    return target


def retire(replaced: Path, target: Path) -> None:
    """Delete the folder of a checkpoint that `target` replaces, if there is one, where the weights are the same; else keep it as
    target~1, target~2, ..."""
    if not replaced.exists():
        return
    if _weights_digest(replaced) == _weights_digest(target) is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        set_aside(replaced, target.name)


def _weights_digest(folder: Path) -> str | None:
    """The checksum of a checkpoint's weights by its manifest; None where that cannot be read."""
    try:
        return read_sealed(folder / MANIFEST, SCHEMA_VERSION)["files"][MODEL]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


class CheckpointWriter:
    """Writes the checkpoints of a run beside its training, one at a time.

    `save` returns as soon as the tensors are copied to host memory; a second one waits for the first. The copies are
    kept for the next time, so this costs as much host memory as a checkpoint has bytes. A checkpoint that cannot be
    written is reported at once and training goes on, as stopping would save nothing: there is time to free disk space until
    the next one. If the last one could not be written, `close` raises its UserError.

    keep_last: how many of the run's own checkpoints to keep, besides the best by validation; -1 keeps all.
    report: takes a line of text.
    on_saved: called after each checkpoint that was written.
    ranks: where several ranks train. All must save, wait and close at the same steps. Rank 0 writes the model and its part of the
    optimizer's state, reports, deletes old checkpoints and raises; the others write their parts, and wait until rank 0 is done.
    own: steps of the checkpoints that the run has written so far, which only grow.
    """

    def __init__(self, run_dir: Path, keep_last: int = -1, report: Callable[[str], None] = print0,
                 on_saved: Callable[[], None] = lambda: None, ranks: SharedSaves | None = None):
        self.run_dir, self.keep_last, self.report, self.on_saved, self.ranks = run_dir, keep_last, report, on_saved, ranks
        self.own: set[int] = set()
        self.thread = ThreadPoolExecutor(1, "checkpoints")
        self.pending: Future | None = None
        self.error: UserError | None = None  # why the last checkpoint is not there
        self.host = {}                       # (file, tensor name) -> copy on the host

    def save(self, step: int, model_tensors: dict | Iterable[tuple[str, torch.Tensor]], optimizer_tensors: dict, state: dict,
             val_bpb: dict[int, float]) -> None:
        """Begin to write a checkpoint. Of several ranks, each gives its own part of the optimizer's tensors, and only rank 0's
        model and state count.

        model_tensors: by name, or pairs (name, tensor), each tensor right until the next pair is asked for.
        val_bpb: bits per byte of the steps evaluated so far.
        """
        self.wait()
        if self.ranks:
            self.ranks.next()
        self.own.add(step)
        state = state | {"own_steps": sorted(self.own)}
        weights = model_tensors.items() if isinstance(model_tensors, dict) else model_tensors
        copies = [{name: self._copy(file, name, t) for name, t in tensors}
                  for file, tensors in ((MODEL, weights), (OPTIMIZER, optimizer_tensors.items()))]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies above were only begun
        if self.ranks and self.ranks.rank:
            self.pending = self.thread.submit(self._contribute, step, copies[1])
        else:
            self.pending = self.thread.submit(self._write, step, *copies, copy.deepcopy(state), dict(val_bpb))

    def wait(self) -> None:
        """Return when nothing is being written: what was saved is safe from whatever happens next."""
        if self.pending:
            pending, self.pending = self.pending, None
            self.error = pending.result()

    def wait_no_longer_than(self, seconds: float) -> None:
        """From here on wait at most so long for a sign of life of another rank that saves."""
        if self.ranks:
            self.ranks.patience = min(seconds, self.ranks.patience)

    def close(self) -> None:
        """Wait, and end the thread. UserError where the last checkpoint could not be written."""
        self.wait()
        self.thread.shutdown()
        if self.ranks:
            self.ranks.close()
        if self.error:
            raise self.error

    def _copy(self, file: str, name: str, tensor):
        host = self.host.get((file, name))
        if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
            host = self.host[file, name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return host.copy_(tensor.detach(), non_blocking=True)

    def _write(self, step: int, model_tensors: dict, optimizer_tensors: dict, state: dict, val_bpb: dict) -> UserError | None:
        try:
            folder = save_checkpoint(self.run_dir, step, model_tensors, optimizer_tensors, state, self.ranks)
        except Exception as e:  # whatever it is, the weights are still there, and training can go on
            self.report(f"step {step} | {e}\nTraining goes on")
            return e if isinstance(e, UserError) else UserError(f"could not save the checkpoint of step {step}: {e!r}")
        finally:
            if self.ranks:
                self.ranks.end()
        self.report(f"step {step} | saved {folder}")
        try:
            self.on_saved()
            if self.keep_last > 0:
                delete_old(self.run_dir, step, self.keep_last, val_bpb, self.own)
        except OSError as e:
            self.report(f"an old checkpoint could not be deleted: {e}")

    def _contribute(self, step: int, optimizer_tensors: dict) -> None:
        self.ranks.contribute(hidden_folder(step_dir(self.run_dir, step), "writing"), safetensors_blocks(optimizer_tensors),
                              total_bytes(optimizer_tensors), free=lambda: free_bytes(self.run_dir))


def delete_old(run_dir: Path, newest: int, keep_last: int, val_bpb: dict[int, float], own: set[int]) -> None:
    """Delete checkpoints of the run's `own` but for the last `keep_last` up to step `newest`, and of those evaluated the best.

    Later ones, of a future that a resume went back from, are not touched, nor any that the run has not written.
    """
    steps = [step for step in list_steps(run_dir) if step <= newest and step in own]
    evaluated = [step for step in steps if math.isfinite(val_bpb.get(step, math.inf))]
    best = min(evaluated, key=val_bpb.get, default=None)
    for step in steps[:-keep_last]:
        if step != best:
            hidden = hidden_folder(step_dir(run_dir, step), "deleting")
            os.rename(step_dir(run_dir, step), hidden)  # from here on it does not look like a checkpoint
            shutil.rmtree(hidden, ignore_errors=True)


def recover_interrupted_writes(run_dir: Path) -> None:
    """Undo or complete the writes of a process that was killed. Only for the process that holds the run's lock."""
    for hidden in run_dir.glob(".step_*.replaced"):
        target = run_dir / hidden.stem[1:]
        if target.exists():
            retire(hidden, target)
        else:
            os.rename(hidden, target)
    for kind in ("writing", "deleting"):
        for hidden in run_dir.glob(f".step_*.{kind}"):
            shutil.rmtree(hidden, ignore_errors=True)
    remove_saving_file(run_dir)


def archive_later_checkpoints(run_dir: Path, step: int) -> None:
    """Rename the checkpoints after `step` to NAME~1, NAME~2, ...: a resume with other flags trains other weights."""
    for later in (step_dir(run_dir, s) for s in list_steps(run_dir) if s > step):
        print0(f"{later.name} belongs to the run as it was: it is now {set_aside(later).name}")


def free_bytes(folder: Path) -> int:
    """Free bytes where `folder` is or will be."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free


def hidden_folder(target: Path, kind: str) -> Path:
    """A name beside a checkpoint's that no reader takes for one: .step_000600.writing"""
    return target.with_name(f".{target.name}.{kind}")
