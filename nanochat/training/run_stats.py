"""What a run's steps and evaluations have come to so far. No torch."""

import statistics

SMOOTHING = 0.9  # EMA factor of smooth_loss


class RunStats:
    """What result.json needs from the steps and evaluations so far; survives a resume."""

    def __init__(self, target_name: str | None = None, target_threshold: float | None = None):
        self.target_name, self.target_threshold = target_name, target_threshold
        self.ema = 0.0                # of the loss, not yet debiased
        self.smooth_loss = self.loss = self.val_bpb = self.min_val_bpb = self.time_to_target = None
        self.val_curve = []           # [step, train_time_sec, bpb]
        self.dts, self.peaks = [], []  # per step: seconds, MiB
        self.compiled = []           # places in dts of the steps in which something was compiled: their seconds say little
        self.partial = []             # places in dts of the steps that left some blocks out, or did not train them
        self.skipped_steps = []       # that were not finite
        self.rollbacks = []           # [step that was not finite, step of the checkpoint gone back to]
        self.before_target = None     # (train_time_sec, value) of the target metric when last seen above the threshold

    def add_step(self, step: int, loss: float, dt: float, peak_mib: float, train_time: float, compiled: bool = False,
                 partial: bool = False) -> None:
        self.loss = loss
        if partial:
            self.partial.append(len(self.dts))
        if compiled:
            self.compiled.append(len(self.dts))
        self.ema = SMOOTHING * self.ema + (1 - SMOOTHING) * loss
        self.dts.append(dt)
        self.smooth_loss = self.ema / (1 - SMOOTHING ** len(self.dts))
        self.peaks.append(peak_mib)
        self._watch_target("smooth_loss", self.smooth_loss, train_time)

    def add_evaluation(self, step: int, bpb: float, train_time: float) -> None:
        self.val_bpb = bpb
        self.min_val_bpb = bpb if self.min_val_bpb is None else min(bpb, self.min_val_bpb)
        if self.val_curve and self.val_curve[-1][0] == step:  # it was cut short after that, and is done again
            self.val_curve.pop()
        self.val_curve.append([step, train_time, bpb])
        self._watch_target("val_bpb", bpb, train_time)

    def _watch_target(self, name: str, value: float, train_time: float) -> None:
        """Note the training time of the first crossing, interpolated between the values on either side of it."""
        if name != self.target_name or self.time_to_target is not None:
            return
        if value > self.target_threshold:
            self.before_target = (train_time, value)
        elif self.before_target is None:
            self.time_to_target = train_time
        else:
            earlier, above = self.before_target
            self.time_to_target = earlier + (train_time - earlier) * (above - self.target_threshold) / (above - value)

    def summary(self, tokens_per_step: int, flops_per_token: int, peak_flops: float | None) -> dict:
        """The fields of result.json that follow from the steps. MFU only where the hardware's peak is known.

        Rates and times are those of the steps in which nothing was compiled; for MFU, of those that ran and trained all blocks.
        """
        dts = [dt for i, dt in enumerate(self.dts) if i not in self.compiled]
        median = statistics.median(dts) if dts else None
        throughput = tokens_per_step / median if median else None
        left_out = {*self.compiled, *self.partial}
        whole = [dt for i, dt in enumerate(self.dts) if i not in left_out]
        return {
            "tok_per_sec_max": tokens_per_step / min(dts) if dts else None,
            "tok_per_sec_avg": tokens_per_step * len(dts) / sum(dts) if dts else None,
            "tok_per_sec_median": throughput,
            "dt_median_ms": median * 1000 if median else None,
            "mfu": tokens_per_step * flops_per_token / statistics.median(whole) / peak_flops if whole and peak_flops else None,
            "final_loss": self.loss, "final_train_loss": self.smooth_loss,
            "val_bpb": self.val_bpb, "min_val_bpb": self.min_val_bpb, "val_curve": self.val_curve,
            "target_metric_name": self.target_name, "target_metric_threshold": self.target_threshold,
            "time_to_target_sec_measured": self.time_to_target,
            "peak_mem_mib": max(self.peaks, default=None),
            "avg_step_peak_mem_mib": statistics.fmean(self.peaks) if self.peaks else None,
            "skipped_steps": len(self.skipped_steps), "rollbacks": len(self.rollbacks),
        }

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
