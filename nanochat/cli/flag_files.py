"""Files of flags: `@FILE` on a command line stands for the flags in FILE, and so does `--config FILE.toml`. No torch.

    python -m scripts.base_train @configs/cpu-d4.flags --config mine.toml --depth=6

The words of the file take the place of `@FILE`. Of a flag that is given twice the last value counts, so flags behind the file
override it. Words are separated by white space; quotes work as in a shell, and `#` outside of quotes starts a comment. A file may
name another one, `@OTHER`, relative to its own folder. The profiles of this repository are in `configs/`.

A flag in a config file (nanochat/cli/config_files.py) replaces what the files before it say. One that is typed wins over it,
wherever it stands.

For shell scripts, the value of one flag, or an empty line:   python -m nanochat.cli.flag_files configs/cpu-d4.flags depth
"""

import argparse
import difflib
import math
import os
import re
import shlex
import sys
from functools import partial
from itertools import chain
from pathlib import Path

from nanochat.cli.config_files import parsed_file, read_config
from nanochat.common import ROOT, UserError, resolve

CONFIGS = ROOT / "configs"
CONFIG = "--config"  # FILE.toml: a flag of every program


def profiles() -> list[str]:
    """Names of the files in configs/, without `.flags`. Empty in an installation without a checkout."""
    return sorted(path.stem for path in CONFIGS.glob("*.flags"))


def expand_flag_files(argv: list[str], parser: argparse.ArgumentParser | None = None,
                      problems: list[str] | None = None) -> list[str]:
    """Replace each word `@FILE` by the words of that file. A value of a flag stays as it is: `--prompt @you`.

    parser: knows which flags take a value, or several. Without it, a word directly behind a flag without `=` counts as its value,
        and `--config FILE` stays as it is.
    problems: takes what is wrong with the flags in config files; without it that is raised.

    Raises:
        UserError: a file is missing, is not text, has a quote without an end, or contains itself. One line that names the file.
    """
    flags = parser._option_string_actions if parser else None
    typed = flags_in(argv, flags) if flags else set()
    wrong = [] if problems is None else problems
    expanded: list[str] = []
    values_left = 0.0  # how many of the next words are values of the flag before them

    def add(words: list[str], folder: str, inside: tuple[str, ...]) -> None:
        nonlocal values_left
        following = iter(words)
        for word in following:
            if flags and word.partition("=")[0] == CONFIG:
                name = word.partition("=")[2] or next(following, "")
                if not name or name.partition("=")[0] in flags:
                    raise UserError(f"{CONFIG} takes the name of a file: {CONFIG} FILE.toml")
                add_config(_located(name, folder), flags)
                values_left = 0
                continue
            if word.startswith("@") and not values_left:
                path = _located(word[1:], folder)
                if os.path.realpath(path) in map(os.path.realpath, inside):
                    raise UserError(f"flag file {path} contains itself: {' -> '.join([*inside, path])}")
                add(_read(path), os.path.dirname(path), (*inside, path))
                continue
            expanded.append(word)
            takes = _values_taken(word, flags)
            values_left = max(0, values_left - 1) if takes is None else takes

    def add_config(path: str, flags: dict[str, argparse.Action]) -> None:
        config, of_file = read_config(path, flags)
        wrong.extend(of_file)
        config = {name: words for name, words in config.items() if name not in typed}
        expanded[:] = [*_without(expanded, set(config), flags), *chain(*config.values())]

    add(argv, "", ())
    if problems is None and wrong:
        raise UserError("\n".join(wrong))
    return expanded


def _located(name: str, folder: str) -> str:
    """The path of a file that is named in a file in `folder`, or on the command line."""
    return str(resolve(name if name.startswith("~") else os.path.join(folder, name)))


def flags_in(words: list[str], flags: dict[str, argparse.Action]) -> set[str]:
    """The `dest` of each flag that stands in `words`. A word is a flag if the program has it, not if it looks like one."""
    return {flags[name].dest for word in words if (name := word.partition("=")[0]) in flags}


def _without(words: list[str], names: set[str], flags: dict[str, argparse.Action]) -> list[str]:
    """`words` without the flags of these names (`dest`) and their values."""
    kept, drop = [], False
    for word in words:
        if action := flags.get(word.partition("=")[0]):
            drop = action.dest in names
        if not drop:
            kept.append(word)
    return kept


def _values_taken(word: str, flags: dict[str, argparse.Action] | None) -> float | None:
    """How many words behind this one are its values, if it is a flag: 0, 1, or math.inf for a list. None if it is not a flag."""
    name, _, value = word.partition("=")
    if flags is None:
        return (0 if value else 1) if re.match("--?[A-Za-z]", word) else None
    if name not in flags:
        return None
    if "=" in word or flags[name].nargs == 0:
        return 0
    return math.inf if flags[name].nargs == "+" else 1


def _read(path: str) -> list[str]:
    """The words of one file, with `@OTHER` as it is written there."""
    if path.endswith(".toml"):
        raise UserError(f"flag file {path}: a TOML file is given as --config {path}")
    return parsed_file("flag file", path, partial(shlex.split, comments=True), if_missing=_suggestion(path))


def _suggestion(path: str) -> str:
    """The profiles there are, if a missing file is called almost like one of them."""
    name = Path(path).name.removesuffix(".flags")
    if os.path.exists(path) or not (close := difflib.get_close_matches(name, profiles(), 1)):
        return ""
    return f" (did you mean {CONFIGS / close[0]}.flags? The profiles in configs/ are {', '.join(profiles())})"


def value_of(words: list[str], name: str) -> str:
    """The last value that `words` give to the flag `--name`, or ""."""
    found = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == f"--{name}":
            found = following
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def main() -> None:
    file, name = sys.argv[1:]
    print(value_of(expand_flag_files([f"@{file}"]), name))


if __name__ == "__main__":
    from nanochat.cli.program import cli
    cli(main)
