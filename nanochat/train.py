"""Training: the loop, one step of it, and what happens between steps. How a run comes to be is in nanochat/setup.py."""

import math
import sys
import time

import torch
import torch.distributed as dist

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
    while True:
        last = run.step >= run.horizon.num_iterations or run.out_of_time()
        flags = run.config.eval
        if last or (every(run.step, flags.save_every) and run.step != run.first_step):
            run.save()
        if due(run.step, flags.eval_every, last) or (run.step == 0 and flags.eval_every > 0):
            evaluate(run)
        if due(run.step, flags.core_metric_every, last):
            evaluate_core_metric(run)
        if due(run.step, flags.sample_every, last):
            sample(run)
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
    """One optimizer step: all micro-batches forward and backward, one update."""
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
        run.features.after_backward(run.model, run.step)
        run.set_schedule()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.features.after_update()
        run.model.zero_grad(set_to_none=True)
        lap("update")
        loss = loss.item()
    if not math.isfinite(loss):
        raise Diverged(f"the loss of step {run.step} is {loss}")
    run.features.after_step(run.step, loss, run.clock.last)
    record_step(run, loss)


def average_over_ranks(model, loss: torch.Tensor) -> None:
    """Average the gradients that exist, and the loss, over the ranks. All ranks have trained the same parameters."""
    if not dist.is_initialized():
        return
    tensors = [p.grad for p in model.parameters() if p.grad is not None] + [loss]
    for handle in [dist.all_reduce(t, async_op=True) for t in tensors]:
        handle.wait()
    torch._foreach_div_(tensors, dist.get_world_size())


def record_step(run: Run, loss: float) -> None:
    """The step's row in metrics.jsonl, and now and then a line for whoever watches."""
    dt, n_layer = run.clock.last.total, run.model.config.n_layer
    peak = run.memory.step_peak()
    run.tally.add_step(run.step, loss, dt, peak, run.clock.train)
    row = {
        "step": run.step, "loss": loss, "smooth_loss": run.tally.smooth_loss, "lr_multiplier": run.lr_multiplier,
        "dt_ms": dt * 1000, "tok_per_sec": run.horizon.total_batch_size / dt, "peak_mem_mib": peak,
        "step_kind": "full", "active_start": 0, "active_layers": n_layer,
        "tokens_seen": (run.step + 1) * run.horizon.total_batch_size, "train_time_sec": run.clock.train,
    } | run.features.metrics()
    run.metrics.write(row)
    run.trackers.log({f"train/{k}": v for k, v in row.items() if k != "step"}, run.step)
    now = time.monotonic()
    if run.console.tty or run.step - run.first_step < 3 or now - run.console.shown >= LOG_EVERY_SECONDS:
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
        status, error, code = "diverged", f"{e}. Lower the learning rates (--lr-multiplier 0.5), or train in fp32", 1
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
