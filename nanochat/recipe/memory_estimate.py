"""Estimate the memory of a training step by arithmetic alone, and advise flags that would fit. No torch.

Weights, gradients and moments follow from the model's shape. Three parts are fitted to measured peaks: the activations that a
token leaves for the backward pass, the logits with all that the loss makes of them, and the temporaries of the largest
optimizer update. Activations and temporaries do not exist at the same time, so the larger of the two counts. Frozen blocks
and FP8 are not modelled. Accuracy against measured peaks: docs/reliability.md.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.recipe.shape import MUON_BATCH, GPTConfig, param_counts

MARGIN = 0.8  # share of the available memory that an estimate may use


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of a run that decide its memory, besides the model's shape and the micro-batch."""
    bytes_per_element: int     # of activations and embedding tables: 2 or 4
    compiled: bool
    cuda: bool = False         # CUDA, else CPU coefficients, which also serve for Apple GPUs, as those were not measured
    chunked_ce: bool = False   # --chunked-ce
    recompute: bool = False    # --recompute-activations; without effect unless compiled
    momentum_bytes: int = 4    # bytes per element of the first moments
    weight_ranks: int = 1      # ranks that divide weights, gradients and moments (--shard-weights)


@dataclass(frozen=True)
class MemoryCoefficients:
    """Coefficients fitted to measured peaks: d3 to d12 on CPUs, d8 to d20 on CUDA (dev/LOG.md)."""
    logit: float          # bytes per logit, without --chunked-ce
    per_layer: float      # activations per token and layer, in units of n_embd elements
    once: float           # activations per token outside of the layers, in the same unit
    recomputed: float     # per_layer under --recompute-activations
    cast: float           # bytes per element of the blocks' matrices, for low-precision copies kept for the backward pass
    muon: float           # temporaries of a Muon update: fp32 numbers per element of the stack of matrices
    adamw: float          # temporaries of an AdamW update: fp32 numbers per element of lm_head


COEFFICIENTS = {  # (cuda, compiled)
    (False, False): MemoryCoefficients(logit=40, per_layer=22, once=87, recomputed=22, cast=0, muon=28, adamw=18),
    (False, True): MemoryCoefficients(logit=7, per_layer=14, once=113, recomputed=6, cast=0, muon=20, adamw=10),
    (True, False): MemoryCoefficients(logit=17, per_layer=19, once=7, recomputed=19, cast=2, muon=28, adamw=18),
    (True, True): MemoryCoefficients(logit=2.2, per_layer=19, once=7, recomputed=11, cast=2, muon=20, adamw=10),
}
# Where ranks divide the weights, units that are whole at a time, besides each rank's share. Counted, not fitted.
WEIGHT_UNITS = 3    # the one in use, the next one, and lm_head
GRADIENT_UNITS = 5  # one that is being computed; of two on their way, what is sent and what has come
CHUNK = {False: 2**23, True: 2**28}  # cuda -> bytes of a chunk's logits: CHUNK_BYTES in nanochat/kernels/cross_entropy.py


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, by purpose."""
    weights: int
    gradients: int
    moments: int      # first and second moments of the optimizer
    update: int       # temporaries of the largest optimizer update
    activations: int  # kept for the backward pass
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + max(self.update, self.activations + self.logits)


def estimate_memory(shape: GPTConfig, rows: int, config: MemoryConfig) -> MemoryEstimate:
    """Estimate the memory of a step with micro-batches of `rows` sequences."""
    counts, fit = param_counts(shape), COEFFICIENTS[config.cuda, config.compiled]
    tables, matrices = counts["wte"] + counts["value_embeds"], counts["block_matrices"]
    weights = tables * config.bytes_per_element + (counts["total"] - tables) * 4
    tokens, matrix = rows * shape.sequence_len, 4 * shape.n_embd**2  # the largest matrix, of an MLP
    stacked = min(shape.n_layer, max(1, MUON_BATCH // matrix)) * matrix  # elements that Muon updates at once, at most
    activations = config.bytes_per_element * tokens * shape.n_embd * (
        shape.n_layer * (fit.recomputed if config.recompute else fit.per_layer) + fit.once)
    logits = fit.logit * tokens * shape.vocab_size
    if config.chunked_ce:  # one chunk, and lm_head's fp32 gradient about three times
        logits = min(logits, CHUNK[config.cuda] + 12 * counts["lm_head"])
    moments = config.momentum_bytes * counts["total"] + 4 * (counts["total"] - matrices)  # Muon's second moment is a vector
    ranks, unit = config.weight_ranks, largest_unit(shape, config)
    return MemoryEstimate(
        weights=weights if ranks == 1 else weights // ranks + WEIGHT_UNITS * unit,
        gradients=weights if ranks == 1 else weights // ranks + GRADIENT_UNITS * unit,
        moments=moments // ranks,
        update=int(4 * max(fit.muon * stacked, fit.adamw * counts["lm_head"])),
        activations=int(activations + (fit.cast * matrices if ranks == 1 else 0)),  # divided weights bring their casts
        logits=int(logits))


def all_weights(shape: GPTConfig, config: MemoryConfig) -> int:
    """Bytes of all weights."""
    return estimate_memory(shape, 1, replace(config, weight_ranks=1)).weights


def largest_unit(shape: GPTConfig, config: MemoryConfig) -> int:
    """Bytes of the largest part of the weights that is fetched at once: a block, a table or the head."""
    counts = param_counts(shape)
    tables = shape.vocab_size * shape.n_embd * config.bytes_per_element
    return max(4 * counts["block_matrices"] // shape.n_layer, tables, 4 * counts["lm_head"])


def micro_batches(rows: int, length: int = 16) -> list[int]:
    """Micro-batch sizes that divide `rows`, largest first: with gradient accumulation the tokens per step stay the same.

    length: tokens of a row. Where `rows` make a multiple of 16 tokens, as FP8 products need it, so does each size.
    """
    return [n for n in range(rows, 0, -1) if rows % n == 0 and (n * length % 16 == 0 or rows * length % 16)]


def largest_fit(shape: GPTConfig, candidates: list[int], available: int, config: MemoryConfig) -> int | None:
    """The first of the candidates (rows, largest first) whose estimate is within MARGIN of `available` bytes, or None."""
    return next((n for n in candidates if estimate_memory(shape, n, config).total <= MARGIN * available), None)


def evaluation_memory(shape: GPTConfig, rows: int, config: MemoryConfig) -> int:
    """Bytes of an uncompiled evaluation of `rows` sequences: weights, moments, and three fp32 tensors of all logits, or of a
    chunk. Counted, not fitted. It exceeds a step's where the model is small and compiled."""
    step, logits = estimate_memory(shape, rows, config), rows * shape.sequence_len * shape.vocab_size
    if config.chunked_ce:
        logits = min(logits, CHUNK[config.cuda] // config.bytes_per_element)
    return step.weights + step.moments + 12 * logits


def advice(shape: GPTConfig, rows: int, limit: int, config: MemoryConfig) -> str:
    """Advice after micro-batches of `rows` did not fit in `limit` bytes: the smallest change of flags that fits by estimate."""
    def needs(n, config):
        return gib(estimate_memory(shape, n, config).total)
    have = f"--device-batch-size {rows} needs about {needs(rows, config)}, of {gib(limit)}"
    saving = replace(config, chunked_ce=True, recompute=config.compiled)
    flags = [flag for flag, off in {"--chunked-ce": not config.chunked_ce,
                                    "--recompute-activations": config.compiled and not config.recompute}.items() if off]
    expected = not largest_fit(shape, [rows], limit, config)  # else something that is not modelled took the memory
    if flags and expected and largest_fit(shape, [rows], limit, saving):
        return f"{have}. Add {' '.join(flags)}: about {needs(rows, saving)}, at a little more time per step."
    for way, added in ((config, []), (saving, flags)):
        if fitting := largest_fit(shape, micro_batches(rows)[1:], limit, way):
            return (f"{have}. Take {' '.join([f'--device-batch-size {fitting}', *added])}: about {needs(fitting, way)}, and the "
                    "result stays the same, as more micro-batches are accumulated (--auto-batch chooses by itself).")
    least = " ".join(["--device-batch-size 1", *flags])
    return f"{have}, and even {least} about {needs(1, saving)}. Shorten --max-seq-len, or lower --depth or --vocab-size."


def gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"


def host_memory(available: bool) -> int:
    """Bytes of main memory that this process may use: in total, or still `available` now.

    The smallest of three limits: the machine's, the control group's (of a container), and `ulimit -v`.
    """
    limits = []
    try:
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(int(facts["MemAvailable" if available else "MemTotal"].split()[0]) * 2**10)
    except (OSError, ValueError, KeyError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        limits.append(int((group / "memory.max").read_text()) - available * int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no control groups, or "max"
        pass
    try:
        import resource
        granted = resource.getrlimit(resource.RLIMIT_AS)[0]
        if granted != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            limits.append(granted - available * used)
    except (ImportError, OSError):
        pass
    return max(0, min(limits))
