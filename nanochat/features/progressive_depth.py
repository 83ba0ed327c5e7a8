"""Progressive depth: the run begins with the lowest few blocks; the others join them for the last part of the steps.

At the start the output projections of every block are zero, so a block adds nothing to the residual stream until it has been
updated. The first steps therefore run and train the lowest blocks only (`active_end` in `GPT.forward`), at a fraction of the
cost, and the step at which the others join changes no loss: there is no jump, and nothing to copy or to initialize. From then on
the run is an ordinary one. Weights, checkpoints and evaluations are those of the whole model all the time.

Depth that grows at once, from one or two blocks, and late: Bu, arXiv 2511.04981. In stages, with copied blocks: Gong et al., ICML
2019 (progressive stacking); Du et al., arXiv 2405.15319. What was measured here: docs/recipe.md.
"""

from dataclasses import dataclass

from nanochat.cli.flags import at_least, flag
from nanochat.common import UserError
from nanochat.features.base import Feature
from nanochat.recipe.depth_growth import cost_between, grows, growth_step, shallow_share


class ProgressiveDepth(Feature):
    name = "progressive_depth"
    dynamic_forward_args = True

    @dataclass
    class Config:
        """Progressive depth"""
        initial_depth: int = flag(0, "blocks that the run begins with, the lowest ones; the others join later; 0, or --depth and "
                                  "more, begins with all", low=0)
        depth_growth_frac: float = flag(0.8, "share of the steps after which the other blocks join", low=0, high=1,
                                        requires={"initial_depth": at_least(1)})

    @classmethod
    def enabled(cls, config) -> bool:
        return grows(config.features[cls.name], config.model.depth)

    @classmethod
    def validate(cls, config) -> list[str]:
        flags, suffix, problems = config.features[cls.name], config.features.get("suffix"), []
        if not cls.enabled(config):
            return []
        if not 0 < flags.depth_growth_frac < 1:
            problems.append(f"--depth-growth-frac must be above 0 and below 1, got {flags.depth_growth_frac:g}")
        if suffix and suffix.block_update_schedule == "static_suffix":
            problems.append("--initial-depth: the lowest blocks are those that --block-update-schedule static_suffix never "
                            "trains: leave one of them out")
        if suffix and suffix.block_update_schedule == "dynamic_suffix" and freezes_before_growth(flags, suffix, config):
            problems.append("--initial-depth: blocks may be frozen only once all are there: let dynamic suffix training begin to "
                            "freeze later (--dyn-freeze-start-frac), or lower --depth-growth-frac")
        return problems

    def on_model(self, model, horizon) -> None:
        self.n_layer, self.grown_at = model.config.n_layer, growth_step(self.config, horizon.num_iterations)
        self.share = shallow_share(self.config, model.config)
        self.seconds = {True: [0, 0.0], False: [0, 0.0]}  # whether all blocks were there -> number and seconds of steps

    def before_step(self, step: int) -> dict:
        self.whole = step >= self.grown_at
        return {} if self.whole else {"active_end": self.config.initial_depth}

    def cost_between(self, start: int, end: int) -> float:
        return cost_between(start, end, self.grown_at, self.measured_share() or self.share)

    def step_columns(self) -> dict:
        return {} if self.whole else {"step_kind": "shallow", "active_layers": self.config.initial_depth}

    def after_step(self, step: int, loss: float, time) -> None:
        count = self.seconds[step >= self.grown_at]
        count[0], count[1] = count[0] + 1, count[1] + time.total

    def summary(self) -> dict:
        """`shallow_step_share`: mean time of a step of the initial depth over that of a later one; None without either."""
        return {"initial_depth": self.config.initial_depth, "depth_grown_at": self.grown_at,
                "shallow_step_share": self.measured_share()}

    def report(self) -> str | None:
        share = self.measured_share()
        return share and (f"progressive depth: {self.seconds[False][0]:,} steps with {self.config.initial_depth} of "
                          f"{self.n_layer} blocks, each {share:.2f} of the time of a later one")

    def measured_share(self) -> float | None:
        (whole, whole_seconds), (shallow, shallow_seconds) = self.seconds[True], self.seconds[False]
        return shallow_seconds / shallow / (whole_seconds / whole) if whole and shallow else None

    def state_dict(self) -> dict:
        return {"shallow": self.seconds[False], "whole": self.seconds[True], "grown_at": self.grown_at}

    def load_state_dict(self, state: dict) -> None:
        self.seconds = {False: state["shallow"], True: state["whole"]}
        if self.seconds[True][0]:  # once trained, a block is never left out again, also where the run is made longer
            self.grown_at = state["grown_at"]

    def switched_on_late(self) -> None:
        raise UserError("--initial-depth: all blocks of this checkpoint have been trained, so none can be left out any more: "
                        "resume with --initial-depth=0")


def freezes_before_growth(flags, suffix, config) -> bool:
    """Whether dynamic suffix training may freeze blocks before all of them are there, as far as is known before the model is."""
    steps, start = config.horizon.num_iterations, suffix.dyn_freeze_start_step
    if start == -1:
        return suffix.dyn_freeze_start_frac < flags.depth_growth_frac
    return steps > 0 and start < growth_step(flags, steps)
