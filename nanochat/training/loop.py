"""Training: the loop, one step of it, and what happens between steps. How a run comes to be is in nanochat/training/build.py."""

import math
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch

from nanochat.common import Diverged, UserError, format_duration, is_main_rank, print0
from nanochat.core_eval import CoreUnavailable, evaluate_core
from nanochat.dataloader import val_batches
from nanochat.engine import SAMPLE_TOKENS, Engine, sample_prompts
from nanochat.loss_eval import evaluate_bpb
from nanochat.runtime.clock import StepTime
from nanochat.runtime.device import evaluation
from nanochat.runtime.distributed import all_reduce_mean_and_max, barrier, is_distributed
from nanochat.runtime.signals import Interrupted
from nanochat.training.auto_batch import advice, out_of_memory
from nanochat.training.build import FailedStart, Run
from nanochat.training.config import Config

LOG_EVERY_SECONDS = 5.0
MAX_SKIPS = 10     # in a row, under --on-divergence skip
MAX_ROLLBACKS = 3  # in all, under --on-divergence rollback


def train(run: Run) -> None:
    """The loop. A checkpoint due is written before evaluation and sampling; one is made should these fail or be cut short.
    So whatever they do costs no training."""
    flags = run.config.eval
    run.features.after_update()  # of a checkpoint, or whatever has been done to the weights since the model was made
    while True:
        stop_if_told(run)
        step, last = run.step, run.step >= run.horizon.num_iterations or run.out_of_time()
        looks = [(evaluate, due(step, flags.eval_every, last) or (step == 0 and flags.eval_every > 0)),
                 (evaluate_core_metric, due(step, flags.core_metric_every, last)),
                 (sample, due(step, flags.sample_every, last))]
        if last or every(step, flags.save_every) or any(wanted for _, wanted in looks):
            settle(run)
        if last or every(step, flags.save_every):
            save(run)
        try:
            for look, wanted in looks:
                if wanted:
                    run.checkpoints.wait()  # a process that is killed in an evaluation must not take the writer with it
                    look(run)
        except BaseException as e:
            traceback.clear_frames(e.__traceback__)  # and with them what fills the memory, should that be the trouble
            save(run)
            raise
        if last:
            return
        stop_if_told(run)
        try:
            train_step(run)
        except Diverged as e:
            if run.config.run.on_divergence != "rollback":
                raise
            roll_back(run, e)
        else:
            run.step += 1


def stop_if_told(run: Run) -> None:
    """After a signal: save and end the run. Under torchrun by the signal that every rank has learned of at the same step."""
    if signum := run.stop if is_distributed() else run.signals.received:
        settle(run)
        save(run)
        raise Interrupted(signum)


def save(run: Run) -> None:
    """Write a checkpoint, unless there is one of this step, or nothing to keep."""
    if run.step > run.saved_step:
        run.save()
        run.saved_step = run.step


def every(step: int, n: int) -> bool:
    """True at steps n, 2n, ...; never for n <= 0."""
    return n > 0 and step > 0 and step % n == 0


def due(step: int, n: int, last: bool) -> bool:
    """True every n steps and at the last one; never for n <= 0."""
    return n > 0 and (last or every(step, n))


def train_step(run: Run) -> None:
    """One optimizer step: all micro-batches forward and backward, one update if its gradients are finite."""
    options = run.features.before_step(run.step)
    run.rehearse(options)
    loss = torch.zeros((), device=run.device)
    accumulation = run.horizon.grad_accum_steps
    with run.clock.training() as lap:
        for _ in range(accumulation):
            x, y = run.loader.next()
            micro_loss = run.forward(x, y, **options) / accumulation
            lap("forward")
            run.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
            lap("backward")
        stop = torch.full((), float(run.signals.received), device=run.device)
        all_reduce_mean_and_max([p.grad for p in run.model.parameters() if p.grad is not None] + [loss], stop)
        run.scaler.unscale_(run.optimizer)
        names, norms = gradient_norms(run.model)
        run.features.after_backward(run.model, run.step)
        run.set_schedule()
        # fp16 gradients overflow now and then: there the scaler leaves out the update, and lowers its scale
        update_if = None if run.scaler.is_enabled() else norms.isfinite().all() & loss.isfinite()
        # a run that goes on after such a step waits for the answer: left out, it is not even counted
        if run.config.run.on_divergence == "stop" or update_if is None or update_if.item():
            run.scaler.step(run.optimizer, finite=update_if)
            run.scaler.update()
            run.features.after_update()
        run.model.zero_grad(set_to_none=True)
        lap("update")
        results = on_its_way(torch.cat([loss[None], stop[None], norms]))
    launched = Unsettled(run.step, run.lr_multiplier, names, results, run.loader.checksum(), run.clock.last)
    before, run.unsettled = run.unsettled, launched
    if before:
        settle_step(run, before)
    if not run.features.defers or run.config.run.on_divergence != "stop":
        settle(run)


def gradient_norms(model) -> tuple[list[str], torch.Tensor]:
    """Names of the parameters that have a gradient, and the norms of those: (n,) fp32, on the device."""
    names, norms = [], []
    by_dtype = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            by_dtype.setdefault(p.grad.dtype, {})[name] = p.grad
    for gradients in by_dtype.values():  # of one dtype they are a single kernel on a GPU
        names += gradients
        norms += [norm.float() for norm in torch._foreach_norm(list(gradients.values()))]
    return names, torch.stack(norms)


def on_its_way(results: torch.Tensor) -> torch.Tensor:
    """A copy on the host, which is there when the step has ended. Read any later from a CUDA device, it would queue up behind
    the steps launched since, and wait for them."""
    return results.to("cpu", non_blocking=True)  # into pinned memory


class Unsettled(NamedTuple):
    """A step whose results may still be on their way from the device."""
    step: int
    lr_multiplier: float
    names: list[str]              # of the n parameters trained
    results: torch.Tensor         # (2 + n,) fp32: loss, the signal that a rank got (else 0), norms of the gradients
    checksum: int                 # of its tokens
    time: Callable[[], StepTime]  # waits for the step's end


def settle(run: Run) -> None:
    """Take in the last step's results, if that has not been done."""
    if run.unsettled:
        step, run.unsettled = run.unsettled, None
        settle_step(run, step)


def settle_step(run: Run, done: Unsettled) -> None:
    """Wait for a step's results and record them. Diverged where they are not finite, unless such steps are skipped."""
    dt = done.time()
    loss, stop, *norms = done.results.tolist()
    run.stop = int(stop)
    bad = [name for name, norm in zip(done.names, norms, strict=True) if not math.isfinite(norm)]
    if math.isfinite(loss) and (not bad or run.scaler.is_enabled()):
        run.features.after_step(done.step, loss, dt)
        return record_step(run, done, loss, math.hypot(*norms), dt.total)
    trouble = (f"step {done.step} was not taken: its loss is {loss:.4g}, and the gradients of {len(bad)} of {len(norms)} "
               f"parameters are not finite" + (f", among them {bad[-1]}" if bad else ""))
    if run.config.run.on_divergence == "skip":
        skip(run, done, trouble)
    else:
        run.step, run.unsettled = done.step, None
        raise Diverged(trouble)


def skip(run: Run, done: Unsettled, trouble: str) -> None:
    """Go on after a step that was left out: its batch is used up, and weights, moments and features are as before it."""
    skipped = run.tally.skipped_steps
    skipped.append(done.step)
    if skipped[-MAX_SKIPS:] == list(range(done.step - MAX_SKIPS + 1, done.step + 1)):
        raise Diverged(f"{trouble}; so were the {MAX_SKIPS - 1} before it, and skipping does not help")
    run.metrics.write({"step": done.step, "step_kind": "skipped", "lr_multiplier": done.lr_multiplier,
                       "batch_crc32": done.checksum, "tokens_seen": (done.step + 1) * run.horizon.total_batch_size,
                       "train_time_sec": run.clock.train})
    run.console.line(f"{trouble}; skipped ({len(skipped)} so far)")


def roll_back(run: Run, trouble: Diverged) -> None:
    """Return to the last checkpoint and go on with other data: the batches from there to the step that diverged are left
    out. The same ones would end in the same place, and the trouble began before it showed (PaLM, arXiv 2204.02311, 5.1)."""
    if len(run.tally.rollbacks) == MAX_ROLLBACKS:
        raise Diverged(f"{trouble}; {MAX_ROLLBACKS} rollbacks have not helped") from None
    if run.saved_step == 0:
        raise Diverged(f"{trouble}; there is no checkpoint to go back to yet") from None
    diverged_at = run.step
    run.go_back(run.saved_step)
    run.console.line(f"{trouble}; back to step {run.step}, and on with the data that follows step {diverged_at}'s "
                     f"(rollback {len(run.tally.rollbacks)} of {MAX_ROLLBACKS})")


def record_step(run: Run, done: Unsettled, loss: float, grad_norm: float, dt: float) -> None:
    """The step's row in metrics.jsonl, and now and then a line for whoever watches."""
    n_layer, peak = run.model.config.n_layer, run.memory.step_peak()
    run.tally.add_step(done.step, loss, dt, peak, run.clock.train)
    row = {
        "step": done.step, "loss": loss, "smooth_loss": run.tally.smooth_loss, "lr_multiplier": done.lr_multiplier,
        "dt_ms": dt * 1000, "tok_per_sec": run.horizon.total_batch_size / dt, "peak_mem_mib": peak,
        "step_kind": "full", "active_start": 0, "active_layers": n_layer, "grad_norm": grad_norm, "batch_crc32": done.checksum,
        "tokens_seen": (done.step + 1) * run.horizon.total_batch_size, "train_time_sec": run.clock.train,
    } | run.features.metrics()
    run.metrics.write(row)
    run.trackers.log({f"train/{k}": v for k, v in row.items() if k != "step"}, done.step)
    now = time.monotonic()
    if run.console.tty or done.step - run.first_step < 3 or now - run.console.shown >= LOG_EVERY_SECONDS:
        run.console.show(progress_line(run, row))


def progress_line(run: Run, row: dict) -> str:
    total, done = run.horizon.num_iterations, row["step"] + 1
    recent = run.tally.dts[-50:]
    eta = (total - done) * sum(recent) / len(recent)
    if run.config.run.max_train_seconds > 0:
        eta = min(eta, max(0.0, run.config.run.max_train_seconds - run.clock.train))
    return (f"step {done:0{len(str(total))}d}/{total} ({100 * done / total:.1f}%) | loss {row['smooth_loss']:.4f} | "
            f"lr x{row['lr_multiplier']:.2f} | {row['dt_ms']:,.0f} ms | {row['tok_per_sec']:,.0f} tok/s | "
            f"{row['peak_mem_mib']:,.0f} MiB | {format_duration(run.clock.train)} | eta {format_duration(eta)}")


@contextmanager
def looking(run: Run):
    """Evaluation and sampling: beside training, and cut short by a signal where no other rank waits for the result."""
    with run.signals.raised(run.ranks.world_size == 1), run.clock.evaluating(), evaluation(run.model), \
            run.features.eval_context(run.model):
        yield


def evaluate(run: Run) -> None:
    """Bits per byte on the fixed validation tokens, through the uncompiled model."""
    with looking(run):
        batches = val_batches(run.tokens.split("val"), run.model.config.sequence_len, run.config.horizon.device_batch_size,
                              run.config.eval.eval_tokens, run.ranks.rank, run.ranks.world_size, run.device)
        bpb = evaluate_bpb(run.model, batches, None, run.token_bytes)
    run.tally.add_evaluation(run.step, bpb, run.clock.train)
    row = {"step": run.step, "val_bpb": bpb, "train_time_sec": run.clock.train,
           "tokens_seen": run.step * run.horizon.total_batch_size}
    run.metrics.write(row)
    run.trackers.log({"val/bpb": bpb, "val/train_time_sec": run.clock.train}, run.step)
    run.console.line(f"step {run.step} | validation {bpb:.6f} bits per byte (best {run.tally.min_val_bpb:.6f})")


def evaluate_core_metric(run: Run) -> None:
    """The CORE metric, where its bundle is at hand or can be fetched; otherwise a line that says so."""
    try:
        with looking(run):
            results = evaluate_core(run.model, run.tokenizer, run.device, run.config.eval.core_metric_max_per_task)
    except CoreUnavailable as e:
        return run.console.line(f"step {run.step} | CORE left out: {e}")
    run.metrics.write({"step": run.step, "train_time_sec": run.clock.train, "core_metric": results["core_metric"]})
    run.trackers.log({"core_metric": results["core_metric"]}, run.step)
    run.console.line(f"step {run.step} | CORE metric {results['core_metric']:.4f}")


def sample(run: Run) -> None:
    """A few greedy continuations, on rank 0."""
    if not is_main_rank():
        return
    run.console.line(f"step {run.step} | samples")
    with looking(run):
        engine = Engine(run.model, run.tokenizer)
        for prompt in sample_prompts(run.config.data.data):
            print0("  " + engine.complete(prompt, max_tokens=SAMPLE_TOKENS, temperature=0.0).replace("\n", "\n  "))


def build_and_train(config: Config) -> int:
    """Build the run that the flags describe, and train it to the end. Returns the exit status."""
    try:
        run = Run(config)
    except FailedStart as e:
        if is_main_rank():
            print(f"oom: {e}", file=sys.stderr, flush=True)
        return 1
    return run_to_the_end(run)


def run_to_the_end(run: Run) -> int:
    """Train, and leave a result.json whatever happens. Returns the exit status."""
    status, error, code = "ok", None, 0
    with run.signals.caught():
        try:
            try:
                train(run)
            finally:
                run.checkpoints.close()
        except Interrupted as e:
            status, error, code = "interrupted", f"{e}. {how_to_go_on(run)}", e.exit_code
        except Diverged as e:
            status, code = "diverged", 1
            error = (f"{e}. {how_to_go_on(run)} Lower the learning rates (--lr-multiplier 0.5), train in fp32, or leave such "
                     "steps out (--on-divergence skip); under --fp8 runs/fpi_debug.sh names the module where it begins")
        except UserError as e:
            status, error, code = "failed", str(e), 2
        except BaseException as e:
            if not out_of_memory(e):
                status, error, code = "failed", f"{type(e).__name__}: {e}", 1
                raise
            status, error, code = "oom", f"out of memory. {advice(run)} {how_to_go_on(run)}", 1
        finally:
            run.finish(status, error, code)
            if run.stop and is_distributed():
                barrier()  # torchrun ends all ranks as soon as one ends with an error: not before rank 0 has saved
    if error and is_main_rank():
        print(f"{status}: {error}", file=sys.stderr, flush=True)
    return code


def how_to_go_on(run: Run) -> str:
    last = run.last_checkpoint()
    return f"The last checkpoint is {last} (--resume-from-step=latest)." if last else "There is no checkpoint yet."

