"""How every script begins and ends: tolerant streams, a launch environment that makes sense, one line for an error. No torch."""

import sys

from nanochat.cli.launch_environment import check_launch_environment
from nanochat.cli.output import tolerant_streams
from nanochat.common import RankError, UserError, is_main_rank


def cli(main, *, parallel: bool = False, for_its_output: bool = False) -> None:
    """Run a script's `main()` and exit with its status; a UserError is one message and status 2, Ctrl-C status 130.

    parallel: torchrun may start several of it, which meet the same errors: rank 0 prints them.
    for_its_output: what it prints is all that it does, so it stops when nobody reads that any more (`| head`).
    """
    tolerant_streams(go_on=not for_its_output)
    try:
        check_launch_environment(parallel)
    except UserError as e:
        fail(e)
    try:
        status = main()
    except UserError as e:
        fail(e, quietly=not is_main_rank() and not isinstance(e, RankError))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = 130
    except BrokenPipeError:
        status = 0
    sys.exit(status)


def fail(error: UserError, quietly: bool = False) -> None:
    """End the program with an error that the user can mend."""
    if not quietly:
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
