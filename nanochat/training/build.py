"""How a run comes to be: from flags to text, model, optimizer, loader and, when resuming, to where it was."""

import json
import platform
import shlex
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from nanochat.checkpoint_manager import (
    CheckpointWriter,
    build_model,
    check_room,
    check_tokenizer,
    checkpoint_bytes,
    finish_what_was_killed,
    load_checkpoint,
    load_weights,
    set_aside_later,
)
from nanochat.cli.paths import list_steps, located, portable, runs_dir, step_dir, writable_base_dir
from nanochat.common import UserError, get_base_dir, is_main_rank, print0, resolve
from nanochat.dataloader import PackedRows, TrainLoader
from nanochat.dataset import TokenDataset, prepare_tokens, train_tokenizer
from nanochat.features import FEATURES, Feature, Features
from nanochat.flash_attention import make_attention
from nanochat.recipe import schedules
from nanochat.recipe.memory_estimate import micro_batches
from nanochat.recipe.shape import param_counts
from nanochat.runtime.clock import Clock
from nanochat.runtime.compilation import CompiledModel, compiler_works, graphs_compiled
from nanochat.runtime.device import PeakMemory, device_name, dtype_name, init_device, peak_flops, pick_compute_dtype
from nanochat.runtime.distributed import barrier, broadcast_bool, on_main_rank_first
from nanochat.runtime.files import write_atomic
from nanochat.runtime.lock import RunLock
from nanochat.runtime.provenance import git_state
from nanochat.runtime.rng import rng_state, set_rng_state
from nanochat.runtime.signals import Interrupted, Signals
from nanochat.tokenizer import FILE_NAME, get_token_bytes, get_tokenizer
from nanochat.training import run_folder
from nanochat.training.auto_batch import advice, check_memory, choose_micro_batch, out_of_memory, take_micro_batch
from nanochat.training.config import Config
from nanochat.training.plot import plot_run
from nanochat.training.records import MetricsFile, write_result
from nanochat.training.run_stats import Tally
from nanochat.training.trackers import Trackers


class FailedStart(Exception):
    """A run that could not be built for want of memory. Its result.json is written; the message says what to do."""


class Run:
    """Everything that one run is made of. Made whole by the constructor; `nanochat.training.loop` moves `step` from there."""

    def __init__(self, config: Config, rooms: tuple[type[Feature], ...] = FEATURES):
        self.config, self.started = config, time.monotonic()
        self.device, self.ranks = init_device(config.run.device_type)
        self.dtype, why = pick_compute_dtype(self.device, config.run.dtype)
        self.console = Console()
        print0(f"device: {device_name(self.device)} | compute dtype: {dtype_name(self.dtype)} ({why})")
        self.run_dir = runs_dir() / config.model_tag
        self.shape, self.compile = None, config.run.compile
        self.lock = on_main_rank_first(self._take_lock, others=lambda: None)
        try:
            self._prepare(rooms)
        except BaseException as e:
            try:
                self._record_failed_start(e)
            finally:
                self.unlock()
            if out_of_memory(e):
                raise FailedStart(f"out of memory. {advice(self)}") from e
            raise

    def _take_lock(self) -> RunLock:
        writable_base_dir()
        return RunLock(self.run_dir)

    def _prepare(self, rooms: tuple[type[Feature], ...]) -> None:
        config = self.config
        self.first_step = self.step = 0
        resume = config.run.resume_from_step
        checkpoint = None
        if resume != "-1":
            checkpoint = on_main_rank_first(lambda: open_checkpoint(self.run_dir, resume))
            self.first_step = self.step = checkpoint[2]["step"]
            refuse_changes(config, config.changed_since(checkpoint[2]["user_config"]))
        else:
            on_main_rank_first(lambda: refuse_start(self.run_dir, config.run.overwrite), others=lambda: None)

        recorded = checkpoint and config.same_text(checkpoint[2]["user_config"]) and checkpoint[2]["tokens"] or None
        self.tokenizer, self.tokens = on_main_rank_first(lambda: prepare_text(config, recorded))
        self.token_bytes = get_token_bytes(self.device, self.tokenizer)
        self.shape = shape = config.model.shape(self.tokenizer.get_vocab_size())
        self.horizon = config.plan(shape, self.ranks.world_size)
        if self.step > self.horizon.num_iterations:
            raise UserError(f"the checkpoint is of step {self.step}, and the run ends at {self.horizon.num_iterations} "
                            f"({self.horizon.reason}): lengthen it, or resume from an earlier step.")
        self.features = Features(config, rooms)
        check_memory(self)
        torch.manual_seed(config.run.seed)
        self.model = build_model(shape, self.dtype, self.device)
        self.model.kernels.attention = make_attention(self.device, self.dtype, shape.head_dim, shape.sequence_len,
                                                      self.model.window_sizes)
        print0(str(self.model.kernels.attention))
        self.features.on_model(self.model, self.horizon)
        if self.compile and (trouble := compiler_works(self.device)):
            print0(f"going on without torch.compile, slower: {trouble}")
            self.compile = False
        scale = self.horizon.lr_scale
        optim = config.optim
        self.optimizer = self.model.setup_optimizer(
            optim.unembedding_lr * scale, optim.embedding_lr * scale, optim.matrix_lr * scale, self.horizon.weight_decay,
            optim.scalar_lr * scale, compile=self.compile)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        if config.horizon.auto_batch:
            before = checkpoint and checkpoint[2]["user_config"]["device_batch_size"]
            possible = micro_batches(config.horizon.device_batch_size)
            take_micro_batch(self, before if before in possible else choose_micro_batch(self))
        self.in_parts = config.run.compile_parts or self.features.varies_forward
        self.forward = CompiledModel(self.model, whole=not self.in_parts) if self.compile else self.model

        rows = PackedRows(self.tokens.split("train"), shape.sequence_len, config.run.seed)
        packing = rows.report(groups=1)
        print0(f"rows of {shape.sequence_len} tokens: {packing['tokens_lost_share']:.2%} of the tokens lost, "
               f"{packing['documents_cut_share']:.1%} of the documents cut ({packing['documents_longer_share']:.1%} are longer "
               "than a row)")
        self.loader = TrainLoader(rows, device_batch_size=config.horizon.device_batch_size,
                                  grad_accum_steps=self.horizon.grad_accum_steps, rank=self.ranks.rank,
                                  world_size=self.ranks.world_size, device=self.device)
        self.clock = Clock(self.device)
        self.unsettled = None  # the step whose results have not been read yet (nanochat/training/loop.py)
        self.saved_step = self.step  # what is trained since can be lost
        self.same_run = True  # whether a resume goes on to the same bits
        self.signals = Signals()
        self.stop = 0                # under torchrun, the signal by which all ranks have agreed to stop
        self.memory = PeakMemory(self.device)
        self.tally = Tally(config.eval.target_metric_name, config.eval.target_metric_threshold)
        steps, every, keep = self.horizon.num_iterations - self.step, config.eval.save_every, config.eval.keep_last
        saves = -(-steps // every) if every > 0 else 1
        size, count = checkpoint_bytes(self.model, self.optimizer), min(saves, keep + 2) if keep > 0 else saves
        on_main_rank_first(lambda: check_room(self.run_dir, size, rows=steps, count=count),  # those kept, the best, and the
                           others=lambda: None)                                              # one being written
        self.checkpoints = CheckpointWriter(self.run_dir, config.eval.keep_last, self.console.line,
                                            on_saved=lambda: run_folder.delete_replaced(self.run_dir))
        if checkpoint:
            self._resume(checkpoint)
        else:
            on_main_rank_first(self._begin_folder, others=lambda: None)
        self.start_loader()
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", resume_step=self.step)
        if self.compile:
            print0("compiling: about a minute the first time, seconds from then on; it does not count as training time")
        self.trackers = Trackers(tracker_names(config), config.run.run, self.run_dir, config.flat(), self.step,
                                 self.same_run)

    def _begin_folder(self) -> None:
        """The folder of a new run, with its flags and its tokenizer."""
        run_folder.begin(self.run_dir, self.config.run.overwrite)
        write_atomic(self.run_dir / "config.json",
                     json.dumps(self.config.flat() | {"command": shlex.join(sys.argv)}, indent=1) + "\n")
        self.tokenizer.save(self.run_dir / "tokenizer")

    def _resume(self, checkpoint: tuple | None = None) -> None:
        """Take over a checkpoint, by default that of the present step. UserError where it would lead to other results than
        the run it is of, unless --allow-change."""
        self.checkpoints.wait()
        weights, optimizer, state = checkpoint or load_checkpoint(self.run_dir, self.step)
        check_tokenizer(self.tokenizer, state, self.run_dir)
        changes = differences(state["computed"], self.computed())
        refuse_changes(self.config, changes)
        load_weights(self.model, weights, self.run_dir)
        self.optimizer.load_named_state(optimizer)
        self.clock.load_state_dict(state["clock"])
        self.tally.load_state_dict(state["tally"])
        self.checkpoints.own.update(state.get("own_steps", []))
        self.scaler.load_state_dict(state["scaler"])
        self.features.load_state_dict(state["features"])
        set_rng_state(state["rng"], self.device)
        if others := differences(state["rounded_by"], self.rounded_by()):
            print0(f"note: the bits may differ from here on: {', '.join(others)}")
        self.same_run = not (changes or others or self.config.changed_since(state["user_config"]))
        if is_main_rank() and not self.same_run:
            set_aside_later(self.run_dir, self.step)
        print0(f"resumed {self.run_dir} at step {self.step}")

    def computed(self) -> dict:
        """What the result depends on beyond the flags: a resume with another of these is one with other flags."""
        return {"the tokens": self.tokens.fingerprint(), "the compute dtype": dtype_name(self.dtype),
                "the number of steps": self.horizon.num_iterations, "tokens per step": self.horizon.total_batch_size}

    def rounded_by(self) -> dict:
        """What the last bits of the result depend on."""
        return {"device": device_name(self.device), "torch": torch.__version__,
                "compiled": self.compile and ("in parts" if self.in_parts else "whole"),
                "rows per micro-batch": self.config.horizon.device_batch_size, "ranks": self.ranks.world_size}

    def start_loader(self) -> None:
        """Begin reading at the present step's batch. What rollbacks have left out lies before it."""
        self.loader.start(self.step + sum(step + 1 - back_to for step, back_to in self.tally.rollbacks))

    def go_back(self, step: int) -> None:
        """Return to the checkpoint of `step`, and go on from there with the batches that follow those used so far. What
        was spent on the way, and the record of rollbacks, stay."""
        rollbacks, clock = [*self.tally.rollbacks, [self.step, step]], self.clock.state_dict()
        self.step = self.saved_step = step
        self.checkpoints.wait()
        barrier()  # rank 0 alone writes
        self._resume()
        self.features.after_update()
        self.clock.load_state_dict(clock)
        self.tally.rollbacks = rollbacks
        self.start_loader()
        self.metrics.close()
        self.metrics = MetricsFile(self.run_dir / "metrics.jsonl", resume_step=step)
        self.trackers.go_back(step)

    def rehearse(self, options: dict) -> None:
        """Compile what forward(..., **options) needs, the first time it is asked for, on a batch of zeros."""
        if not self.compile or self.forward.rehearsed(options):
            return
        shape = self.config.horizon.device_batch_size, self.model.config.sequence_len
        # two tensors: one for both would make a graph of its own, good for nothing else
        x, y = (torch.zeros(shape, dtype=torch.int64, device=self.device) for _ in range(2))
        failed = self.forward.eager_fallbacks
        with self.signals.raised(self.step == self.saved_step and self.ranks.world_size == 1), self.clock.compiling():
            self.forward.rehearse(x, y, **options)
        if self.signals.received and self.forward.eager_fallbacks > failed:
            # a terminal's Ctrl-C ends the C++ compiler too: what trains uncompiled because of that would be other bits
            raise Interrupted(self.signals.received)

    def save(self) -> None:
        """Begin to write a checkpoint of the present step, on rank 0. The generators' states are that rank's: every rank
        seeds them alike and draws alike."""
        if not is_main_rank():
            return
        state = {
            "model_config": vars(self.model.config), "user_config": self.config.flat(), "tokens": portable(self.tokens.folder),
            "tokenizer": self.tokenizer.fingerprint(), "computed": self.computed(), "rounded_by": self.rounded_by(),
            "val_bpb": self.tally.val_bpb, "clock": self.clock.state_dict(), "tally": self.tally.state_dict(),
            "scaler": self.scaler.state_dict(), "features": self.features.state_dict(), "rng": rng_state(self.device),
        }
        with self.features.eval_context(self.model):
            self.checkpoints.save(self.step, self.model.state_dict(), self.optimizer.named_state(), state,
                                  val_bpb={step: bpb for step, _, bpb in self.tally.val_curve})

    def set_schedule(self) -> None:
        """Set the optimizer's rates for this step."""
        total, flags = self.horizon.num_iterations, self.config.optim
        self.lr_multiplier = schedules.lr_multiplier(
            self.step, total, warmup_steps=flags.warmup_steps, warmdown_ratio=flags.warmdown_ratio,
            final_lr_frac=flags.final_lr_frac, warmdown_shape=flags.warmdown_shape)
        momentum = schedules.muon_momentum(self.step, total, warmdown_ratio=flags.warmdown_ratio)
        decay = schedules.weight_decay_multiplier(self.step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.lr_multiplier
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = group["initial_weight_decay"] * decay

    def last_checkpoint(self) -> Path | None:
        """The folder of the run's newest checkpoint."""
        self.checkpoints.wait()
        steps = list_steps(self.run_dir)
        return step_dir(self.run_dir, steps[-1]) if steps else None

    def out_of_time(self) -> bool:
        """Whether --max-train-seconds are over, by rank 0's clock."""
        limit = self.config.run.max_train_seconds
        if limit <= 0:
            return False
        return broadcast_bool(self.clock.train >= limit, self.device)

    def finish(self, status: str, error: str | None, exit_code: int) -> None:
        """Close what is open and write result.json and the plot, with what is known."""
        self.loader.close()
        self.metrics.close()
        self.trackers.close()
        self.checkpoints.wait()
        if not is_main_rank():
            return
        try:
            self._write_result(status, error, exit_code)
            run_folder.restore_replaced(self.run_dir)
        except OSError as e:  # a full disk, say: how the run ended is more than its record
            self.console.line(f"result.json could not be written: {e}")
        finally:
            self.unlock()

    def _record_failed_start(self, error: BaseException) -> None:
        """result.json of a run that could not be built, with what is known; not in the place of a run that has weights. What
        the user can mend is no result."""
        if not is_main_rank():
            return
        run_folder.restore_replaced(self.run_dir)
        if isinstance(error, (UserError, KeyboardInterrupt)):
            return
        oom = out_of_memory(error)
        fields = {"status": "oom" if oom else "failed", "exit_code": 1, "steps_done": 0,
                  "wall_time_sec": time.monotonic() - self.started,
                  "error": f"out of memory. {advice(self)}" if oom else f"{type(error).__name__}: {error}"}
        with suppress(OSError):
            own = not run_folder.start_problem(self.run_dir, overwrite=False)
            if own:
                self.run_dir.mkdir(parents=True, exist_ok=True)
            write_result(self._result_files(own), self._about() | fields)

    def _result_files(self, own: bool = True) -> list[Path]:
        named = self.config.run.result_json
        return [self.run_dir / "result.json"] * own + ([resolve(named)] if named else [])

    def _about(self) -> dict:
        """The fields of result.json that say what is run, as far as that is known."""
        config, commit = self.config, git_state()
        known = {
            "command": shlex.join([Path(sys.executable).name, "-m", "scripts.base_train", *sys.argv[1:]]), "argv": sys.argv[1:],
            "git_commit": commit[0], "git_dirty": commit[1], "seed": config.run.seed, "host": platform.node(),
            "device": device_name(self.device), "dtype": dtype_name(self.dtype), "torch_version": torch.__version__,
            "depth": config.model.depth}
        if self.shape:
            known |= {"model_dim": self.shape.n_embd, "num_params": param_counts(self.shape)["total"],
                      "flops_per_token": self.horizon.flops_per_token, "num_iterations": self.horizon.num_iterations}
        return known

    def unlock(self) -> None:
        if self.lock:
            self.lock.release()

    def _write_result(self, status: str, error: str | None, exit_code: int) -> None:
        config, horizon = self.config, self.horizon
        peak = peak_flops(self.device)
        peak = peak and peak * self.ranks.world_size
        last = self.last_checkpoint()
        fields = self._about() | {
            "status": status, "exit_code": exit_code, "error": error, "last_checkpoint": last and portable(last),
            "steps_done": self.step,
            "tokens_seen": self.step * horizon.total_batch_size, "wall_time_sec": time.monotonic() - self.started,
            "train_time_sec": self.clock.train, "compile_time_sec": self.clock.compile, "eval_time_sec": self.clock.eval,
        } | self.tally.summary(horizon.total_batch_size, horizon.flops_per_token, peak) | {
            "schedule": "full_update", "compiled_graphs": graphs_compiled() if self.compile else 0,
            "eager_fallbacks": self.forward.eager_fallbacks if self.compile else int(config.run.compile),
        } | self.features.summary()
        write_result(self._result_files(), fields)
        for line in [*self.features.reports(), plot_run(self.run_dir)]:
            self.console.line(line)


class Console:
    """What the watcher sees: on a terminal a progress line rewritten in place, elsewhere plain lines now and then."""

    def __init__(self):
        self.tty = sys.stdout.isatty()
        self.shown = 0.0        # time of the last progress line
        self.unfinished = False  # the cursor stands behind a progress line

    def show(self, text: str) -> None:
        """A progress line."""
        self.shown = time.monotonic()
        if self.tty:  # a line that wraps could not be rewritten
            text = "\r\033[K" + text[:shutil.get_terminal_size().columns - 1]
        print0(text, end="" if self.tty else "\n")
        self.unfinished = self.tty

    def line(self, text: str) -> None:
        """A line that stays."""
        print0(("\n" if self.unfinished else "") + text)
        self.unfinished = False


def refuse_start(run_dir: Path, overwrite: bool) -> None:
    """UserError, before any work, where a new run may not begin in this folder."""
    run_folder.restore_replaced(run_dir)
    if problem := run_folder.start_problem(run_dir, overwrite):
        raise UserError(f"{problem}.")


def prepare_text(config: Config, recorded: str | None = None):
    """The tokenizer and the token dataset, made first where they are missing.

    recorded: where the tokens of the run to be resumed are, which do when the text itself is not at hand on this machine.
    """
    data = config.data
    if not (get_base_dir() / "tokenizer" / FILE_NAME).exists():
        print0("no tokenizer yet: training one")
        tokenizer = train_tokenizer(data.data, data.vocab_size, doc_cap=data.doc_cap, **data.reading())
        tokenizer.save(get_base_dir() / "tokenizer")
    tokenizer = get_tokenizer()
    try:
        folder = prepare_tokens(data.data, tokenizer, val_source=data.val_data, **data.reading())
    except UserError as e:
        if not recorded or not located(recorded).is_dir():
            raise
        folder = located(recorded)
        print0(f"going on with the tokens prepared before, {folder}: {e}")
    tokens = TokenDataset.open(folder)
    print0(f"text: {data.data} | vocabulary {tokenizer.get_vocab_size():,} | tokens: "
           f"{tokens.split('train').num_tokens:,} training, {tokens.split('val').num_tokens:,} validation")
    if left_out := tokens.left_out():
        print0(left_out)
    return tokenizer, tokens


def open_checkpoint(run_dir: Path, step: str) -> tuple[dict, dict, dict]:
    """`load_checkpoint` for the run that alone writes in this folder."""
    if is_main_rank():
        run_folder.restore_replaced(run_dir)
        finish_what_was_killed(run_dir)
    return load_checkpoint(run_dir, step)


def differences(was: dict, now: dict) -> list[str]:
    """["name old -> new", ...]"""
    return [f"{name} {was.get(name)} -> {now[name]}" for name in now if now[name] != was.get(name)]


def refuse_changes(config: Config, changes: list[str]) -> None:
    """UserError that lists what a resume would change of what is computed, unless --allow-change: then it is printed."""
    if changes and not config.run.allow_change:
        raise UserError("this resume would not go on with the same run:\n" + "".join(f"  {change}\n" for change in changes)
                        + "Take back what changed, or add --allow-change to go on with it.")
    for change in changes:
        print0(f"changed: {change}")


def tracker_names(config: Config) -> list[str]:
    """--tracker's, or wandb where --run names a run, as nanochat's users expect."""
    if config.run.tracker:
        return [name for name in config.run.tracker if name != "none"]
    return ["wandb"] if config.run.run != "dummy" else []
