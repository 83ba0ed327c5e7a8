"""How every script begins and ends: tolerant streams, a launch environment that makes sense, one line for an error. No torch."""

import os
import signal
import sys
import time
from collections.abc import Iterable

from nanochat.cli.launch_environment import USER_ERROR, PeerLost, check_launch_environment
from nanochat.cli.output import tolerant_streams
from nanochat.common import RankError, UserError, is_main_rank

SECONDS_FOR_RANK_0 = 30.0  # to reach the error that another rank has met, and to print it
# How often a thread of OpenMP (libgomp, which torch's Linux builds use) looks for work before it sleeps: some 0.1 ms, a little
# more than the gap between two kernels. libgomp's own 300 000 times keep a core busy on which another program, or the thread that
# is waited for, could run. Beside one busy process on two cores a step took 2.9 times as long, and takes 2.0; alone 1 % longer
# (dev/LOG.md).
SPINS = "2000"


def cli(main, *, parallel: bool = False, for_its_output: bool = False) -> None:
    """Run a script's `main()` and exit with its status; a UserError is one message and status 2, Ctrl-C status 130.

    parallel: torchrun may start several of it, which meet the same errors: rank 0 prints them, the others wait until it has.
    for_its_output: what it prints is all that it does, so it stops when nobody reads that any more (`| head`).
    """
    tolerant_streams(go_on=not for_its_output)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded, which no program does before its main()
    try:
        check_launch_environment(parallel)
    except UserError as e:
        fail(e)
    try:
        status = main()
    except UserError as e:
        if not is_main_rank() and not isinstance(e, RankError):
            wait_to_be_ended()
        fail(e)
    except KeyboardInterrupt:
        if is_main_rank():
            print("interrupted", file=sys.stderr, flush=True)
        status = 130
    except BrokenPipeError:
        status = 0
    sys.exit(status)


def subcommand(argv: list[str] | None, commands: Iterable[str], help: str) -> tuple[str, list[str]] | None:
    """The command that a program is given, and the words behind it. None where it is asked for help, which is printed.

    argv: by default what was typed. Raises: UserError for a word that is no command.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(help)
        return None
    if argv[0] not in commands:
        raise UserError(f"{argv[0]} is not a command: choose one of {', '.join(commands)}; --help explains them")
    return argv[0], argv[1:]


def wait_to_be_ended() -> None:
    """Let rank 0 print the error that all ranks meet. torchrun ends every rank as soon as one has failed: were this one the
    first, rank 0 would be ended before it could print. Returns where rank 0 has not failed: the error is this rank's own."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    time.sleep(SECONDS_FOR_RANK_0)


def fail(error: UserError) -> None:
    """End the program with an error that the user can mend; without a word where another process says it."""
    if str(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.status if isinstance(error, PeerLost) else USER_ERROR)
