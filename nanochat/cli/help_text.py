"""How `--help` looks: groups of flags, as far as the width permits one line a flag, with its default. No torch."""

import argparse
import os
import shutil
import sys

WIDEST_FLAG = 40    # columns that a flag and its value may take; what a longer one means begins below it
NARROW = 110        # columns below which they take fewer
UNLIMITED = 10_000  # columns of what is no terminal: `--help | grep rate` finds whole lines


def width() -> int:
    """Columns of the help."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return max(40, shutil.get_terminal_size().columns - 2)
    return UNLIMITED


class HelpFormatter(argparse.HelpFormatter):
    """Without the list of all flags before the flags, and with defaults in words."""

    def __init__(self, prog: str):
        columns = width()
        widest = 2 * WIDEST_FLAG if columns == UNLIMITED else WIDEST_FLAG if columns >= NARROW else WIDEST_FLAG // 2
        super().__init__(prog, max_help_position=widest + 4, width=columns)

    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage or "%(prog)s [flags]", actions, groups, prefix)

    def _format_action_invocation(self, action):
        """`-p, --prompt TEXT` instead of `--prompt TEXT, -p TEXT`."""
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action)
        names = sorted(action.option_strings, key=lambda name: name.startswith("--"))
        return f"{', '.join(names)} {self._format_args(action, action.metavar)}"

    def _format_args(self, action, default_metavar):
        return f"{action.metavar} ..." if action.nargs == "+" else super()._format_args(action, default_metavar)


def values_text(flag: str, choices) -> tuple[str | None, str]:
    """What stands for the value of a flag of these choices, None for one without any, and what its text says besides."""
    if not choices:
        return None, ""
    named = [str(choice) for choice in choices if choice != ""]
    short = "{" + ",".join(named) + "}"
    if len(f"{flag} {short}") <= WIDEST_FLAG:
        return short, ""
    return "NAME", f"; one of {', '.join(named)}"


def default_text(default, help: str) -> str:
    """What a flag's text says of its default. Where there is none, the text itself says what happens."""
    if isinstance(default, bool):
        return f" (default: {'on' if default else 'off'})"
    if default is None or default in ("", []):
        return "" if "default" in help or "empty" in help else " (default: none)"
    return f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
