"""What memory a training step needs, estimated by arithmetic alone, and the flags that would fit. No torch.

Weights, gradients and moments follow from the shape. The rest is fitted to measured peaks: what a token leaves for the
backward pass, the logits with all that the plain loss makes of them, and the temporaries of the largest update, which come
when the others are gone. Frozen blocks and FP8 are not counted. How near it comes to what was measured: dev/RELIABILITY.md.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from nanochat.recipe.shape import MUON_BATCH, GPTConfig, param_counts

MARGIN = 0.8  # share of the memory at hand that a plan may take


@dataclass(frozen=True)
class How:
    """What decides the memory of a run, beside its shape and its rows."""
    bytes_per_element: int     # of activations and tables: 2 or 4
    compiled: bool
    cuda: bool = False         # on a CUDA device, else on a CPU, whose fit Apple GPUs share for want of their own
    chunked_ce: bool = False
    recompute: bool = False    # --recompute-activations, which is done by the compiler
    momentum_bytes: int = 4    # of a number of the first moments


@dataclass(frozen=True)
class Fit:
    """Fitted to peaks: d3 to d12 on CPUs, d8 to d20 on CUDA (dev/LOG.md)."""
    logit: float          # bytes per logit under the plain loss
    per_layer: float      # elements of the width that a token leaves for the backward pass, for each layer
    once: float           # and beside them
    recomputed: float     # per_layer under --recompute-activations
    cast: float           # bytes per element of the blocks' matrices, for copies that are kept for the backward pass
    muon: float           # fp32 numbers per element of the largest update by Muon (a batch of matrices)
    adamw: float          # and by AdamW


FITS = {  # (on CUDA, compiled)
    (False, False): Fit(logit=40, per_layer=22, once=87, recomputed=22, cast=0, muon=28, adamw=18),
    (False, True): Fit(logit=7, per_layer=14, once=113, recomputed=6, cast=0, muon=20, adamw=10),
    (True, False): Fit(logit=17, per_layer=19, once=7, recomputed=19, cast=2, muon=28, adamw=18),
    (True, True): Fit(logit=2.2, per_layer=19, once=7, recomputed=11, cast=2, muon=20, adamw=10),
}
CHUNK = {False: 2**23, True: 2**28}  # bytes of a chunk's logits, nanochat/kernels/cross_entropy.py


@dataclass(frozen=True)
class Plan:
    """Bytes on one device."""
    weights: int
    gradients: int
    moments: int
    update: int       # temporaries of the optimizer
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + max(self.update, self.activations + self.logits)


def plan_memory(shape: GPTConfig, rows: int, how: How) -> Plan:
    """Memory of a step with micro-batches of `rows`."""
    counts, fit = param_counts(shape), FITS[how.cuda, how.compiled]
    tables, matrices = counts["wte"] + counts["value_embeds"], counts["block_matrices"]
    weights = tables * how.bytes_per_element + (counts["total"] - tables) * 4
    tokens, matrix = rows * shape.sequence_len, 4 * shape.n_embd**2  # the largest one, of an MLP
    at_once = min(shape.n_layer, max(1, MUON_BATCH // matrix)) * matrix
    activations = how.bytes_per_element * tokens * shape.n_embd * (
        shape.n_layer * (fit.recomputed if how.recompute else fit.per_layer) + fit.once)
    logits = fit.logit * tokens * shape.vocab_size
    if how.chunked_ce:  # a chunk, and the head's gradient in fp32, some three times
        logits = min(logits, CHUNK[how.cuda] + 12 * counts["lm_head"])
    return Plan(
        weights=weights, gradients=weights,
        moments=how.momentum_bytes * counts["total"] + 4 * (counts["total"] - matrices),  # AdamW keeps two, Muon one and a vector
        update=int(4 * max(fit.muon * at_once, fit.adamw * counts["lm_head"])),
        activations=int(activations + fit.cast * matrices),
        logits=int(logits))


def micro_batches(rows: int) -> list[int]:
    """The micro-batches that can take the place of one of `rows` with the same tokens per step, largest first."""
    return [n for n in range(rows, 0, -1) if rows % n == 0]


def largest_fit(shape: GPTConfig, candidates: list[int], available: int, how: How) -> int | None:
    """The first of the candidates (rows, largest first) whose plan leaves a margin in `available` bytes, or None."""
    return next((n for n in candidates if plan_memory(shape, n, how).total <= MARGIN * available), None)


def advice(shape: GPTConfig, rows: int, limit: int, how: How) -> str:
    """What to do after micro-batches of `rows` did not fit into `limit` bytes: flags that would, by estimate."""
    def needs(n, how):
        return gib(plan_memory(shape, n, how).total)
    have = f"--device-batch-size {rows} needs about {needs(rows, how)}, of {gib(limit)}"
    thrifty = replace(how, chunked_ce=True, recompute=how.compiled)
    flags = [flag for flag, off in {"--chunked-ce": not how.chunked_ce,
                                    "--recompute-activations": how.compiled and not how.recompute}.items() if off]
    expected = not largest_fit(shape, [rows], limit, how)  # else the memory went to something that no flag saves
    if flags and expected and largest_fit(shape, [rows], limit, thrifty):
        return f"{have}. Add {' '.join(flags)}: about {needs(rows, thrifty)}, at a little more time per step."
    for way, added in ((how, []), (thrifty, flags)):
        if fitting := largest_fit(shape, micro_batches(rows)[1:], limit, way):
            return (f"{have}. Take {' '.join([f'--device-batch-size {fitting}', *added])}: about {needs(fitting, way)}, and the "
                    "result stays the same, as more micro-batches are accumulated (--auto-batch chooses by itself).")
    least = " ".join(["--device-batch-size 1", *flags])
    return f"{have}, and even {least} about {needs(1, thrifty)}. Shorten --max-seq-len, or lower --depth or --vocab-size."


def gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"


def host_memory(available: bool) -> int:
    """Bytes of memory that this process may have: in all, or what is `available` to it now. The least of what the machine,
    the control group (a container) and `ulimit -v` grant."""
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
