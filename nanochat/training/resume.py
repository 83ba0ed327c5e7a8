"""Checkpoints of a run: writing them beside its training, and going on from one to the same bits."""

from pathlib import Path
from uuid import uuid4

import torch

from nanochat.checkpoint_manager import (
    CheckpointWriter,
    SharedSaves,
    archive_later_checkpoints,
    check_disk_space,
    check_tokenizer,
    checkpoint_bytes,
    load_checkpoint,
    recover_interrupted_writes,
)
from nanochat.cli.paths import list_steps, portable, step_dir
from nanochat.common import UserError, is_main_rank, print0
from nanochat.runtime.compute_dtype import dtype_name
from nanochat.runtime.device import device_name
from nanochat.runtime.distributed import barrier, broadcast_object, on_main_rank_first
from nanochat.training import run_folder
from nanochat.training.config import Config
from nanochat.training.console import Console
from nanochat.training.state import RunPlan, TrainState

RENAMED = {"tally": "stats", "computed": "result_fingerprint", "rounded_by": "numerics_environment"}  # in older state.json
# The kernels of runs from before there was a choice, which their numerics_environment does not name
FIRST_KERNELS = {"weight gradient": "torch", "head loss": "torch", "rotary norm": "torch", "qkv": "separate",
                 "embedding gradient": "torch", "polar express": "plain"}


class Checkpoints:
    """The checkpoints of the run that `plan` describes. All ranks write: each its part of the optimizer's state, rank 0 the rest.

    saved_step: the step that the run can return to; what was trained since would be lost.
    """

    def __init__(self, plan: RunPlan, state: TrainState, console: Console):
        """Raises: UserError where the disk does not even hold one checkpoint, or ranks do not share the run's folder."""
        self.plan, self.state, self.saved_step = plan, state, state.step
        steps, every, keep = plan.horizon.num_iterations - state.step, plan.config.eval.save_every, plan.config.eval.keep_last
        saves = -(-steps // every) if every > 0 else 1
        count = min(saves, keep + 2) if keep > 0 else saves  # those kept, the best, and the one being written
        size = checkpoint_bytes(state.model, state.optimizer)
        on_main_rank_first(lambda: check_disk_space(plan.run_dir, size, rows=steps, count=count), others=lambda: None)
        launch = broadcast_object(uuid4().hex)
        ranks = on_main_rank_first(lambda: SharedSaves(plan.run_dir, plan.ranks.rank, plan.ranks.world_size, launch)) \
            if plan.ranks.world_size > 1 else None
        self.writer = CheckpointWriter(plan.run_dir, keep, console.line, ranks=ranks,
                                       on_saved=lambda: run_folder.delete_replaced(plan.run_dir))

    def save(self) -> None:
        """Begin to write a checkpoint of the present step, unless there is one or nothing has been trained. On all ranks."""
        state, plan = self.state, self.plan
        if state.step <= self.saved_step:
            return
        self.saved_step = state.step
        if not is_main_rank():
            for _ in state.sharding.weights_to_save():
                pass  # what this rank has of them goes to rank 0
            self.writer.save(state.step, {}, state.optimizer.named_state(), {}, {})
            return
        described = {
            "model_config": vars(plan.shape), "user_config": plan.config.flat(), "tokens": portable(plan.tokens.folder),
            "tokenizer": plan.tokenizer.fingerprint(), "val_bpb": state.stats.val_bpb,
            "result_fingerprint": result_fingerprint(plan), "numerics_environment": numerics_environment(plan)}
        with state.features.eval_context(state.model):
            self.writer.save(state.step, state.sharding.weights_to_save(), state.optimizer.named_state(),
                             described | state.state_dict(),
                             val_bpb={step: bpb for step, _, bpb in state.stats.val_curve})

    def restore(self, checkpoint: tuple[dict, dict, dict]) -> bool:
        """Go on from a checkpoint as `load_checkpoint` gives it. Returns whether to the same bits as the run it is of.

        Raises: UserError where it would lead to other results, unless --allow-change.
        """
        plan, state = self.plan, self.state
        weights, moments, saved = checkpoint
        check_tokenizer(plan.tokenizer, saved, plan.run_dir)
        changes = differences(saved["result_fingerprint"], result_fingerprint(plan))
        refuse_changes(plan.config, changes)
        state.sharding.load_weights(weights, plan.run_dir)
        state.optimizer.load_named_state(moments)
        state.load_state_dict(saved)
        self.saved_step = state.step
        self.writer.own.update(saved.get("own_steps", []))
        if rounding := differences(saved["numerics_environment"], numerics_environment(plan)):
            print0(f"note: the bits may differ from here on: {', '.join(rounding)}")
        same_bits = not (changes or rounding or plan.config.changed_since(saved["user_config"]))
        if is_main_rank() and not same_bits:
            archive_later_checkpoints(plan.run_dir, state.step)
        print0(f"resumed {plan.run_dir} at step {state.step}")
        return same_bits

    def roll_back(self, diverged_at: int) -> None:
        """Return to the last checkpoint, to go on with the batches that follow those used so far. The clock keeps the time spent
        on the way, and the statistics the record of rollbacks."""
        state = self.state
        rollbacks, clock = [*state.stats.rollbacks, [diverged_at, self.saved_step]], state.clock.state_dict()
        self.wait()
        barrier()  # one that lost patience must not read what the others still write
        self.restore(load_checkpoint(self.plan.run_dir, self.saved_step))
        state.features.on_weights_changed()
        state.clock.load_state_dict(clock)
        state.stats.rollbacks = rollbacks

    def last(self) -> Path | None:
        """The folder of the run's newest checkpoint."""
        self.wait()
        steps = list_steps(self.plan.run_dir)
        return step_dir(self.plan.run_dir, steps[-1]) if steps else None

    def wait(self) -> None:
        """Return when nothing is being written, by any rank."""
        self.writer.wait()

    def expect_less_of_others(self, seconds: float) -> None:
        """After an error that other ranks may not have met: do not wait long for their parts of a checkpoint."""
        self.writer.wait_no_longer_than(seconds)

    def close(self) -> None:
        """Wait, and end the writer. Raises: UserError, on rank 0, where the last checkpoint could not be written."""
        self.writer.close()


def open_checkpoint(run_dir: Path, step: str) -> tuple[dict, dict, dict]:
    """`load_checkpoint` for the process that holds the run's lock: it first repairs what a killed one left half done. The state
    has today's names, even if an older version wrote it."""
    if is_main_rank():
        run_folder.restore_replaced(run_dir)
        recover_interrupted_writes(run_dir)
    weights, moments, state = load_checkpoint(run_dir, step)
    state = {RENAMED.get(name, name): value for name, value in state.items()}
    return weights, moments, state | {"numerics_environment": FIRST_KERNELS | state["numerics_environment"]}


def result_fingerprint(plan: RunPlan) -> dict:
    """Settings beyond the flags that decide the result: a resume with another of these is a resume with other flags."""
    return {"the tokens": plan.tokens.fingerprint(), "the compute dtype": dtype_name(plan.dtype),
            "the number of steps": plan.horizon.num_iterations, "tokens per step": plan.horizon.total_batch_size,
            "the scale of the learning rates": plan.horizon.lr_factor, "the weight decay": plan.horizon.weight_decay}


def numerics_environment(plan: RunPlan) -> dict:
    """Settings that may change rounding but not the algorithm: device, torch version, compile mode, kernels, micro-batch,
    ranks."""
    return {"device": device_name(plan.device), "torch": torch.__version__,
            "compiled": plan.compile and ("whole" if plan.compile_whole else "in parts"),
            "attention": {window: choice["name"] for window, choice in plan.kernel_choices["attention"].items()},
            **{kernel: choice["name"] for kernel, choice in plan.kernel_choices.items() if kernel != "attention"},
            "rows per micro-batch": plan.micro_batch_size, "ranks": plan.ranks.world_size}


def differences(was: dict, now: dict) -> list[str]:
    """["name old -> new", ...]"""
    return [f"{name} {was.get(name, '(not recorded)')} -> {now[name]}" for name in now if now[name] != was.get(name)]


def refuse_changes(config: Config, changes: list[str]) -> None:
    """Raise a UserError that lists what a resume would change of the result, unless --allow-change: then print it."""
    if changes and not config.run.allow_change:
        raise UserError("this resume would not go on with the same run:\n" + "".join(f"  {change}\n" for change in changes)
                        + "Take back what changed, or add --allow-change to go on with it.")
    for change in changes:
        print0(f"changed: {change}")
