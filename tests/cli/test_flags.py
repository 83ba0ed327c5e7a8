"""Command lines: which words are values; that no number, of any flag of any program, ends in a traceback; and that a flag that
would do nothing is refused."""

import importlib
import math
import re
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

from nanochat.cli.flags import (
    LARGEST,
    LARGEST_SEED,
    _base_type,
    at_least,
    bounds,
    build_parser,
    default_of,
    flag,
    flag_name,
    one_of,
    parse,
)
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.training.config import Config

ROOT = Path(__file__).parents[2]


@dataclass
class Words:
    """Words"""
    prompt: list[str] = flag([], "some", aliases=("-p",))
    name: str | None = flag(None, "one")
    depth: int = flag(4, "a number", low=1)
    rate: float = flag(1.0, "a number")
    windows: list[int] = flag([], "numbers")
    fast: bool = flag(False, "a switch")
    plot: bool = flag(True, "a switch to turn off")


def read(*argv) -> dict:
    words, = parse([Words], list(argv))
    return {f.name: getattr(words, f.name) for f in fields(Words) if getattr(words, f.name) != getattr(Words(), f.name)}


def refusal(*argv, groups=(Words,)) -> str:
    with pytest.raises(UserError) as e:
        parse(list(groups), list(argv))
    return str(e.value)


# Words that begin with a dash

@pytest.mark.parametrize("argv, found", [
    (["-p", "---"], dict(prompt=["---"])),
    (["-p", "-x", "--fast"], dict(prompt=["-x"], fast=True)),
    (["--prompt", "--not-a-flag", "--depth", "7"], dict(prompt=["--not-a-flag"], depth=7)),
    (["--prompt", "--not=a", "more", "- words"], dict(prompt=["--not=a", "more", "- words"])),
    (["-p", "--"], dict(prompt=["--"])),
    (["--prompt=--", "-p=--"], dict(prompt=["--", "--"])),
    (["-p", "-"], dict(prompt=["-"])),
    (["-p=-x", "--name=--fast"], dict(prompt=["-x"], name="--fast")),
    (["-p", "-x", "-p", "-y"], dict(prompt=["-x", "-y"])),
    (["--name", "--fp8 --depth=6"], dict(name="--fp8 --depth=6")),
    (["--name", "-1"], dict(name="-1")),
    (["--rate", "-1.5", "--windows", "-1", "128", "-1"], dict(rate=-1.5, windows=[-1, 128, -1])),
])
def test_a_word_behind_a_flag_that_takes_a_value_is_its_value(argv, found):
    assert read(*argv) == found


@pytest.mark.parametrize("argv, names", [
    (["--name", "--fast"], ["--name"]),
    (["--name", "--depth=3"], ["--name"]),
    (["--name", "--no-plot"], ["--name"]),
    (["-p", "--name", "x"], ["--prompt"]),
    (["-p"], ["--prompt"]),
    (["--depht=4"], ["--depht", "--depth"]),
    (["--fast", "--depht=4"], ["--depht", "--depth"]),
    (["-p", "one", "--depht=4"], ["--depht", "--depth"]),
    (["-p", "-x", "--depht=4"], ["--depht", "--depth"]),
    (["--depth", "--deep"], ["--depth", "--deep"]),
    (["--rate", "-x"], ["--rate", "-x"]),
])
def test_a_flag_is_no_value(argv, names):
    said = refusal(*argv)
    assert all(name in said for name in names)


def test_a_prompt_of_dashes_reaches_the_sampler(tmp_path):
    done = subprocess.run([sys.executable, "-c", "from scripts.sample import *\n"
                           "print(parse([ModelFlags, SamplingFlags, PromptFlags])[2].prompt)", "-p", "---", "--seed", "1"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['---']", done.stderr


# Numbers, of all flags of all scripts

def every_group() -> list[type]:
    """Every dataclass of flags in the programs of this repository."""
    found = {}
    for path in sorted(path for folder in ("nanochat", "scripts", "attempts", "dev") for path in (ROOT / folder).rglob("*.py")):
        if "flag(" not in path.read_text(encoding="utf-8") or path.name == "flags.py":
            continue
        if path.parts[-3:-2] == ("attempts",):  # a script that is run finds its neighbours
            sys.path.insert(0, str(path.parent))
            module = importlib.import_module(path.stem)
            sys.path.remove(str(path.parent))
        else:
            module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        for group in [*classes, *(c.Config for c in classes if hasattr(c, "Config"))]:
            if is_dataclass(group) and any("help" in f.metadata for f in fields(group)):
                found[group.__module__, group.__qualname__] = group
    return list(found.values())


GROUPS = every_group()
NUMBERS = sorted({(group, f.name, _base_type(f)) for group in GROUPS for f in fields(group) if _base_type(f) in (int, float)},
                 key=lambda number: (number[0].__module__, number[0].__qualname__, number[1]))
WRONG = {int: ["1" + "0" * 20, "-1" + "0" * 20, "1e300", "1e400", "", " ", "nan", "inf", "-inf", "0x10", "1.5", "-7",
               "9" * 5000],
         float: ["nan", "inf", "-inf", "1e400", "", " ", "0x10", "1,5"]}


def test_flags_of_all_programs_are_found():
    found = {group.__module__ for group in GROUPS}
    assert {"nanochat.training.config", "nanochat.recipe.suffix_policy", "nanochat.features.fp8", "scripts.sample",
            "nanochat.lab.cli", "dev.bench.loader", "measure"} <= found
    assert any(name.startswith("nanochat.benchmarks.") for name in found)
    assert len(NUMBERS) > 120


@pytest.mark.parametrize("group, name, kind", NUMBERS, ids=[f"{g.__module__}.{n}" for g, n, _ in NUMBERS])
def test_no_number_is_beyond_its_type(group, name, kind):
    for text in WRONG[kind]:
        said = refusal(f"{flag_name(name)}={text}", groups=[group])
        assert flag_name(name) in said and len(said.splitlines()) == 1, (text, said)
    if kind is int:
        f = next(f for f in fields(group) if f.name == name)
        low, high = bounds(f) if not f.metadata["choices"] else (0, 0)
        assert -1 <= low <= high <= LARGEST, (name, low, high)


def test_seeds_are_what_the_generators_take():
    """torch's CPU generator takes 32 bits of a seed: those beyond would be other seeds over again."""
    for group in GROUPS:
        for f in fields(group):
            if f.name.endswith(("seed", "seeds")) and _base_type(f) is int and f.name != "max_seeds":
                assert bounds(f) == (0, LARGEST_SEED), f"{group.__module__} {f.name}"


@pytest.mark.parametrize("text, value", [("5e5", 500_000), ("1_000", 1000), (" 7 ", 7), ("-1", -1), ("1e15", LARGEST)])
def test_numbers_may_be_written_as_python_and_science_do(text, value):
    assert read(f"--windows={text}") == dict(windows=[value])


def test_the_bounds_of_a_plain_number_leave_minus_one_and_no_other_negative():
    assert "--windows" in refusal("--windows=-7") and "--windows" in refusal("--windows", "1e30")
    assert read("--rate=-7.5") == dict(rate=-7.5) and math.isclose(read("--rate=1e300")["rate"], 1e300)


@pytest.mark.parametrize("argv", [["--seed=99999999999999999999"], ["--eval-every=1e30"], ["--eval-every=-7"]])
def test_a_run_with_such_a_number_is_one_line(argv):
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and argv[0].split("=")[0] in done.stderr


# Flags that would do nothing

@dataclass
class Needy:
    """Flags that need others"""
    fast: bool = flag(False, "a switch")
    plot: bool = flag(True, "a switch to turn off")
    every: int = flag(-1, "a number")
    kind: str = flag("none", "a choice", choices=("none", "some", "many"))
    faster: bool = flag(False, "more", requires={"fast": True})
    colour: str | None = flag(None, "of the plot", requires={"plot": True})
    text: bool = flag(False, "instead of the plot", requires={"plot": False})
    keep: int = flag(3, "how many", requires={"every": at_least(1), "kind": one_of("some", "many")})
    elsewhere: bool = flag(False, "of a program with another group", requires={"no_such_flag": 1})


@pytest.mark.parametrize("argv, other", [
    (["--faster"], "--fast"), (["--colour=red", "--no-plot"], "--no-plot"), (["--text"], "--no-plot"), (["--keep=4"], "--every"),
    (["--keep=4", "--every=0"], "--every"), (["--keep=4", "--every=1"], "--kind")])
def test_a_flag_without_effect_is_refused_with_the_one_that_it_needs(argv, other):
    said = refusal(*argv, groups=[Needy])
    assert argv[0].split("=")[0] in said and other in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("argv", [
    ["--faster", "--fast"], ["--colour=red"], ["--text", "--no-plot"], ["--keep=4", "--every=1", "--kind=many"],
    ["--keep=3"], ["--elsewhere"]], ids=" ".join)  # the last but one is the default
def test_a_flag_with_effect_is_accepted(argv):
    parse([Needy], argv)


def test_flags_of_a_file_may_have_no_effect(tmp_path):
    """Those of a profile are there for every command line that uses it; only a flag that is typed was meant to have an effect."""
    file = tmp_path / "fast.flags"
    file.write_text("--faster --keep=4")
    flags, = parse([Needy], [f"@{file}"])
    assert flags.faster and flags.keep == 4
    said = refusal(f"@{file}", "--keep=5", groups=[Needy])
    assert "--keep" in said and "--faster" not in said
    assert "--faster" in refusal("--faster", f"@{file}", groups=[Needy])


def test_flags_that_a_program_sets_itself_are_not_required():
    class Bench(Needy):
        varied = ("fast",)
    assert parse([Bench], ["--faster"])[0].faster
    assert "--every" in refusal("--keep=4", groups=[Bench])


TRAINING = [f.type for f in fields(Config) if f.name != "features"] + [feature.Config for feature in FEATURES]
PROGRAMS = [TRAINING, *([group] for group in GROUPS if group not in TRAINING)]
REQUIRED = [(program, f, other, {g.name: g for group in program for g in fields(group)})
            for program in PROGRAMS for group in program for f in fields(group) for other in f.metadata.get("requires", ())]


def values_of(f) -> list:
    """Some values that the flag of this field may have, its default first."""
    kind, default = _base_type(f), default_of(f)
    words = ("-1", "7") if f.metadata["metavar"] != "NAME=VALUE" else ("a=1",)
    others = f.metadata["choices"] or {bool: (True, False), int: (-1, 0, 1, 2), float: (0.0, 1.0, 2.0)}.get(kind, words)
    low, high = bounds(f) if kind in (int, float) else (None, None)
    return [default, *(v for v in others if v != default and (low is None or v >= low) and (high is None or v <= high))]


def argv_of(flags, settings: dict) -> list[str]:
    argv = []
    for name, value in settings.items():
        if isinstance(value, bool):
            argv += [flag_name(name) if value else "--no-" + flag_name(name)[2:]] * (value != default_of(flags[name]))
        elif value is not None:
            argv.append(f"{flag_name(name)}={value}")
    return argv


@pytest.mark.parametrize("program, f, other, flags", REQUIRED, ids=[f"{f.name}-{other}" for _, f, other, _ in REQUIRED])
def test_every_declared_requirement(program, f, other, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    requires = f.metadata["requires"]
    assert set(requires) <= set(flags), "a requirement names a flag that the program does not have"
    own = next(v for v in values_of(f)[1:] if v not in (0, -1))
    met = {name: next(v for v in values_of(flags[name]) if needed.holds(v)) for name, needed in requires.items()}
    parse(program, argv_of(flags, {f.name: own} | met))
    unmet = met | {other: next(v for v in values_of(flags[other]) if not requires[other].holds(v))}
    said = refusal(*argv_of(flags, {f.name: own} | unmet), groups=program)
    assert any(flag_name(f.name) in line and flag_name(other)[2:] in line for line in said.splitlines()), said


def test_a_flag_without_effect_exits_with_2():
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", "--keep-last=3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--keep-last" in done.stderr and "--save-every" in done.stderr


# ---- --help

HELPED = sorted({p.stem for p in (ROOT / "scripts").glob("*.py")} - {"attempts", "lab", "runs"})  # which have commands instead


@dataclass
class Explained:
    """Explained"""
    kind: str = flag("b", "which", choices=("a", "b"))
    way_of_the_world: str = flag("first-of-many", "which", choices=("first-of-many", "second-of-many", "third-of-many"))
    rate: float = flag(0.5, "100 % of it")
    seeds: list[int] = flag([1, 2], "some")
    fast: bool = flag(False, "a switch")
    safe: bool = flag(True, "another")
    folder: str | None = flag(None, "where; by default here")
    other: str | None = flag(None, "whatever")
    prompt: str | None = flag(None, "the text", metavar="TEXT", aliases=("-p",))


def test_help_has_one_line_a_flag_with_its_default(monkeypatch):
    """Where there is no terminal there is no width, and a grep finds whole lines."""
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = build_parser([Explained], "prog").format_help().splitlines()
    assert lines[0] == "usage: prog [flags]" and "Explained:" in lines
    found = {line.split()[0]: " ".join(line.split()) for line in lines if line.startswith("  -")}
    assert found["--kind"] == "--kind {a,b} which (default: b)"
    assert found["--way-of-the-world"] == ("--way-of-the-world NAME which; one of first-of-many, second-of-many, third-of-many "
                                           "(default: first-of-many)")
    assert found["--rate"] == "--rate FLOAT 100 % of it (default: 0.5)" and found["--seeds"].endswith("some (default: 1 2)")
    assert found["--fast"] == "--fast a switch (default: off)" and found["--safe,"] == "--safe, --no-safe another (default: on)"
    assert found["--folder"] == "--folder STR where; by default here" and found["--other"].endswith("whatever (default: none)")
    assert found["-p,"] == "-p, --prompt TEXT the text (default: none)" and "--no-fast" not in found


@pytest.mark.parametrize("columns", [30, 80, 140])
def test_help_keeps_within_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = build_parser([Explained], "prog").format_help().splitlines()
    assert max(map(len, lines)) <= max(columns, 44)


@pytest.mark.parametrize("script", HELPED)
def test_every_flag_of_a_script_has_a_line_in_its_help(script, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as e:
        importlib.import_module(f"scripts.{script}").main()
    said = capsys.readouterr().out
    flags = [line for line in said.splitlines() if line.startswith("  -")]
    assert e.value.code == 0 and said.startswith(f"usage: python -m scripts.{script} [flags]\n") and len(flags) >= 3
    assert all(re.match(r"  -\S+.*?  +\S", line) for line in flags), "a flag and what it means"
    assert not re.search(r"default: (None|False|True|\[|\))", said)
