"""What happens after a step whose loss or gradients are not finite (--on-divergence)."""

import math
import os
from typing import Literal

import torch

from nanochat.common import Diverged
from nanochat.training.run_stats import RunStats
from nanochat.training.step import StepResult

MAX_SKIPS = 10     # in a row, under --on-divergence skip
MAX_ROLLBACKS = 3  # in all, under --on-divergence rollback
MAY_BE_CUDNN = {"cudnn", "sdpa", "blocks", "masked"}  # kinds of attention; in all but the first torch chooses the kernel
CUDNN_LAST = "TORCH_CUDNN_SDPA_DEPRIORITIZED"  # torch's: 1 takes cuDNN only where no other fused kernel works


def divergence(result: StepResult, overflow_is_normal: bool) -> str | None:
    """What is not finite in a step's result, in words; None where all that counts is finite.

    overflow_is_normal: under fp16 the gradients of a step may overflow; the scaler has left out its update.
    """
    if math.isfinite(result.loss) and (not result.not_finite or overflow_is_normal):
        return None
    example = f", among them {result.not_finite[-1]}" if result.not_finite else ""
    return (f"step {result.step} was not taken: its loss is {result.loss:.4g}, and the gradients of {len(result.not_finite)} of "
            f"{result.trained} parameters are not finite{example}")


def divergence_advice(device: torch.device, attention: dict[str, dict]) -> str:
    """What to try after a run on this device has ended so. attention: the kernel chosen for each window, from RunPlan."""
    advice = ("Lower the learning rates (--lr-multiplier 0.5), train in fp32, or leave such steps out (--on-divergence skip); "
              "under --fp8 runs/fpi_debug.sh names the module where it begins")
    names = {choice["name"] for choice in attention.values()}
    if device.type == "cuda" and names & MAY_BE_CUDNN and torch.backends.cuda.cudnn_sdp_enabled() \
            and os.environ.get(CUDNN_LAST) != "1":
        advice += (f". The attention may be cuDNN's, of which others report NaN gradients: try the environment variable "
                   f"{CUDNN_LAST}=1 with --attention-backend sdpa")
    return advice


class DivergencePolicy:
    """Decides how a run goes on after such a step. The step itself never changes the weights.

    action: "stop" ends the run. "skip" leaves the step's batch out. "rollback" returns to the last checkpoint and leaves out all
    batches up to this step: the same ones would end in the same place, and the trouble began before it showed (PaLM, arXiv
    2204.02311, section 5.1).
    """

    def __init__(self, action: Literal["stop", "skip", "rollback"]):
        self.action = action

    def decide(self, result: StepResult, trouble: str, stats: RunStats, saved_step: int) -> Literal["skip", "rollback"]:
        """What to do after the step of `result`, whose `trouble` is `divergence(...)`; a skipped step is counted in `stats`.

        saved_step: the step of the last checkpoint, 0 where there is none. Raises: Diverged, where the run has to end.
        """
        if self.action == "skip":
            stats.skipped_steps.append(result.step)
            if stats.skipped_steps[-MAX_SKIPS:] == list(range(result.step - MAX_SKIPS + 1, result.step + 1)):
                raise Diverged(f"{trouble}; so were the {MAX_SKIPS - 1} before it, and skipping does not help")
            return "skip"
        if self.action == "rollback":
            if len(stats.rollbacks) == MAX_ROLLBACKS:
                raise Diverged(f"{trouble}; {MAX_ROLLBACKS} rollbacks have not helped")
            if saved_step == 0:
                raise Diverged(f"{trouble}; there is no checkpoint to go back to yet")
            return "rollback"
        raise Diverged(trouble)
