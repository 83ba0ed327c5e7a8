"""Flags in TOML: `--config FILE.toml` reads them, `--print-config` writes them. No torch.

    # mine.toml, for: python -m scripts.base_train --config mine.toml --seed=2
    depth = 6
    max_seq_len = 512              # or max-seq-len
    [optimization]                 # a table only groups: its name means nothing
    matrix-lr = 0.03
    compile = false                # --no-compile
    tracker = ["wandb", "tensorboard"]
"""

import argparse
import difflib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import Field
from pathlib import Path
from typing import Any, TypeVar

from nanochat.common import UserError

Parsed = TypeVar("Parsed")
OF_THE_COMMAND_LINE = {"help", "config", "print_config", "print_completion"}  # these flags are no part of a config
MOST_NAMED = 12  # keys that a message names, where a file is for another program


def parsed_file(kind: str, path: str, parse: Callable[[str], Parsed], if_missing: str = "", if_wrong: str = "") -> Parsed:
    """What `parse`, which raises ValueError, makes of a text file; a byte-order mark is no part of the text.

    Raises: UserError that names the file, as the `kind` of file that it is, and ends with `if_missing` for one that cannot be
    read, with `if_wrong` for one that cannot be parsed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # line ends of any system
        if "\0" in text:
            raise ValueError("it is not text")
        return parse(text)
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except OSError as e:
        reason = (e.strerror or str(e)) + if_missing
    except ValueError as e:
        reason = str(e) + if_wrong
    except RecursionError:
        reason = "its tables or lists are nested too deeply"
    raise UserError(f"{kind} {path}: {reason}")


# ---- reading

def read_config(path: str, flags: dict[str, argparse.Action]) -> tuple[dict[str, list[str]], list[str]]:
    """The flags in a TOML file: (words for the command line, by the flag's `dest`; problems, one for each wrong key or value).

    flags: what the program has, by name.
    A value is checked like one that was typed, later; here only what no word could say is a problem.

    Raises: UserError where the file cannot be read, or is not TOML.
    """
    if path.endswith(".flags"):
        raise UserError(f"config file {path}: a file of flags is given as @{path}")
    content = parsed_file("config file", path, _toml().loads, if_wrong='. Text stands in quotes, as in data = "python"')
    found: dict[str, list[str]] = {}
    problems, unknown = [], []
    known = [name[2:] for name, action in flags.items() if name.startswith("--") and action.dest not in OF_THE_COMMAND_LINE
             and not _switches_off(name, action)]
    for key, value in _leaves(content):
        name = key.replace("_", "-")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            unknown.append(f"{key!r}" + (f" (did you mean {close[0]}?)" if close else ""))
        elif (action := flags[f"--{name}"]).dest in found:
            problems.append(f"config file {path}: {key} is there twice")
        else:
            try:
                found[action.dest] = _words(action, value)
            except ValueError as e:
                problems.append(f"config file {path}: {key} {e}")
    if unknown:
        more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        see = "" if all("did you mean" in name for name in unknown) else "; --help lists them all"
        problems.insert(0, f"config file {path}: there is no flag {', '.join(unknown[:MOST_NAMED])}{more}{see}")
    return found, problems


def _toml() -> Any:
    """The reader of TOML: in Python from 3.11 on, else the package that it was made from."""
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise UserError("--config needs Python 3.11 or newer, or the package tomli: pip install tomli")


def _leaves(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a table and of those inside it, whose names do not count."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value)
        else:
            yield key, value


def _switches_off(name: str, action: argparse.Action) -> bool:
    return action.nargs == 0 and name.startswith("--no-") and not action.dest.startswith("no_")


def _words(action: argparse.Action, value) -> list[str]:
    """The words that give a flag this value. ValueError, which completes "<key> ...", for a value of a wrong kind."""
    name = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, got {_kind(value)}")
        return [name if value else f"--no-{name[2:]}"]
    if isinstance(value, list) and action.nargs != "+":
        raise ValueError("takes one value, got a list")
    values = value if isinstance(value, list) else [value]
    if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, (str, int, float))]:
        raise ValueError(f"takes text in quotes or a number, got {_kind(wrong[0])}")
    if any("\0" in v for v in values if isinstance(v, str)):
        raise ValueError("has the character U+0000, which no command line can hold")
    return [f"{name}={v if isinstance(v, str) else repr(v)}" for v in values]


def _kind(value) -> str:
    """A value of TOML as a message shows it."""
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (int, float)):
        return str(value)
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else "a date"


# ---- writing

def config_text(groups: Iterable[tuple[str, list[tuple[Field, Any]]]]) -> str:
    """TOML of (heading, [(field, value), ...]) for each group of flags. `--config` reads the same values back."""
    return "\n\n".join("\n".join([f"# {heading}", *(_line(f, value) for f, value in values)]) for heading, values in groups)


def _line(f: Field, value) -> str:
    name = f.name.replace("_", "-")
    if value is None:  # TOML has no word for it; a flag that is None was not given
        return f"# {name} is not set"
    try:
        return f"{name} = {_toml_value(value)}"
    except UnicodeEncodeError:
        raise UserError(f"--print-config: the value of --{name} has bytes that are no text, which TOML cannot hold") from None


def _toml_value(value) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str):
        value.encode()
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
