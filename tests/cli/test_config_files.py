"""--config FILE.toml: what it may hold, who wins, and what is refused; --print-config, which it reads back."""

import importlib
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from nanochat.cli.flag_files import CONFIGS, expand_flag_files, profiles
from nanochat.cli.flags import build_parser, default_of, flag, parse
from nanochat.common import ROOT, UserError
from nanochat.features import FEATURES
from nanochat.training.config import parse_config
from scripts import chat_cli, sample

if sys.version_info < (3, 11):
    pytest.importorskip("tomli")


@dataclass
class Words:
    """Words"""
    depth: int = flag(4, "a number", low=1)
    rate: float = flag(1.0, "a number")
    model_tag: str | None = flag(None, "one")
    kind: str = flag("auto", "a choice", choices=("auto", "", "many"))
    prompt: list[str] = flag([], "some", aliases=("-p", "--text"))
    seeds: list[int] = flag([1, 2], "numbers")
    fast: bool = flag(False, "a switch")
    plot: bool = flag(True, "a switch to turn off")
    faster: bool = flag(False, "more", requires={"fast": True})


def read(*argv) -> Words:
    return parse([Words], list(argv))[0]


def refusal(*argv) -> str:
    with pytest.raises(UserError) as e:
        read(*argv)
    return str(e.value)


# Reading

@pytest.mark.parametrize("text, found", [
    ("", Words()),
    ("depth = 6\nrate = 1\nfast = true\nplot = false", Words(depth=6, rate=1.0, fast=True, plot=False)),
    ("model-tag = 'a b'", Words(model_tag="a b")),
    ("model_tag = '--fast'", Words(model_tag="--fast")),
    ("model_tag = '@none.flags'", Words(model_tag="@none.flags")),
    ("model_tag = 7", Words(model_tag="7")),
    ("model_tag = ''", Words(model_tag="")),
    ("depth = 5e5\nrate = -1.5e-7", Words(depth=500_000, rate=-1.5e-7)),
    ("prompt = 'one'", Words(prompt=["one"])),
    ("text = ['one', '--', '-x', '']", Words(prompt=["one", "--", "-x", ""])),
    ("prompt = []\nseeds = [3]", Words(seeds=[3])),
    ("[a]\ndepth = 6\n[b.c]\nseeds = [5, 6]\n[seeds]\nfast = true", Words(depth=6, seeds=[5, 6], fast=True)),
    ("\ufeff# about\r\ndepth = 6\r\n", Words(depth=6)),
    ("model_tag = 'Zoë 数'", Words(model_tag="Zoë 数")),
    ("faster = true", Words(faster=True)),  # not typed, so it may be there for other command lines
])
def test_values(folder, text, found):
    (folder / "a file.toml").write_bytes(text.encode())
    assert read("--config", "a file.toml") == read("--config=a file.toml") == found


def test_the_command_line_wins_wherever_the_file_stands(folder):
    (folder / "a.toml").write_text("depth = 6\nmodel_tag = 'file'\nseeds = [3, 4]\nfast = true\nplot = false")
    (folder / "b.toml").write_text("depth = 7\nprompt = ['b']")
    (folder / "c.flags").write_text("--depth=8 --seeds 5 --prompt c")
    typed = read("--depth=2", "--seeds", "9", "--config=a.toml", "--no-fast", "--plot")
    assert typed == Words(depth=2, seeds=[9], model_tag="file")
    assert read("--config=a.toml", "--config=b.toml").depth == 7, "of two files the later"
    mixed = read("@c.flags", "--config=a.toml", "--config", "b.toml")
    assert (mixed.depth, mixed.seeds, mixed.prompt) == (7, [3, 4], ["b"]), "a list is replaced, not made longer"
    assert read("--config=b.toml", "@c.flags").depth == 8


def test_a_flag_file_names_a_config_relative_to_itself(folder, monkeypatch):
    (folder / "sub").mkdir()
    (folder / "sub" / "a.toml").write_text("depth = 6")
    (folder / "a.flags").write_text("@sub/b.flags")
    (folder / "sub" / "b.flags").write_text("--config a.toml")
    assert read("@a.flags").depth == 6
    monkeypatch.setenv("HOME", str(folder / "sub"))
    assert read("--config=~/a.toml").depth == 6


def test_who_reads_flags_for_another_program_reads_its_config(folder):
    """The lab: an experiment is known by the flags, not by the name of a file that may change."""
    (folder / "a.toml").write_text("depth = 6\nprompt = ['x', 'y']\nplot = false")
    parser = build_parser([Words])
    assert expand_flag_files(["--config=a.toml", "--rate=2"], parser) == [
        "--depth=6", "--prompt=x", "--prompt=y", "--no-plot", "--rate=2"]
    (folder / "a.toml").write_text("depht = 6")
    with pytest.raises(UserError, match="depht.*depth"):
        expand_flag_files(["--config=a.toml"], parser)


# What is refused

def test_all_problems_are_one_message_with_those_of_the_command_line(folder):
    (folder / "a.toml").write_text("depht = 6\nfast = 1\ndepth = true\nrate = [1.0]\nmodel_tag = 2026-01-01\nrates = 2\n"
                                   "seeds = [[1]]\nmodel-tag = 'x'\n[group]\nplot = 'no'\nprint-config = true\nhelp = true\n"
                                   "no-plot = true\nprompt = [{a = 1}]\n[other]\nseeds = 'x'")
    said = refusal("--config=a.toml", "--no-such-flag")
    for words in ("10 problems", "'depht' (did you mean depth?)", "fast must be true or false, got 1",
                  "depth takes text in quotes", "rate takes one value", "a date", "'rates' (did you mean rate?)", "seeds takes",
                  'got "no"', "'print-config'", "'help'", "'no-plot' (did you mean plot?)", "got a table", "--no-such-flag",
                  "--seeds must be a whole number"):
        assert words in said, (words, said)
    assert said.count(str(folder / "a.toml")) == 8


def test_a_file_of_another_program_is_a_short_message(folder):
    (folder / "a.toml").write_text("".join(f"none{i} = {i}\n" for i in range(100)))
    said = refusal("--config=a.toml")
    assert "'none11' and 88 more" in said and "none12" not in said and len(said.splitlines()) == 1


def test_a_key_in_two_tables_and_a_value_out_of_range(folder):
    (folder / "a.toml").write_text("model_tag = 'a'\n[b]\nmodel-tag = 'b'")
    assert "model-tag is there twice" in refusal("--config=a.toml")
    (folder / "a.toml").write_text("depth = 0\nkind = 'man'")
    assert "--depth must be at least 1" in (said := refusal("--config=a.toml")) and "did you mean many?" in said


@pytest.mark.parametrize("content", [b"depth =", b"depth = 1\ndepth = 2", b"name = 'a\0'", b"name = \xe4", b"depth = 0x",
                                     b"depth = " + b"9" * 5000, b"a = " + b"[" * 100_000, None],
                         ids=["half", "twice", "NUL", "Latin-1", "number", "huge", "nested", "folder"])
def test_a_broken_file_is_named_in_one_line(folder, content):
    if content is None:
        (folder / "a.toml").mkdir()
    else:
        (folder / "a.toml").write_bytes(content)
    said = refusal("--config=a.toml")
    assert str(folder / "a.toml") in said and len(said.splitlines()) == 1


def test_files_of_the_other_kind_and_missing_ones(folder):
    (folder / "a.flags").write_text("--depth=6")
    (folder / "a.toml").write_text("depth = 6")
    assert "@" + str(folder / "a.flags") in refusal("--config=a.flags")
    assert f"--config {folder / 'a.toml'}" in refusal("@a.toml")
    assert str(folder / "none.toml") in refusal("--config", "none.toml")
    for argv in (["--config"], ["--config="], ["--config", "--fast"], ["--config", "--depth=3"]):
        assert "--config FILE.toml" in refusal(*argv)
    (folder / "a.toml").write_text('model-tag = "a\\u0000b"')
    assert "U+0000" in refusal("--config=a.toml")


def test_without_a_reader_of_toml_the_package_is_named(folder, monkeypatch):
    (folder / "a.toml").write_text("depth = 6")
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert "pip install tomli" in refusal("--config=a.toml")


# --print-config

def printed(groups, argv, capsys, validate=None) -> str:
    with pytest.raises(SystemExit) as end:
        parse(groups, [*argv, "--print-config"], validate=validate)
    assert end.value.code == 0
    return capsys.readouterr().out


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
VALUES = {"depth": st.integers(1, 10**15), "rate": st.floats(allow_nan=False, allow_infinity=False), "model_tag": TEXT,
          "kind": st.sampled_from(["auto", "", "many"]), "prompt": st.lists(TEXT, max_size=3),
          "seeds": st.lists(st.integers(-1, 99), min_size=1, max_size=3), "fast": st.booleans(), "plot": st.booleans()}


@settings(max_examples=100)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_what_is_printed_is_read_back(tmp_path_factory, values):
    argv = []
    for name, value in values.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(option if value else f"--no-{name}")
        else:
            argv += [f"{option}={v}" for v in (value if isinstance(value, list) else [value])]
    file = tmp_path_factory.getbasetemp() / "printed.toml"
    with pytest.MonkeyPatch.context() as patch, open(file, "w", encoding="utf-8", newline="\n") as out:
        patch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit):
            parse([Words], [*argv, "--print-config"])
    before, after = read(*argv), read(f"--config={file}")
    assert before == after and math.copysign(1, before.rate) == math.copysign(1, after.rate)
    assert all(getattr(before, name) == value for name, value in values.items() if value != [])


@pytest.mark.parametrize("argv", [[], *([f"@{CONFIGS / name}.flags"] for name in profiles()), ["--depth=3", "--tracker", "wandb",
                                  "tensorboard", "--fp8", "--fp8-emulate", "--no-compile", "--max-train-seconds=1e9"]], ids=str)
def test_a_run_is_read_back(tmp_path, capsys, argv):
    """The same flags, and the same that follows from them: -1 and 32 rows are not the same."""
    with pytest.raises(SystemExit):
        parse_config(FEATURES, [*argv, "--print-config"])
    file = tmp_path / "run.toml"
    file.write_text(capsys.readouterr().out, encoding="utf-8")
    before, after = parse_config(FEATURES, argv), parse_config(FEATURES, [f"--config={file}"])
    assert before == after and before.flat() == after.flat()
    assert before.horizon.takes_what_fits == after.horizon.takes_what_fits


@pytest.mark.parametrize("groups", [[sample.ModelFlags, sample.SamplingFlags, sample.PromptFlags],
                                    [sample.ModelFlags, sample.SamplingFlags, chat_cli.ChatFlags]], ids=["sample", "chat_cli"])
def test_every_flag_is_printed_once(capsys, groups):
    text = printed(groups, [], capsys)
    for group in groups:
        for f in group.__dataclass_fields__.values():
            name = f.name.replace("_", "-")
            assert text.count(f"\n{name} = ") + text.count(f"\n# {name} is not set") == 1
            assert default_of(f) is not None or f"# {name} is not set" in text
    importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text)


def test_bytes_that_are_no_text_are_refused():
    assert "--model-tag" in refusal("--model-tag=\udce4", "--print-config")


def test_a_wrong_command_line_is_not_printed():
    assert "--depht" in refusal("--depht=4", "--print-config")


def test_by_a_program(tmp_path):
    def run(*argv):
        return subprocess.run([sys.executable, "-m", "scripts.sample", *argv], cwd=ROOT, capture_output=True, text=True)
    first = run("--seed=7", "-p", "a 'b' \"c\"\n", "--print-config")
    (tmp_path / "s.toml").write_text(first.stdout)
    assert first.returncode == 0 and run("--config", str(tmp_path / "s.toml"), "--print-config").stdout == first.stdout
    wrong = run("--config", str(tmp_path / "none.toml"))
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "none.toml" in wrong.stderr
