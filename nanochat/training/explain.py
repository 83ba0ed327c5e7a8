"""`--explain`: what a run would do and need, computed from the flags alone, before any text is read. No torch.

`report` computes it, `as_text` prints it. `python -m scripts.plan` adds what has to be measured (plan_probe.py).
"""

import shutil
from dataclasses import replace

from nanochat.common import UserError, format_table, get_base_dir
from nanochat.features import FEATURES, Features
from nanochat.recipe.depth_growth import grows, growth_step
from nanochat.recipe.memory_estimate import (
    MARGIN,
    MemoryConfig,
    advice,
    all_weights,
    estimate_memory,
    host_memory,
    largest_fit,
    micro_batches,
)
from nanochat.recipe.schedules import lr_scale, muon_momentum, weight_decay_scale
from nanochat.recipe.shape import GPTConfig, param_counts, scaling_params, window_sizes
from nanochat.tokenizer import get_tokenizer
from nanochat.training.config import Config
from nanochat.training.plan_cache import CHARS_PER_TOKEN

# Bytes of a process that are no model's, by whether it compiles: Python, torch, and what steps load (AMD EPYC, torch 2.13)
PROGRAM = {False: 380 * 2**20, True: 480 * 2**20}
MAPPED_AT_ONCE = 2**16  # bytes of a file that come into memory with any of them: what Linux maps around a page


def vocabulary(config: Config) -> tuple[int, str]:
    """The size of the vocabulary: of the existing tokenizer, otherwise --vocab-size; and which of the two."""
    try:
        return get_tokenizer().get_vocab_size(), "the existing tokenizer"
    except UserError:
        return config.data.vocab_size, "--vocab-size: there is no tokenizer yet"


def report(config: Config) -> dict:
    """Everything that `as_text` shows, for JSON. Sizes are in bytes."""
    vocab_size, origin = vocabulary(config)
    shape = config.model.shape(vocab_size)
    horizon, depth = config.plan(shape), config.features["progressive_depth"]
    return {
        "model": {"layers": shape.n_layer, "width": shape.n_embd, "heads": shape.n_head, "head_dim": shape.head_dim,
                  "context": shape.sequence_len, "windows": window_sizes(shape), "vocabulary": vocab_size,
                  "vocabulary_from": origin, "flops_per_token": horizon.flops_per_token},
        "parameters": param_counts(shape),
        "horizon": {"tokens_per_step": horizon.total_batch_size, "micro_batches_per_step": horizon.grad_accum_steps,
                    "steps": horizon.num_iterations, "steps_set_by": horizon.reason, "tokens": horizon.total_tokens,
                    "depth_grows_at": growth_step(depth, horizon.num_iterations) if grows(depth, shape.n_layer) else None,
                    "tokens_per_scaling_parameter": horizon.total_tokens / scaling_params(shape),
                    "flops": horizon.total_flops, "lr_factor": horizon.lr_factor,
                    "scalar_lr_factor": horizon.scalar_lr_factor, "weight_decay": horizon.weight_decay},
        "memory": memory(config, shape),
        "disk": disk(config, shape, horizon.num_iterations),
        "schedule": schedule(config, horizon.num_iterations, horizon.weight_decay),
    }


def memory_config(config: Config) -> MemoryConfig:
    """What the memory of a step depends on, as far as the flags tell it."""
    # nvidia-smi instead of torch, which takes seconds to import
    cuda = config.run.device_type == "cuda" or (not config.run.device_type and shutil.which("nvidia-smi") is not None)
    return MemoryConfig(4 if config.run.dtype == "float32" else 2, config.run.compile, cuda, **config.memory_fields(),
                        **Features(config, FEATURES).memory())


def memory(config: Config, shape: GPTConfig) -> dict:
    """The estimated memory of a step on one device, in total and by component; and the micro-batch that fits in this machine's
    memory. The memory of a GPU is not known here: its two entries are None, and so is `process`, what the process of a CPU holds
    besides."""
    rows, how = config.horizon.device_batch_size, memory_config(config)
    estimate, limit = estimate_memory(shape, rows, how), None if how.cuda else host_memory(available=False)
    fitting = limit and largest_fit(shape, micro_batches(rows, shape.sequence_len), limit, how)
    return {"rows": rows, "fewer_rows_where_short": config.horizon.takes_what_fits, "total": estimate.total,
            "components": vars(estimate), "process": None if how.cuda else process_memory(config, shape),
            "available": limit, "rows_that_fit": fitting,
            "advice": advice(shape, rows, limit, how) if limit and fitting != rows else None}


def process_memory(config: Config, shape: GPTConfig) -> dict[str, int]:
    """Bytes that the process of a run on a CPU holds at its peak besides a step's. By purpose: the program; the copies from which
    checkpoints are written, where there are any before the end; the prepared text, as far as it is read and its size is known."""
    how, horizon = memory_config(config), config.plan(shape)
    copies = all_weights(shape, how) + estimate_memory(shape, 1, how).moments  # those of rank 0
    every, chars = config.eval.save_every, config.data.max_chars
    read = horizon.total_tokens // shape.sequence_len * MAPPED_AT_ONCE
    token = 2 if shape.vocab_size <= 2**16 else 4
    return {"program": PROGRAM[config.run.compile],
            "checkpoint copies": copies if 0 < every < horizon.num_iterations else 0,
            "text": min(read, chars // CHARS_PER_TOKEN * token) if chars > 0 else 0}


def disk(config: Config, shape: GPTConfig, steps: int) -> dict:
    """The checkpoints of a run: the size of one, and how many there are at most at a time."""
    estimate = estimate_memory(shape, 1, replace(memory_config(config), weight_ranks=1))
    every, keep = config.eval.save_every, config.eval.keep_last
    count = -(-steps // every) if every > 0 else 1
    count = min(count, keep + 2) if keep > 0 else count  # those kept, the best, and the one being written
    size = estimate.weights + estimate.moments
    return {"checkpoint": size, "checkpoints": count, "total": size * count, "free": shutil.disk_usage(get_base_dir()).free}


def schedule(config: Config, total: int, weight_decay: float) -> list[dict]:
    """The schedules at nine steps of the run."""
    optim = config.optim
    return [{
        "step": step,
        "lr_multiplier": round(lr_scale(step, total, warmup_steps=optim.warmup_steps, warmdown_ratio=optim.warmdown_ratio,
                                        final_lr_frac=optim.final_lr_frac, warmdown_shape=optim.warmdown_shape), 4),
        "muon_momentum": round(muon_momentum(step, total, warmdown_ratio=optim.warmdown_ratio), 4),
        "weight_decay": round(weight_decay * weight_decay_scale(step, total), 5),
    } for step in sorted({round(total * share / 8) for share in range(8)} | {total - 1})]


def as_text(found: dict, config: Config) -> str:
    """A report as aligned lines, and the schedules as a table."""
    model, horizon, memory, disk = (found[part] for part in ("model", "horizon", "memory", "disk"))
    facts = {
        "layers x width": f"{model['layers']} x {model['width']} ({model['heads']} heads of {model['head_dim']})",
        "context and windows": f"{model['context']} tokens; per layer {', '.join(map(str, model['windows']))}",
        "vocabulary": f"{model['vocabulary']:,} ({model['vocabulary_from']})",
        **{f"parameters: {role}": f"{count:,}" for role, count in found["parameters"].items()},
        "FLOPs per token": f"{model['flops_per_token']:.4g}",
        "tokens per step": f"{horizon['tokens_per_step']:,} in {horizon['micro_batches_per_step']} micro-batches per rank",
        "steps": f"{horizon['steps']:,} (set by {horizon['steps_set_by']})" + (
            f", with {config.features['progressive_depth'].initial_depth} of the {model['layers']} blocks before step {grown:,}"
            if (grown := horizon["depth_grows_at"]) is not None else ""),
        "tokens in total": f"{horizon['tokens']:,} ({horizon['tokens_per_scaling_parameter']:.2f} per scaling parameter)",
        "FLOPs in total": f"{horizon['flops']:.4g}",
        "learning rates": f"x {horizon['lr_factor']:.4f} of the flags (by batch and length of the run, times "
                          f"--lr-multiplier; the scalars x {horizon['scalar_lr_factor']:.4f}; smear, backout and short "
                          "convolutions keep theirs)",
        "weight decay": f"{horizon['weight_decay']:.5f} (from --weight-decay {config.optim.weight_decay})",
        **{f"memory: {component}": size_text(size) for component, size in memory["components"].items()},
        "estimated memory": f"{size_text(memory['total'])} with {memory['rows']} rows per micro-batch (the larger of update, and "
                            "activations with logits)",
        **{f"memory: {purpose}": f"{size_text(size)}, of the process" for purpose, size in (memory["process"] or {}).items()
           if size},
        **({"memory of the process": f"{size_text(memory['total'] + sum(memory['process'].values()))} at its peak, which is what "
                                     "result.json has"} if memory["process"] else {}),
        **fitting(memory),
        "disk": f"{disk['checkpoints']:,} x {size_text(disk['checkpoint'])} = {size_text(disk['total'])} of checkpoints; "
                f"{size_text(disk['free'])} are free" + (": TOO LITTLE" if disk["total"] > disk["free"] else ""),
    }
    return f"{lines(facts)}\n\n{format_table(found['schedule'])}"


def fitting(memory: dict) -> dict[str, str]:
    """The line that says which micro-batch fits; where the memory is not known, only that the run finds it out."""
    asked, fits, fewer = memory["rows"], memory["rows_that_fit"], memory["fewer_rows_where_short"]
    if memory["available"] is None:
        said = f"the largest of at most {asked} rows, when the run starts" if fewer else None
    elif fits == asked or (fits and fewer):
        said = f"{fits} of at most {asked} rows, in {MARGIN:.0%} of {size_text(memory['available'])}"
    else:
        said = f"{fits or 'none'}: {memory['advice']}"
    return {"micro-batch that fits": said} if said else {}


def lines(facts: dict[str, str]) -> str:
    """Names and values, one pair a line, the values beginning in one column."""
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


def size_text(size: float) -> str:
    """Bytes at a glance: `0.4 MiB`, `1.25 GiB`."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def explain_flags(config: Config) -> str:
    """The explanation of a command line."""
    return as_text(report(config), config)
