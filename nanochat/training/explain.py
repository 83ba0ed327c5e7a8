"""`--explain`: what a command line would do, computed from the flags alone, before any text is read. No torch."""

import shutil

from nanochat.common import UserError, format_table
from nanochat.features import FEATURES, Features
from nanochat.recipe.horizon import Horizon
from nanochat.recipe.memory_estimate import How, plan_memory
from nanochat.recipe.schedules import lr_multiplier, muon_momentum, weight_decay_multiplier
from nanochat.recipe.shape import GPTConfig, param_counts, window_sizes
from nanochat.tokenizer import get_tokenizer
from nanochat.training.config import Config


def explain(config: Config, shape: GPTConfig, horizon: Horizon, vocabulary: str) -> str:
    """Model, horizon and schedules as aligned tables."""
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
        "tokens in all": f"{horizon.total_tokens:,} ({horizon.total_tokens / (counts['block_matrices'] + counts['lm_head']):.2f} "
                         "per scaling parameter)",
        "FLOPs in all": f"{horizon.total_flops:.4g}",
        "learning rates": f"x {horizon.lr_scale:.4f} of the flags (sqrt of the batch over 2^19 tokens, times --lr-multiplier; "
                          "smear and backout keep 0.2)",
        "memory by estimate": memory(config, shape),
        "weight decay": f"{horizon.weight_decay:.5f} (from --weight-decay {config.optim.weight_decay})",
    }
    width = max(map(len, facts))
    total, optim = horizon.num_iterations, config.optim
    schedule = [{
        "step": step,
        "lr_multiplier": round(lr_multiplier(step, total, warmup_steps=optim.warmup_steps, warmdown_ratio=optim.warmdown_ratio,
                                             final_lr_frac=optim.final_lr_frac, warmdown_shape=optim.warmdown_shape), 4),
        "muon_momentum": round(muon_momentum(step, total, warmdown_ratio=optim.warmdown_ratio), 4),
        "weight_decay": round(horizon.weight_decay * weight_decay_multiplier(step, total), 5),
    } for step in sorted({round(total * share / 8) for share in range(8)} | {total - 1})]
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()) + "\n\n" + format_table(schedule)


def memory(config: Config, shape: GPTConfig) -> str:
    """What a step needs on one device, in words."""
    rows, element = config.horizon.device_batch_size, 4 if config.run.dtype == "float32" else 2
    # torch, which would know what there is, is not loaded for this
    cuda = config.run.device_type == "cuda" or (not config.run.device_type and shutil.which("nvidia-smi") is not None)
    plan = plan_memory(shape, rows, How(element, config.run.compile, cuda, **Features(config, FEATURES).memory()))
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in vars(plan).items())
    return f"{plan.total / 2**30:.2f} GiB with {rows} rows per micro-batch ({parts})"


def explain_flags(config: Config) -> str:
    """The explanation for a command line, with the vocabulary of the tokenizer at hand, else of --vocab-size."""
    try:
        vocab_size, origin = get_tokenizer().get_vocab_size(), "the tokenizer at hand"
    except UserError:
        vocab_size, origin = config.data.vocab_size, "--vocab-size: there is no tokenizer yet"
    shape = config.model.shape(vocab_size)
    return explain(config, shape, config.plan(shape), f"{vocab_size:,} ({origin})")
