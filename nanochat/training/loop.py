"""The training loop. One step of it is in nanochat/training/step.py; how a run comes to be, in nanochat/training/build.py."""

import gc
import sys
import traceback
from collections.abc import Callable

from nanochat.checkpoint_shards import GONE, IN_TROUBLE
from nanochat.cli import program
from nanochat.cli.launch_environment import PeerLost
from nanochat.common import Diverged, UserError, is_main_rank
from nanochat.runtime.device import synchronize
from nanochat.runtime.distributed import barrier, is_distributed, rank_and_world_size
from nanochat.runtime.heartbeat import is_broken_connection, leave_word, lost_peers_named, word_of_another
from nanochat.runtime.signals import Interrupted
from nanochat.runtime.turns import Turns
from nanochat.training.auto_batch import is_out_of_memory, out_of_memory_advice
from nanochat.training.build import FailedStart, Run, build_run
from nanochat.training.config import Config
from nanochat.training.divergence import divergence, divergence_advice
from nanochat.training.recorder import record_end
from nanochat.training.step import PendingStep

FREEZE_AFTER = 3  # steps, of those that this process takes; by then what lasts is there


def train(run: Run) -> None:
    """Train to the last step.

    A checkpoint that is due is written before evaluations and samples, and one is made if these fail or are interrupted: so
    whatever happens in them costs no training.
    """
    state, flags = run.state, run.plan.config.eval
    state.features.on_weights_changed()  # a checkpoint may have been loaded since the model was built
    turns = Turns.from_environment(run.plan.ranks.world_size)
    while True:
        handle_stop_request(run)
        if turns:
            wait_for_turn(run, turns)
        last = state.step >= run.plan.horizon.num_iterations or out_of_time(run)
        save_is_due = last or every(state.step, flags.save_every)
        evaluations = evaluations_due(run, last)

        # Read the results of the last step before anything is made of them.
        if save_is_due or evaluations:
            flush_pending(run)
        if save_is_due:
            run.save()

        # Evaluate, sample.
        try:
            for evaluate in evaluations:
                run.wait_until_saved()  # a process that is killed in an evaluation must not take the writer with it
                evaluate()
        except BaseException as e:
            traceback.clear_frames(e.__traceback__)  # frees what fills the memory, if that is the trouble
            save_after(run, e)
            raise
        if last:
            return

        # Take a step. Its results are read now, or (--deferred-loss-logging) while the next one runs.
        handle_stop_request(run)
        if state.step == run.recorder.first_step + FREEZE_AFTER:
            freeze_objects()
        launched = run.trainer.launch_step(interruptible=state.step == run.checkpoints.saved_step)
        flush_pending(run)
        run.pending = launched
        if not run.defers_metrics:
            flush_pending(run)


def save_after(run: Run, error: BaseException) -> None:
    """Save after an error in an evaluation. Of several ranks, the others may not have met it: then nothing can be saved. Nor can
    it where each has a part of the weights: they would have to come together first."""
    if is_distributed() and (is_broken_connection(error) or run.state.sharding.divides_weights):
        return
    if not isinstance(error, Interrupted):
        run.checkpoints.expect_less_of_others(IN_TROUBLE)
    run.save()


def wait_for_turn(run: Run, turns: Turns) -> None:
    """Where a stretch of steps is over, finish all of its work and wait for the next. Raises: Interrupted where there is none."""
    if turns.steps_left == 0:
        flush_pending(run)
        synchronize(run.plan.device)
        # nothing is lost that is worth a checkpoint: such a run is there to be timed
        with run.signals.raise_immediately(), run.state.clock.waiting():
            turns.wait(run.state.step, run.state.clock.compile)
    turns.steps_left -= 1


def flush_pending(run: Run) -> None:
    """Wait for the step whose results have not been read yet, if there is one, and record it."""
    if run.pending:
        pending, run.pending = run.pending, None
        finish_step(run, pending)


def finish_step(run: Run, pending: PendingStep) -> None:
    """Read a step's results and record them; where they are not finite, do what --on-divergence says. Raises: Diverged."""
    state, result = run.state, run.trainer.finalize_step(pending)
    run.stop_signal, run.time_is_up = result.stop_signal, result.time_is_up
    trouble = divergence(result, overflow_is_normal=state.scaler.is_enabled())
    if trouble is None:
        state.features.after_step(result.step, result.loss, result.time)
        blocks = run.plan.shape.n_layer
        state.stats.add_step(result.step, result.loss, result.time.total, result.peak_memory_mib, state.clock.train,
                             result.compiled, partial=result.columns.get("active_layers", blocks) < blocks)
        run.recorder.step(result)
        return
    try:
        action = run.divergence.decide(result, trouble, state.stats, run.checkpoints.saved_step)
    except Diverged:
        state.step, run.pending = result.step, None
        raise
    if action == "skip":  # its batch is used up; weights, moments and features are as before it
        run.recorder.skipped_step(result, trouble)
    else:
        run.checkpoints.roll_back(result.step)
        if run.trainer.audit:
            run.trainer.audit.accept_changes()
        run.trainer.loader.start(state.batches_used)
        run.recorder.roll_back(trouble, result.step)


def handle_stop_request(run: Run) -> None:
    """After a signal: save and end the run. Under torchrun, at the step at which every rank has learned of the signal."""
    if signum := run.stop_signal if is_distributed() else run.signals.received:
        flush_pending(run)
        run.save()
        raise Interrupted(signum)


def freeze_objects() -> None:
    """Take all Python objects that are there now out of the garbage collector's sight. A full collection walks through every
    object of model, optimizer and torch, some 400 000, again and again, and finds nothing: for so long the host gives the device
    no work."""
    gc.collect()
    gc.freeze()


def out_of_time(run: Run) -> bool:
    """Whether --max-train-seconds are over. Only finished steps count: nothing here waits for the one that is running. Ranks have
    agreed with the results of the last step, and so take one more."""
    return run.time_is_up if is_distributed() else run.trainer.time_is_up()


def evaluations_due(run: Run, last: bool) -> list[Callable[[], None]]:
    """The evaluations that the present step asks for; bits per byte also before the first step."""
    step, flags, evaluator = run.state.step, run.plan.config.eval, run.evaluator
    periods = {evaluator.bits_per_byte: flags.eval_every, evaluator.core_metric: flags.core_metric_every,
               evaluator.sample: flags.sample_every}
    return [evaluate for evaluate, period in periods.items()
            if period > 0 and (last or every(step, period) or (step == 0 and evaluate == evaluator.bits_per_byte))]


def every(step: int, period: int) -> bool:
    """True at steps period, 2 * period, ...; never for a period <= 0."""
    return period > 0 and step > 0 and step % period == 0


def build_and_fit(config: Config) -> int:
    """Build the run that the flags describe, and train it to the end. Returns the exit status."""
    try:
        with lost_peers_named():
            run = build_run(config)
    except FailedStart as e:
        say("oom", str(e))
        return 1
    return fit(run)


def fit(run: Run) -> int:
    """Train a run to the end, and leave a result.json whatever happens. Returns the exit status."""
    status, error, code = "ok", None, 0
    with run.signals.install_handlers():
        try:
            try:
                with run.observed(), lost_peers_named(lambda: bool(run.signals.received)):
                    train(run)
            except PeerLost:
                run.checkpoints.expect_less_of_others(GONE)
                raise
            finally:
                run.checkpoints.close()
        except Interrupted as e:
            status, error, code = "interrupted", f"{e}. {resume_hint(run)}", e.exit_code
        except Diverged as e:
            status, code = "diverged", 1
            error = f"{e}. {resume_hint(run)} {divergence_advice(run.plan.device, run.plan.kernel_choices['attention'])}"
        except PeerLost as e:
            code = e.status
            status, error = word_of_another() or ("failed", str(e) or "another rank is gone")
            raise
        except UserError as e:
            status, error, code = "failed", str(e), 2
        except BaseException as e:
            if not is_out_of_memory(e):
                status, error, code = "failed", f"{type(e).__name__}: {e}", 1
                raise
            status, error, code = "oom", f"out of memory. {out_of_memory_advice(run.plan)} {resume_hint(run)}", 1
        finally:
            gc.unfreeze()
            if error and status in ("failed", "oom") and code != PeerLost.status and not is_main_rank():
                leave_word(status, error)
            close(run, status, error, code)
            if run.stop_signal and code != PeerLost.status:
                barrier()  # torchrun ends all ranks as soon as one ends with an error: not before rank 0 has saved
    if error:
        say(status, error)
    return code


def say(status: str, error: str) -> None:
    """Print why this process ends. Rank 0 says what all ranks meet. Another one may be alone with its error, such as a disk that
    is full there, or memory that has run out."""
    if not is_main_rank() and status not in ("failed", "oom"):
        return
    if not is_main_rank() and status == "failed":
        program.wait_to_be_ended()
    rank = "" if is_main_rank() else f"rank {rank_and_world_size()[0]}: "
    print(f"{status}: {rank}{error}", file=sys.stderr, flush=True)


def close(run: Run, status: str, error: str | None, exit_code: int) -> None:
    """Close what a run has open, write its result, give its lock back."""
    try:
        run.trainer.loader.close()
        run.recorder.close()
        record_end(run.recorder, run.trainer, run.checkpoints.last(), status, error, exit_code)
    finally:
        if run.lock:
            run.lock.release()


def resume_hint(run: Run) -> str:
    last = run.checkpoints.last()
    return f"The last checkpoint is {last} (--resume-from-step=latest)." if last else "There is no checkpoint yet."
