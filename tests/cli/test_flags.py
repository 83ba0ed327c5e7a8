"""Values on command lines: which words are values, and that no number, of any flag of any script, ends in a traceback."""

import importlib
import math
import subprocess
import sys
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

from nanochat.cli.flags import LARGEST, LARGEST_SEED, _base_type, bounds, flag, flag_name, parse
from nanochat.common import UserError

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
    (["-p", "-"], dict(prompt=["-"])),
    (["-p=-x", "--name=--fast"], dict(prompt=["-x"], name="--fast")),
    (["-p", "-x", "-p", "-y"], dict(prompt=["-x", "-y"])),
    (["--name", "--fp8 --depth=6"], dict(name="--fp8 --depth=6")),
    (["--name", "-1"], dict(name="-1")),
    (["--rate", "-1.5", "--windows", "-1", "128", "-1"], dict(rate=-1.5, windows=[-1, 128, -1])),
])
def test_a_word_behind_a_flag_that_takes_a_value_is_its_value(argv, found):
    assert read(*argv) == found


@pytest.mark.parametrize("argv, words", [
    (["--name", "--fast"], "--name: expected one argument"),
    (["--name", "--depth=3"], "--name: expected one argument"),
    (["--name", "--no-plot"], "--name: expected one argument"),
    (["-p", "--name", "x"], "expected at least one argument"),
    (["-p"], "expected at least one argument"),
    (["--depht=4"], "unknown flag --depht (did you mean --depth?)"),
    (["--fast", "--depht=4"], "unknown flag --depht (did you mean --depth?)"),
    (["-p", "one", "--depht=4"], "unknown flag --depht (did you mean --depth?)"),
    (["-p", "-x", "--depht=4"], "unknown flag --depht (did you mean --depth?)"),
    (["--depth", "--deep"], "--depth must be a whole number, got '--deep'"),
    (["--rate", "-x"], "--rate must be a number, got '-x'"),
])
def test_a_flag_is_none(argv, words):
    assert words in refusal(*argv)


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


def test_all_programs_are_looked_at():
    found = {group.__module__ for group in GROUPS}
    assert {"nanochat.training.config", "nanochat.benchmarks.bench", "nanochat.benchmarks.attempts",
            "nanochat.recipe.suffix_policy", "nanochat.features.fp8",
            "scripts.lab", "scripts.sample", "scripts.prove_resume", "dev.bench.loader", "measure"} <= found
    assert len(NUMBERS) > 120


@pytest.mark.parametrize("group, name, kind", NUMBERS, ids=[f"{g.__module__}.{n}" for g, n, _ in NUMBERS])
def test_no_number_is_beyond_its_type(group, name, kind):
    for text in WRONG[kind]:
        said = refusal(f"{flag_name(name)}={text}", groups=[group])
        assert f"{flag_name(name)} must be " in said and len(said.splitlines()) == 1 and "got" in said, (text, said)
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
    assert "--windows must be at least -1, got -7" in refusal("--windows=-7")
    assert "--windows must be at most 1,000,000,000,000,000, got 1e30" in refusal("--windows", "1e30")
    assert read("--rate=-7.5") == dict(rate=-7.5) and math.isclose(read("--rate=1e300")["rate"], 1e300)


@pytest.mark.parametrize("argv", [["--seed=99999999999999999999"], ["--eval-every=1e30"], ["--eval-every=-7"]])
def test_a_run_with_such_a_number_is_one_line(argv):
    done = subprocess.run([sys.executable, "-m", "scripts.base_train", *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and argv[0].split("=")[0] in done.stderr
