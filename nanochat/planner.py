"""What memory a training step needs, estimated by arithmetic alone, and the flags that would fit. No torch.

Weights, gradients and moments follow from the shape. The rest is fitted to measured peaks: what a token leaves for the
backward pass, the logits with all that the plain loss makes of them, and the temporaries of the largest update, which come
when the others are gone. It is the estimate of a plain run: chunked cross-entropy needs far fewer logits, frozen blocks
fewer activations. On CPUs it was within a factor of 1.5 of the measured peak (dev/RELIABILITY.md); for GPUs it has not been
compared with anything.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from nanochat.shape import MUON_BATCH, GPTConfig, param_counts

# Fitted on CPUs, d3 to d12: bytes per logit; elements of the width per token, for each layer and once; fp32 numbers per
# element of the largest update by Muon (a batch of matrices) and by AdamW.
EAGER = dict(logit=40, per_layer=22, once=87, muon=28, adamw=18)
COMPILED = dict(logit=7, per_layer=14, once=113, muon=20, adamw=10)
MARGIN = 0.8  # share of the memory at hand that a plan may take


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


def plan_memory(shape: GPTConfig, rows: int, bytes_per_element: int, compiled: bool) -> Plan:
    """Memory of a step with micro-batches of `rows`, activations and tables in elements of 2 or 4 bytes."""
    counts, fit = param_counts(shape), COMPILED if compiled else EAGER
    tables, matrices = counts["wte"] + counts["value_embeds"], counts["block_matrices"]
    weights = tables * bytes_per_element + (counts["total"] - tables) * 4
    tokens, matrix = rows * shape.sequence_len, 4 * shape.n_embd**2  # the largest one, of an MLP
    at_once = min(shape.n_layer, max(1, MUON_BATCH // matrix)) * matrix
    return Plan(
        weights=weights, gradients=weights,
        moments=8 * (counts["total"] - matrices) + 4 * matrices,  # AdamW keeps two, Muon one and a vector
        update=4 * max(fit["muon"] * at_once, fit["adamw"] * counts["lm_head"]),
        activations=tokens * shape.n_embd * bytes_per_element * (shape.n_layer * fit["per_layer"] + fit["once"]),
        logits=tokens * shape.vocab_size * fit["logit"])


def micro_batches(rows: int) -> list[int]:
    """The micro-batches that can take the place of one of `rows` with the same tokens per step, largest first."""
    return [n for n in range(rows, 0, -1) if rows % n == 0]


def largest_fit(shape: GPTConfig, candidates: list[int], available: int, bytes_per_element: int, compiled: bool) -> int | None:
    """The first of the candidates (rows, largest first) whose plan leaves a margin in `available` bytes, or None."""
    return next((n for n in candidates
                 if plan_memory(shape, n, bytes_per_element, compiled).total <= MARGIN * available), None)


def advice(shape: GPTConfig, rows: int, limit: int, bytes_per_element: int, compiled: bool) -> str:
    """What to do after micro-batches of `rows` did not fit into `limit` bytes: flags that would, by estimate."""
    def needs(shape, n):
        return f"{plan_memory(shape, n, bytes_per_element, compiled).total / 2**30:.2g} GiB"
    fitting = largest_fit(shape, micro_batches(rows)[1:], limit, bytes_per_element, compiled)
    have = f"--device-batch-size {rows} needs about {needs(shape, rows)}, of {limit / 2**30:.2g} GiB"
    if fitting:
        return (f"{have}. Take --device-batch-size {fitting}: about {needs(shape, fitting)}, and the result stays the same, as "
                "more micro-batches are accumulated (--auto-batch chooses by itself).")
    return (f"{have}" + (f", and even --device-batch-size 1 about {needs(shape, 1)}" if rows > 1 else "")
            + ". Shorten --max-seq-len, or lower --depth or --vocab-size.")


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
