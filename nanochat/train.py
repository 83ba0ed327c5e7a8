"""Training: the loop, one step of it, and what happens between steps. How a run comes to be is in nanochat/setup.py."""

import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat.clock import StepTime
from nanochat.common import Diverged, UserError, format_duration, is_main_rank, print0
from nanochat.core_eval import CoreUnavailable, evaluate_core
from nanochat.dataloader import val_batches
from nanochat.device import evaluation
from nanochat.engine import SAMPLE_TOKENS, Engine, sample_prompts
from nanochat.loss_eval import evaluate_bpb
from nanochat.setup import Run

LOG_EVERY_SECONDS = 5.0


def train(run: Run) -> None:
    """The loop. A checkpoint is written before evaluation and sampling, so that whatever they do costs no training."""
    flags = run.config.eval
    while True:
        step, last = run.step, run.step >= run.horizon.num_iterations or run.out_of_time()
        now = [(Run.save, last or (every(step, flags.save_every) and step != run.first_step)),
               (evaluate, due(step, flags.eval_every, last) or (step == 0 and flags.eval_every > 0)),
               (evaluate_core_metric, due(step, flags.core_metric_every, last)), (sample, due(step, flags.sample_every, last))]
        if any(wanted for _, wanted in now):
            settle(run)
        for act, wanted in now:
            if wanted:
                act(run)
        if last:
            return
        train_step(run)
        run.step += 1


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
        average_over_ranks(run.model, loss)
        run.scaler.unscale_(run.optimizer)
        names, norms = gradient_norms(run.model)
        run.features.after_backward(run.model, run.step)
        run.set_schedule()
        # fp16 gradients overflow now and then: there the scaler leaves out the update, and lowers its scale
        update_if = None if run.scaler.is_enabled() else norms.isfinite().all() & loss.isfinite()
        run.scaler.step(run.optimizer, finite=update_if)
        run.scaler.update()
        run.features.after_update()
        run.model.zero_grad(set_to_none=True)
        lap("update")
    before, run.unsettled = run.unsettled, Unsettled(run.step, run.lr_multiplier, loss, names, norms, run.clock.last)
    if before:
        settle_step(run, before)
    if not run.features.defers:
        settle(run)


def average_over_ranks(model, loss: torch.Tensor) -> None:
    """Average the gradients that exist, and the loss, over the ranks. All ranks have trained the same parameters."""
    if not dist.is_initialized():
        return
    tensors = [p.grad for p in model.parameters() if p.grad is not None] + [loss]
    for handle in [dist.all_reduce(t, async_op=True) for t in tensors]:
        handle.wait()
    torch._foreach_div_(tensors, dist.get_world_size())


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


class Unsettled(NamedTuple):
    """A step whose results may still be on their way from the device."""
    step: int
    lr_multiplier: float
    loss: torch.Tensor           # 0-d fp32
    names: list[str]             # parameters trained
    norms: torch.Tensor          # of their gradients
    time: Callable[[], StepTime]  # waits for the step's end


def settle(run: Run) -> None:
    """Take in the last step's results, if that has not been done."""
    if run.unsettled:
        step, run.unsettled = run.unsettled, None
        settle_step(run, step)


def settle_step(run: Run, done: Unsettled) -> None:
    """Wait for a step's results, stop the run if they are not finite, and record them."""
    dt, loss, norms = done.time(), done.loss.item(), done.norms.tolist()
    bad = [name for name, norm in zip(done.names, norms) if not math.isfinite(norm)]
    if not math.isfinite(loss) or (bad and not run.scaler.is_enabled()):
        run.step, run.unsettled = done.step, None
        raise Diverged(f"step {done.step} was not taken: its loss is {loss:.4g}, and the gradients of {len(bad)} of {len(norms)} "
                       f"parameters are not finite" + (f", among them {bad[-1]}" if bad else ""))
    run.features.after_step(done.step, loss, dt)
    record_step(run, done, loss, math.hypot(*norms), dt.total)


def record_step(run: Run, done: Unsettled, loss: float, grad_norm: float, dt: float) -> None:
    """The step's row in metrics.jsonl, and now and then a line for whoever watches."""
    n_layer, peak = run.model.config.n_layer, run.memory.step_peak()
    run.tally.add_step(done.step, loss, dt, peak, run.clock.train)
    row = {
        "step": done.step, "loss": loss, "smooth_loss": run.tally.smooth_loss, "lr_multiplier": done.lr_multiplier,
        "dt_ms": dt * 1000, "tok_per_sec": run.horizon.total_batch_size / dt, "peak_mem_mib": peak,
        "step_kind": "full", "active_start": 0, "active_layers": n_layer, "grad_norm": grad_norm,
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


def evaluate(run: Run) -> None:
    """Bits per byte on the fixed validation tokens, through the uncompiled model."""
    with run.clock.evaluating(), evaluation(run.model), run.features.eval_context(run.model):
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
        with run.clock.evaluating(), evaluation(run.model), run.features.eval_context(run.model):
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
    with run.clock.evaluating(), evaluation(run.model), run.features.eval_context(run.model):
        engine = Engine(run.model, run.tokenizer)
        for prompt in sample_prompts(run.config.data.data):
            print0("  " + engine.complete(prompt, max_tokens=SAMPLE_TOKENS, temperature=0.0).replace("\n", "\n  "))


def run_to_the_end(run: Run) -> int:
    """Train, and leave a result.json whatever happens. Returns the exit status."""
    status, error, code = "ok", None, 0
    try:
        train(run)
    except KeyboardInterrupt:
        status, error, code = "interrupted", "interrupted from the keyboard", 130
    except Diverged as e:
        status, error, code = "diverged", f"{e}. Lower the learning rates (--lr-multiplier 0.5), or train in fp32; under --fp8 " \
            "runs/fpi_debug.sh names the module where it begins", 1
    except torch.OutOfMemoryError:
        status, code = "oom", 1
        error = ("out of memory. Halve --device-batch-size (the result stays the same: more micro-batches are "
                 "accumulated), shorten --max-seq-len, or lower --depth")
    except UserError as e:
        status, error, code = "failed", str(e), 2
    except BaseException as e:
        status, error, code = "failed", f"{type(e).__name__}: {e}", 1
        raise
    finally:
        run.finish(status, error, code)
    if error and is_main_rank():
        print(f"{status}: {error}", file=sys.stderr, flush=True)
    return code
