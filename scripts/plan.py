"""What would a run need and take here? `python -m scripts.plan` with any flags of scripts.base_train trains nothing.

    python -m scripts.plan @configs/cpu-d4.flags --chunked-ce
    python -m scripts.plan @configs/cpu-d4.flags --gains                            # which optimization flags pay here?
    python -m scripts.plan @configs/cpu-d4.flags --watts=65 --price-per-kwh=0.30 --json

It prints what `base_train --explain` does (parameters, memory by component, disk, steps, schedules), and then takes steps for
about ten seconds, on random tokens, to say how long the run takes. The text is not read. The measured rate is kept in
$NANOCHAT_BASE_DIR/plan/, so that the same steps are measured once; a run of the same flags writes the estimate into its
result.json, beside what then happened.
"""

import sys

from nanochat.cli.program import cli


def main() -> None:
    from nanochat.training.plan import show_plan
    show_plan(sys.argv[1:], prog="python -m scripts.plan")


if __name__ == "__main__":
    cli(main, for_its_output=True)
