"""`--explain`: print what a run would do, computed from the flags alone, before any text is read. No torch."""

import shutil

from nanochat.common import UserError, format_table
from nanochat.features import FEATURES, Features
from nanochat.recipe.horizon import Horizon
from nanochat.recipe.memory_estimate import MemoryConfig, estimate_memory
from nanochat.recipe.schedules import lr_scale, muon_momentum, weight_decay_scale
from nanochat.recipe.shape import GPTConfig, param_counts, scaling_params, window_sizes
from nanochat.tokenizer import get_tokenizer
from nanochat.training.config import Config


def explain(config: Config, shape: GPTConfig, horizon: Horizon, vocabulary: str) -> str:
    """Model, horizon and schedules as aligned tables. vocabulary: its size and where that comes from, for the reader."""
    counts = param_counts(shape)
    windows = ", ".join(str(w) for w in window_sizes(shape))
    facts = {
        "layers x width": f"{shape.n_layer} x {shape.n_embd} ({shape.n_head} heads of {shape.head_dim})",
        "context and windows": f"{shape.sequence_len} tokens; per layer {windows}",
        "vocabulary": vocabulary,
        **{f"parameters: {role}": f"{count:,}" for role, count in counts.items()},
        "FLOPs per token": f"{horizon.flops_per_token:.4g}",
        "tokens per step": f"{horizon.total_batch_size:,} in {horizon.grad_accum_steps} micro-batches per rank",
        "steps": f"{horizon.num_iterations:,} (set by {horizon.reason})",
        "tokens in total": f"{horizon.total_tokens:,} ({horizon.total_tokens / scaling_params(shape):.2f} per scaling parameter)",
        "FLOPs in total": f"{horizon.total_flops:.4g}",
        "learning rates": f"x {horizon.lr_factor:.4f} of the flags (sqrt of the batch over 2^19 tokens, times --lr-multiplier; "
                          "smear and backout keep 0.2)",
        "estimated memory": memory(config, shape),
        "weight decay": f"{horizon.weight_decay:.5f} (from --weight-decay {config.optim.weight_decay})",
    }
    width = max(map(len, facts))
    total, optim = horizon.num_iterations, config.optim
    schedule = [{
        "step": step,
        "lr_multiplier": round(lr_scale(step, total, warmup_steps=optim.warmup_steps, warmdown_ratio=optim.warmdown_ratio,
                                        final_lr_frac=optim.final_lr_frac, warmdown_shape=optim.warmdown_shape), 4),
        "muon_momentum": round(muon_momentum(step, total, warmdown_ratio=optim.warmdown_ratio), 4),
        "weight_decay": round(horizon.weight_decay * weight_decay_scale(step, total), 5),
    } for step in sorted({round(total * share / 8) for share in range(8)} | {total - 1})]
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()) + "\n\n" + format_table(schedule)


def memory(config: Config, shape: GPTConfig) -> str:
    """The estimated memory of a step on one device, in total and by part."""
    rows, element = config.horizon.device_batch_size, 4 if config.run.dtype == "float32" else 2
    # nvidia-smi instead of torch, which takes seconds to import
    cuda = config.run.device_type == "cuda" or (not config.run.device_type and shutil.which("nvidia-smi") is not None)
    estimate = estimate_memory(shape, rows, MemoryConfig(element, config.run.compile, cuda, **config.memory_fields(),
                                                         **Features(config, FEATURES).memory()))
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(estimate).items())
    fewer = "; fewer are taken where memory is short" if config.horizon.takes_what_fits else ""
    return f"{estimate.total / 2**30:.2f} GiB with {rows} rows per micro-batch ({parts}){fewer}"


def explain_flags(config: Config) -> str:
    """The explanation of a command line, with the vocabulary size of the existing tokenizer, otherwise of --vocab-size."""
    try:
        vocab_size, origin = get_tokenizer().get_vocab_size(), "the existing tokenizer"
    except UserError:
        vocab_size, origin = config.data.vocab_size, "--vocab-size: there is no tokenizer yet"
    shape = config.model.shape(vocab_size)
    return explain(config, shape, config.plan(shape), f"{vocab_size:,} ({origin})")
