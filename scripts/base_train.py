"""Train a GPT. `python -m scripts.base_train --help` lists the flags; with torchrun it uses several devices.

    python -m scripts.base_train --depth=4 --head-dim=64 --max-seq-len=512 --device-batch-size=8 --total-batch-size=4096 \\
        --num-iterations=300 --eval-every=100 --core-metric-every=-1

Text, tokenizer and tokens are prepared if they are not there yet. The run leaves its records and its checkpoint in
$NANOCHAT_BASE_DIR/base_checkpoints/<model-tag>/.
"""

from nanochat.cli.launch_environment import restarts
from nanochat.cli.output import stop_when_unread
from nanochat.cli.paths import runs_dir
from nanochat.cli.program import cli
from nanochat.common import UserError, is_main_rank
from nanochat.features import FEATURES
from nanochat.runtime.lock import RunLock
from nanochat.training.config import parse_config
from nanochat.training.run_folder import start_problem


def main() -> int:
    config = parse_config(FEATURES, prog="python -m scripts.base_train")
    if config.run.explain:
        from nanochat.training.explain import explain_flags
        stop_when_unread()
        print(explain_flags(config))
        return 0
    run_dir = runs_dir() / config.model_tag
    if config.run.resume_from_step == "-1" and not restarts() and (problem := start_problem(run_dir, config.run.overwrite)):
        if is_main_rank():
            RunLock(run_dir).release()  # one that is training now is named
        raise UserError(f"{problem}.")
    from nanochat.runtime.distributed import leave_process_group  # loads torch: only once the flags are right
    from nanochat.training.loop import build_and_fit
    status = build_and_fit(config)
    leave_process_group()
    return status


if __name__ == "__main__":
    cli(main, parallel=True)
