"""The process that evaluates runs for the lab: `python -m nanochat.lab.evaluation_process --data=... < folders.json`

Standard input is a JSON list of run folders. Each is answered at once by a line of JSON on standard output, an answer of
nanochat/training/checkpoint_evaluation.py. Everything else that is printed goes to standard error. Exit status 2, and no line,
where the text or the device cannot be used.
"""

import json
import os
import sys
from dataclasses import dataclass

from nanochat.cli.flags import flag, parse
from nanochat.cli.program import cli
from nanochat.data.sources import SourceFlags


@dataclass
class EvaluationFlags(SourceFlags):
    """The text and the device"""
    val_data: str | None = flag(None, "a source of validation text; by default a part of --data is held out", metavar="SOURCE")
    device_type: str = flag("", "cuda, mps or cpu; empty takes the best available", choices=("", "cuda", "mps", "cpu"))


def main() -> None:
    results = os.fdopen(os.dup(1), "w")  # what libraries print must not come between the answers
    os.dup2(2, 1)
    flags, = parse([EvaluationFlags], prog="python -m nanochat.lab.evaluation_process", description="Evaluate runs.")
    run_dirs = json.load(sys.stdin)
    from nanochat.dataset import TokenDataset, prepare_tokens
    from nanochat.runtime.device import init_device  # loads torch, for which `cli` has set the environment
    from nanochat.tokenizer import get_tokenizer
    from nanochat.training.checkpoint_evaluation import Validation, answers
    device, _ = init_device(flags.device_type)
    tokenizer = get_tokenizer()
    tokens = TokenDataset.open(prepare_tokens(flags.data, tokenizer, val_source=flags.val_data, **flags.reading()))
    for answer in answers(run_dirs, Validation(tokens, tokenizer, device), tokenizer):
        print(json.dumps(answer), file=results, flush=True)


if __name__ == "__main__":
    cli(main)
