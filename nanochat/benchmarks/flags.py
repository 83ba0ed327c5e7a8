"""Flags that benches and attempts share. No torch: wrong flags are reported before it is loaded."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nanochat.cli.flags import LARGEST_SEED, flag
from nanochat.cli.paths import output_problem

if TYPE_CHECKING:
    import torch


@dataclass
class OutputFlags:
    """The output"""
    json_out: str | None = flag(None, "write the result here; a missing folder is made", metavar="PATH")

    def validate(self) -> list[str]:
        trouble = self.json_out and output_problem(self.json_out, make_folders=True)
        return [f"--json-out {trouble}"] if trouble else []


@dataclass
class AttemptFlags(OutputFlags):
    """The attempt"""
    preset: str = flag("default", "values of the flags that are not given: seconds to a minute on a small CPU, or for a GPU",
                       choices=("smoke", "default", "gpu"))
    device: str = flag("auto", "auto takes the best there is", choices=("auto", "cuda", "mps", "cpu"),
                       aliases=("--device-type",))
    dtype: str = flag("auto", "compute dtype; auto is bf16 where the hardware has instructions for it",
                      choices=("auto", "bfloat16", "float32"))
    seed: int = flag(42, "seed of everything random", low=0, high=LARGEST_SEED)
    plot: bool = flag(True, "draw the result beside --json-out, if matplotlib is installed")

    presets = {}  # of a subclass: preset -> {field: value}

    def filled(self) -> "AttemptFlags":
        """A copy with the preset's value for each flag that was not given."""
        chosen = self.presets[self.preset].items()
        return replace(self, **{name: value for name, value in chosen if getattr(self, name) in (None, [])})

    def open_device(self) -> "tuple[torch.device, torch.dtype]":
        from nanochat.runtime.compute_dtype import pick_compute_dtype
        from nanochat.runtime.device import init_device
        device, _ = init_device("" if self.device == "auto" else self.device)
        return device, pick_compute_dtype(device, self.dtype)[0]
