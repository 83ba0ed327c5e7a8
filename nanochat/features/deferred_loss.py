"""Read a step's loss while the next step runs, so that the host never waits for the device between steps.

A GPU works through a queue that the host fills. Reading a number empties it: the device then idles while the host queues
the next kernels. Deferred, the loss and the norms of step k are read after step k + 1 has been queued. Nothing else
changes: the update of a step that is not finite is left out on the device itself (nanochat/optim.py). Before a checkpoint
or an evaluation everything is read. A schedule that decides each step by the last one's loss still reads it at once.
"""

from dataclasses import dataclass

from nanochat.cli.flags import flag
from nanochat.features.base import Feature


class DeferredLoss(Feature):
    name = "deferred_loss"
    defers = True

    @dataclass
    class Config:
        """Deferred loss"""
        deferred_loss_logging: bool = flag(False, "read the loss of a step while the next one runs", free=True)

    @classmethod
    def enabled(cls, config) -> bool:
        return config.features[cls.name].deferred_loss_logging
