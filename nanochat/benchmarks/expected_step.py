"""What the parts of a d12 step should take on two GPUs, and how far a measured step is from it. No torch.

The expected times are arithmetic, not measurements: the FLOPs of the products at the rates that such products usually reach, the
bytes of everything else at the memory's bandwidth. Where a measured part takes 1.5 times as long, it is the first to look at.
"""

import math
from dataclasses import dataclass

from nanochat.recipe.shape import shape_of_depth

SLOW = 1.5  # times the expected, from which a part is marked
SHAPE = shape_of_depth(12, window_pattern="L")  # of the table: full context, T=2048, vocabulary 32 768


@dataclass(frozen=True)
class ExpectedStep:
    """Milliseconds of a micro-batch by the categories of a profile (nanochat/benchmarks/profiler.py)."""
    card: str
    peak: float             # dense bf16 FLOP/s of the datasheet
    rows: int               # of a micro-batch
    ms: dict[str, float]


EXPECTED = (  # gemms: blocks and head. norms_elementwise: norms, rotary, relu^2, residuals; casts and adding up gradients
    ExpectedStep("H100", 989e12, 16, {
        "gemms": 29 + 7.6, "attention": 10.5, "norms_elementwise": 15 + 1, "loss": 3, "embedding": 3}),
    ExpectedStep("RTX 4090", 165.2e12, 8, {
        "gemms": 56 + 16, "attention": 17, "norms_elementwise": 23 + 3, "loss": 5, "embedding": 5.5}),
)


def nearest(flops_per_sec: float) -> ExpectedStep:
    """The row of the card whose matrix rate is nearest, as a factor."""
    return min(EXPECTED, key=lambda expected: abs(math.log(flops_per_sec / expected.peak)))


def compare(expected: ExpectedStep, breakdown_ms: dict[str, float], micro_batches: int, rows: int) -> list[dict]:
    """A row per part: expected and measured milliseconds of a micro-batch, their ratio, and a mark where it is SLOW or more.

    breakdown_ms: of a whole step, by category.   rows: of its micro-batches; the expected times are proportional to them.
    """
    wanted = {part: ms * rows / expected.rows for part, ms in expected.ms.items()}
    table = [_row(part, wanted.get(part), ms / micro_batches) for part, ms in breakdown_ms.items()]
    measured = sum(breakdown_ms[part] for part in wanted) / micro_batches
    return [*table, _row("sum of the parts above that are expected", sum(wanted.values()), measured)]


def _row(part: str, expected: float | None, measured: float) -> dict:
    ratio = expected and measured / expected
    return {"part": part, "expected ms": expected and round(expected, 1), "measured ms": round(measured, 2),
            "ratio": ratio and round(ratio, 2), "": f"x{SLOW}" if ratio and ratio >= SLOW else ""}
