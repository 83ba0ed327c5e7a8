"""Dataclasses as command lines: one field is one flag, one dataclass is one heading of `--help`. No torch.

    @dataclass
    class Sampling:
        "Sampling"                                      # the heading
        top_k: int = flag(50, "keep the k likeliest tokens", low=1)   # --top-k

    sampling, = parse([Sampling], argv, prog="python -m scripts.sample")

Everything wrong with a command line is collected and reported in one message with exit status 2, before anything
heavy is imported: unknown flags with the nearest known one, values of the wrong type, out of range or not among the
choices, and whatever the dataclasses' own `validate()` methods (-> list of problems) find.

A word behind a flag that takes a value is its value, also one that begins with a dash, unless it is a flag of the same
command line itself: `--prompt --- --seed 1`.
"""

import argparse
import difflib
import math
import sys
import types
import typing
from dataclasses import MISSING, field, fields

from nanochat.common import UserError

LARGEST = 10**15          # of an int without a bound of its own: steps, characters and bytes stay below, and products of
                          # two that size a tensor are refused by torch in words instead of overflowing
LARGEST_SEED = 2**32 - 1  # what torch's CPU generator and numpy's take of a seed: 2^32 + 1 would draw as 1 does
TAKEN = "\0"              # before a word that begins with a dash and is a value: no command line can contain it


def flag(default, help: str, *, choices=None, low=None, high=None, metavar=None, aliases=(), free=False):
    """A dataclass field that is also a flag. `low` and `high` are inclusive bounds; a list default takes several values.
    An int without bounds is from -1, which turns things off or leaves them to be derived, to LARGEST.

    free: a resumed run may have another value, as this decides nothing that is computed, but for rounding.
    """
    meta = dict(help=help, choices=choices, low=low, high=high, metavar=metavar, aliases=aliases, free=free)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def default_of(f):
    """The default of a dataclass field."""
    return f.default_factory() if f.default is MISSING else f.default


class _Parser(argparse.ArgumentParser):
    """argparse that collects its complaints instead of exiting at the first one."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        """Where argparse would ask whether a word looks like a flag, what counts is whether it is one."""
        words = self._with_values_marked(sys.argv[1:] if args is None else args)
        namespace, unknown = super().parse_known_args(words, namespace)
        for name, value in vars(namespace).items():
            setattr(namespace, name, list(map(_unmarked, value)) if isinstance(value, list) else _unmarked(value))
        return namespace, list(map(_unmarked, unknown))

    def _with_values_marked(self, argv) -> list[str]:
        flags = self._option_string_actions
        words, takes_value = [], False
        for word in argv:
            is_value = takes_value and word.startswith("-") and word.split("=")[0] not in flags
            takes_value = not is_value and word in flags and flags[word].nargs != 0
            words.append(TAKEN + word if is_value else word)
        return words


def _unmarked(value):
    return value.removeprefix(TAKEN) if isinstance(value, str) and value.startswith(TAKEN + "-") else value


def build_parser(groups: list[type], prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """An argparse parser with one argument group per dataclass, headed by its docstring's first line."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for group in groups:
        title = (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")
        arguments = parser.add_argument_group(title)
        for f in fields(group):
            _add_argument(arguments, f)
    return parser


def parse(groups: list[type], argv: list[str] | None = None, prog: str | None = None, description: str | None = None,
          validate=None) -> list:
    """Parse `argv` into one instance per dataclass in `groups`; raise UserError listing every problem at once.

    `validate(*instances)` may return further problems, for clashes between groups.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(groups, prog, description)
    known = [s for action in parser._actions for s in action.option_strings]
    namespace, unknown = parser.parse_known_args(argv)
    problems = [_unknown_flag(token, known) for token in unknown if token.startswith("-")]
    problems += [f"unexpected argument {token!r}" for token in unknown if not token.startswith("-")] if not problems else []
    instances = []
    for group in groups:
        values = {}
        for f in fields(group):
            values[f.name], trouble = _convert(f, getattr(namespace, f.name))
            problems += trouble
        instances.append(group(**values))
    if not problems:  # the deeper checks may rely on every value being of its type
        for instance in instances:
            problems += instance.validate() if hasattr(instance, "validate") else []
        problems += validate(*instances) if validate else []
    raise_problems(problems)
    return instances


def raise_problems(problems: list[str]) -> None:
    """Raise one UserError that names every problem; nothing where there is none."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))


def _add_argument(arguments, f) -> None:
    meta, default = f.metadata, default_of(f)
    names = [flag_name(f.name), *meta["aliases"]]
    help = meta["help"].replace("%", "%%")
    if isinstance(default, bool):
        action = argparse.BooleanOptionalAction if default else "store_true"
        arguments.add_argument(*names, dest=f.name, action=action, default=default, help=help)
        return
    choices = "{" + ",".join(map(str, meta["choices"])) + "}" if meta["choices"] else None
    metavar = meta["metavar"] or choices or _base_type(f).__name__.upper()
    if isinstance(default, list):  # several values after the flag, or the flag several times
        arguments.add_argument(*names, dest=f.name, default=[], action="extend", nargs="+", metavar=metavar, help=help)
    else:
        arguments.add_argument(*names, dest=f.name, default=default, metavar=metavar, help=help)


def _base_type(f) -> type:
    """The type a single value of the field has: int of `int`, `int | None` and `list[int]`."""
    kind = f.type
    if isinstance(kind, types.UnionType):
        kind = next(t for t in typing.get_args(kind) if t is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is list else kind


def _convert(f, raw) -> tuple[object, list[str]]:
    """The field's value from argparse's string, and what is wrong with it."""
    if raw is None or isinstance(raw, bool):
        return raw, []
    if raw == []:
        return f.default_factory(), []
    if isinstance(raw, list):
        pairs = [_convert(f, item) for item in raw]
        return [value for value, _ in pairs], [problem for _, problems in pairs for problem in problems]
    kind, meta, name = _base_type(f), f.metadata, flag_name(f.name)
    try:
        value = kind(raw)
    except ValueError:
        if kind is int and _is_whole(raw):  # 5e5 is a fine way to write an int
            value = int(float(raw))
        else:
            noun = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
            return raw, [f"{name} must be {noun}, got {raw!r}"]
    if meta["choices"] and value not in meta["choices"]:
        hint = difflib.get_close_matches(str(value), map(str, meta["choices"]), 1)
        return value, [f"{name} must be one of {', '.join(map(str, meta['choices']))}, got {value!r}"
                       + (f" (did you mean {hint[0]}?)" if hint else "")]
    if kind is float and not math.isfinite(value):
        return value, [f"{name} must be a number, got {raw}"]
    low, high = bounds(f)
    if low is not None and value < low:
        return value, [f"{name} must be at least {low}, got {raw}"]
    if high is not None and value > high:
        return value, [f"{name} must be at most {high:,}, got {raw}"]
    return value, []


def bounds(f) -> tuple:
    """The least and the largest value of a field that is a flag; None where there is no bound."""
    low, high = f.metadata["low"], f.metadata["high"]
    if _base_type(f) is int and not f.metadata["choices"]:
        low, high = -1 if low is None else low, LARGEST if high is None else high
    return low, high


def _is_whole(raw: str) -> bool:
    try:
        return float(raw).is_integer()
    except (ValueError, OverflowError):
        return False


def _unknown_flag(token: str, known: list[str]) -> str:
    name = token.split("=")[0]
    hint = difflib.get_close_matches(name, known, 1)
    return f"unknown flag {name}" + (f" (did you mean {hint[0]}?)" if hint else "; --help lists them all")
