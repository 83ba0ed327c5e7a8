"""Shared by the scripts of this container: flags, the quality of a variant, and speed against the layer or model it replaces."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

from nanochat.benchmarks.flags import AttemptFlags
from nanochat.cli.flags import flag
from nanochat.runtime import timing


@dataclass
class Flags(AttemptFlags):
    """The attempt; the preset gives the sizes that are not given"""
    batches: int | None = flag(None, "batches of training text on which activations are recorded", low=1)
    val_tokens: int | None = flag(None, "tokens of validation text on which quality is measured", low=1)


@dataclass
class RankFlags(Flags):
    """The attempt; the preset gives the sizes that are not given"""
    shares: list[float] = flag([], "ranks, as shares of the smaller side of each matrix; by default the preset's")

    def validate(self) -> list[str]:
        return super().validate() + share_problems("--shares", self.shares)


def share_problems(name: str, shares: list[float]) -> list[str]:
    return [f"{name} must be above 0 and at most 1, got {share}" for share in shares if not 0 < share <= 1]


def rank_of(share: float, shape: tuple[int, int]) -> int:
    return max(1, round(share * min(shape)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Quality:
    """Validation bits per byte of a model's variants, and of the model as it was trained (`dense`)."""

    def __init__(self, trained, tokens: int):
        self.trained, self.batches = trained, trained.val_batches(tokens)
        self.dense = trained.bpb(self.batches)

    def rise_pct(self, bpb: float) -> float:
        return 100 * (bpb / self.dense - 1)

    def of(self, variant) -> dict[str, float]:
        bpb = self.trained.bpb(self.batches, variant)
        return {"bpb": bpb, "bpb_rise_pct": self.rise_pct(bpb)}


def time_layers(layers: dict[str, tuple[Callable, list]], x, device, repeats: int, training: bool = True) -> dict[str, dict]:
    """Time each layer, {name: (function of x, its parameters)}, interleaved; the others replace the first.

    x: (N, in). Returns {name: {"forward_ms", "training_ms", "speedup_forward", "speedup_training"}}, all with n and
    quartiles; training is the forward pass and the gradients of x and of the parameters. Parameters are in the dtype of x: the
    cast of the fp32 weights, which costs the dense layer most, is not included.
    """
    import torch
    x, calls = x.detach().clone().requires_grad_(), {}
    kinds = ("forward", "training") if training else ("forward",)

    def add(name, function, parameters):
        parameters = [p.detach().to(x.dtype).to(device).requires_grad_() for p in parameters]  # some devices have no float64
        with torch.no_grad():
            y = function(x, *parameters)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device, y.dtype)

        def forward():
            with torch.no_grad():
                function(x, *parameters)

        def both():
            torch.autograd.grad(function(x, *parameters), [x, *parameters], dy)
        calls.update({(name, kind): call for kind, call in zip(kinds, (forward, both), strict=False)})  # `kinds` may have one

    for name, (function, parameters) in layers.items():
        add(name, function, parameters)
    times, first = timing.time_in_turn(calls, device, repeats, at_least=timing.SHORT, label="timing layers"), next(iter(layers))
    rows = {name: {} for name in layers}
    for name, kind in times:
        rows[name] |= against(times[name, kind], times[first, kind], kind)
    return rows


def time_models(models: dict[str, Callable], batch, device, repeats: int) -> dict[str, dict]:
    """Time forward and backward of whole models on a batch (x, y), interleaved; the others replace the first.

    Returns {name: {"training_ms", "speedup_training"}}.
    """
    def call(model):
        def run():
            model(*batch).backward()
            model.zero_grad(set_to_none=True)
        return run
    times = timing.time_in_turn({name: call(model) for name, model in models.items()}, device, repeats, label="timing models")
    first = next(iter(times.values()))
    return {name: against(seconds, first, "training") for name, seconds in times.items()}


def against(seconds: list[float], dense: list[float], kind: str) -> dict[str, dict]:
    return {f"{kind}_ms": timing.spread([1000 * s for s in seconds]), f"speedup_{kind}": timing.speedup(seconds, dense)}
