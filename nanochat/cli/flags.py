"""Dataclasses as command lines: one field is one flag, one dataclass is one heading of `--help`. No torch.

    @dataclass
    class Sampling:
        "Sampling"                                      # the heading
        top_k: int = flag(50, "keep the k likeliest tokens", low=1)   # --top-k

    sampling, = parse([Sampling], argv, prog="python -m scripts.sample")

All problems of a command line are reported in one message with exit status 2, before anything heavy is imported: unknown
flags with the nearest known one; values of the wrong type, out of range or not among the choices; flags that would do nothing
(`requires`); and what the dataclasses' own `validate()` methods (-> list of problems) find.

A word after a flag that takes a value is its value, even if it begins with a dash, unless it is a flag of the same program:
`--prompt --- --seed 1`.

Every program also has the flags of `CommonFlags`: `--config FILE.toml`, `--print-config` and `--print-completion SHELL`.
"""

import argparse
import difflib
import math
import sys
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass, field, fields

from nanochat.cli.config_files import config_text
from nanochat.cli.flag_files import expand_flag_files, flags_in
from nanochat.cli.help_text import HelpFormatter, default_text, values_text
from nanochat.cli.output import stop_when_unread
from nanochat.common import UserError, print0

LARGEST = 10**15          # upper bound of an int without its own: steps, characters and bytes stay below, and a product of two
                          # that sizes a tensor is refused by torch with a message instead of overflowing
LARGEST_SEED = 2**32 - 1  # torch's CPU generator and numpy's use 32 bits of a seed: 2^32 + 1 would give the numbers of 1
TAKEN = "\0"              # marks a value that begins with a dash: no command line can contain this character


class Condition(typing.NamedTuple):
    """What another flag must be. `example` completes "give --flag ..."."""
    holds: Callable[[typing.Any], bool]
    example: str


def at_least(least: float) -> Condition:
    return Condition(lambda value: value >= least, f"at least {least}")


def above(bound: float) -> Condition:
    return Condition(lambda value: value > bound, f"a value above {bound}")


def one_of(*values) -> Condition:
    return Condition(lambda value: value in values, " or ".join(map(str, values)))


def other_than(excluded, example: str) -> Condition:
    return Condition(lambda value: value != excluded, example)


def flag(default, help: str, *, choices=None, low=None, high=None, metavar=None, aliases=(), affects_results=True, requires=None):
    """A dataclass field that is also a flag. `low` and `high` are inclusive bounds; a list default takes several values.
    An int without bounds goes from -1, which turns something off or means "derive it", to LARGEST.

    affects_results: False where at most the rounding of results depends on the flag, so that a resumed run may change it.
    requires: when the flag has an effect: {name of another flag's field: its value or a Condition}, all of them. `parse` refuses
        the flag elsewhere: requires={"fp8": True, "save_every": at_least(1)}.
    """
    conditions = {name: needed if isinstance(needed, Condition) else one_of(needed) for name, needed in (requires or {}).items()}
    meta = dict(help=help, choices=choices, low=low, high=high, metavar=metavar, aliases=aliases,
                affects_results=affects_results, requires=conditions)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def default_of(f):
    """The default of a dataclass field."""
    return f.default_factory() if f.default is MISSING else f.default


@dataclass
class CommonFlags:
    """Of every program"""
    config: str | None = flag(None, "take flags from this file; those of the command line win", metavar="FILE.toml")
    print_config: bool = flag(False, "print all flags and their values as such a file, and stop")
    print_completion: str | None = flag(None, "print what makes this shell complete flags, and stop (nanochat/cli/completion.py)",
                                        choices=("bash", "zsh", "fish"))


class _Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of exiting."""

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's, but a word is a flag if the program has it, not if it looks like one."""
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
            if word.endswith("=--") and word[:-3] in flags:  # argparse would take the value for its end of flags, and drop it
                word = f"{word[:-2]}{TAKEN}--"
            words.append(TAKEN + word if is_value else word)
        return words


def _unmarked(value):
    return value.removeprefix(TAKEN) if isinstance(value, str) and value.startswith(TAKEN + "-") else value


def build_parser(groups: list[type], prog: str | None = None, description: str | None = None) -> _Parser:
    """An argparse parser with one argument group per dataclass, headed by its docstring's first line."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=HelpFormatter)
    for group in groups:
        arguments = parser.add_argument_group(title_of(group))
        for f in fields(group):
            _add_argument(arguments, f)
    return parser


def title_of(group: type) -> str:
    """The heading of a group of flags: its docstring's first line."""
    return (group.__doc__ or group.__name__).strip().splitlines()[0].rstrip(".")


def parse(groups: list[type], argv: list[str] | None = None, prog: str | None = None, description: str | None = None,
          validate=None) -> list:
    """Parse `argv` into one instance per dataclass in `groups`.

    validate: `validate(*instances)` returns further problems, for flags of different groups that contradict each other.
    Raises: UserError, which lists every problem.
    """
    argv = sys.argv[1:] if argv is None else argv
    groups = [*groups, CommonFlags]
    problems: list[str] = []
    parser = build_parser(groups, prog, description)
    typed = flags_in(argv, parser._option_string_actions)  # a file may hold some that others of the command line make useless
    argv = expand_flag_files(argv, parser, problems)
    known = [s for action in parser._actions if action.help != argparse.SUPPRESS for s in action.option_strings]
    namespace, unknown = parser.parse_known_args(argv)
    problems += [_unknown_flag(token, known) for token in unknown if token.startswith("-")]
    problems += [f"unexpected argument {token!r}" for token in unknown if not token.startswith("-")] if not problems else []
    instances, as_given = [], []
    for group in groups:
        values = {}
        for f in fields(group):
            values[f.name], trouble = _convert(f, getattr(namespace, f.name))
            problems += trouble
        instances.append(group(**values))
        as_given.append((title_of(group), [(f, values[f.name]) for f in fields(group)]))
    *instances, common = instances
    if common.print_completion and not problems:
        from nanochat.cli.completion import completion  # which imports this module
        stop_when_unread()
        print0(completion(common.print_completion, parser.prog, groups))
        sys.exit(0)
    if not problems:  # these checks rely on every value being of its type
        problems += flags_without_effect(instances, typed)
        for instance in instances:
            problems += instance.validate() if hasattr(instance, "validate") else []
        problems += validate(*instances) if validate else []
    raise_problems(problems)
    if common.print_config:
        stop_when_unread()
        print0(config_text(as_given[:-1]))
        sys.exit(0)
    return instances


def flags_without_effect(instances: list, typed: Collection[str]) -> list[str]:
    """A problem for every unmet requirement of `typed` flags (field names) that differ from their default.

    A program that sets flags itself, one value after another, names them in `varied`, an attribute of one of its groups:
    requirements on these are not checked.
    """
    flags = {f.name: (f, getattr(group, f.name)) for group in instances for f in fields(group)}
    varied = {name for group in instances for name in getattr(group, "varied", ())}
    useless: dict[str, list[str]] = {}  # unmet condition -> flags
    for name, (f, value) in flags.items():
        if name not in typed or value == default_of(f):
            continue
        for other, condition in f.metadata["requires"].items():
            if other in flags and other not in varied and not condition.holds(flags[other][1]):
                useless.setdefault(_describe_unmet(*flags[other], condition), []).append(flag_name(name))
                break  # the first one is enough
    return [f"{', '.join(names)} would do nothing {unmet}, or leave out {', '.join(names)}" for unmet, names in useless.items()]


def _describe_unmet(f, value, condition: Condition) -> str:
    """The value of a flag beside which another one has no effect, and what to give instead."""
    name = flag_name(f.name)
    if isinstance(value, bool):
        default, other = (name if value else f"--no-{name[2:]}" for value in (default_of(f), not default_of(f)))
        return f"without {other}: add {other}" if value == default_of(f) else f"with {other}: leave out {other}"
    return f"with {name} {value}: give {name} {condition.example}"


def raise_problems(problems: list[str]) -> None:
    """Raise one UserError that names every problem; none, if there is no problem."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))


def _add_argument(arguments, f) -> None:
    meta, default = f.metadata, default_of(f)
    names = [flag_name(f.name), *meta["aliases"]]
    metavar, choices = values_text(names[0], meta["choices"])
    help = (meta["help"] + choices + default_text(default, meta["help"])).replace("%", "%%")
    if isinstance(default, bool):
        action = argparse.BooleanOptionalAction if default else "store_true"
        arguments.add_argument(*names, dest=f.name, action=action, default=default, help=help)
        if not default:  # for who has it in a file of flags
            arguments.add_argument(f"--no-{names[0][2:]}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
        return
    metavar = meta["metavar"] or metavar or _base_type(f).__name__.upper()
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
    """The field's value from argparse's string, and its problems."""
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
    """(lowest, highest) value of a field that is a flag; None where there is no bound."""
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
