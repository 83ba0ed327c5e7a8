"""How an attempt on a trained model begins and ends."""

import time
from collections.abc import Callable
from dataclasses import asdict

from nanochat.benchmarks.flags import AttemptFlags
from nanochat.benchmarks.result_file import make_result, save
from nanochat.benchmarks.trained_model import ModelFlags, TrainedModel
from nanochat.cli.flags import parse


class Attempt:
    """A script's flags, device, dtype and start time. All flags are checked before anything else is done.

    script: its path in the checkout; flags_class: its flags; description: first line of --help; validate: as in `parse`.
    """

    def __init__(self, script: str, flags_class: type[AttemptFlags], argv: list[str] | None, description: str, validate=None):
        self.script, self.argv, self.about = script, argv, None
        flags, self.model_flags = parse([flags_class, ModelFlags], argv, prog=f"python {script}",
                                        description=description.splitlines()[0], validate=validate)
        self.flags, self.started = flags.filled(), time.monotonic()
        self.device, self.dtype = self.flags.open_device()

    def open_model(self) -> TrainedModel:
        """Load the trained model that the flags name; the small one is trained first."""
        trained = self.model_flags.open(self.flags.preset, self.device, self.dtype)
        self.about = trained.about
        return trained

    def save(self, results: dict, draw: Callable, traces: dict | None = None, **facts) -> None:
        """Write the result where --json-out says; `facts` are added to its config."""
        from nanochat.runtime.compute_dtype import dtype_name
        config = asdict(self.model_flags) | asdict(self.flags) | {
            "model": self.about, "compute_dtype": dtype_name(self.dtype)} | facts
        content = make_result(self.script, self.device, config, results, time.monotonic() - self.started, traces, self.argv)
        save(self.flags.json_out, content, draw if self.flags.plot else None)
