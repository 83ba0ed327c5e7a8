"""Files of flags on command lines: how they are read, where they may stand, and what is refused."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from nanochat.cli.flag_files import CONFIGS, expand_flag_files, profiles, value_of
from nanochat.cli.flags import flag, parse
from nanochat.common import ROOT, UserError
from nanochat.features import FEATURES
from nanochat.training.config import parse_config


@dataclass
class Words:
    """Words"""
    depth: int = flag(4, "a number")
    name: str = flag("", "one")
    prompt: list[str] = flag([], "some", aliases=("-p",))
    fast: bool = flag(False, "a switch")
    plot: bool = flag(True, "a switch to turn off")


def read(*argv) -> Words:
    return parse([Words], list(argv))[0]


def refusal(*argv) -> str:
    with pytest.raises(UserError) as e:
        read(*argv)
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)


# Reading

@pytest.mark.parametrize("text, words", [
    ("", []),
    (" \n\t\n", []),
    ("# nothing but a comment, with it's quote", []),
    ("--depth=6", ["--depth=6"]),
    ("--depth=6 --fast\n\n  --name\tx\n", ["--depth=6", "--fast", "--name", "x"]),
    ("# about\n--depth=6  # six, it's said\n# --fast\n--name=x", ["--depth=6", "--name=x"]),
    ("--name='two words' --prompt \"it's\" '' a\\ b", ["--name=two words", "--prompt", "it's", "", "a b"]),
    ("--name='a # b' '--prompt=#'", ["--name=a # b", "--prompt=#"]),
    ("--name='two\nlines'", ["--name=two\nlines"]),
    ("--name=$HOME/* --prompt=~ `x`", ["--name=$HOME/*", "--prompt=~", "`x`"]),
    ("--name=Zoë", ["--name=Zoë"]),
])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
def test_words_are_split_as_in_a_shell(folder, text, words, mark):
    (folder / "a.flags").write_bytes((mark + text).encode())
    assert expand_flag_files(["--first", "x", "@a.flags", "--last"]) == ["--first", "x", *words, "--last"]


def test_line_ends_of_windows(folder):
    (folder / "a.flags").write_bytes(b"\xef\xbb\xbf# about\r\n--depth=6\r\n--name=x # end\r\n\r\n--fast")
    assert expand_flag_files(["@a.flags"]) == ["--depth=6", "--name=x", "--fast"]


def test_the_last_value_counts(folder):
    (folder / "a.flags").write_text("--depth=6 --name=file --no-plot")
    (folder / "b.flags").write_text("--depth=8")
    assert read("--depth=2", "@a.flags").depth == 6
    assert read("@a.flags", "--depth=2", "--plot") == Words(depth=2, name="file")
    assert read("@a.flags", "@b.flags") == Words(depth=8, name="file", plot=False)


# Values that begin with @

@pytest.mark.parametrize("argv, found", [
    (["--name", "@a.flags"], Words(name="@a.flags")),
    (["--name=@a.flags"], Words(name="@a.flags")),
    (["-p", "@you", "and", "@me"], Words(prompt=["@you", "and", "@me"])),
    (["-p", "-x", "@you"], Words(prompt=["-x", "@you"])),
    (["-p=x", "@a.flags"], Words(prompt=["x"], depth=6)),
    (["-p", "@you", "--fast", "@a.flags"], Words(prompt=["@you"], fast=True, depth=6)),
    (["--no-plot", "@a.flags"], Words(plot=False, depth=6)),
    (["--name", "x", "@a.flags"], Words(name="x", depth=6)),
    (["--name", "--nothing", "@a.flags"], Words(name="--nothing", depth=6)),
    (["@b.flags", "@you"], Words(prompt=["@you"])),
    (["@c.flags"], Words(name="@a.flags", depth=6)),
])
def test_a_value_stays_a_value(folder, argv, found):
    (folder / "a.flags").write_text("--depth=6")
    (folder / "b.flags").write_text("--prompt")
    (folder / "c.flags").write_text("--name @a.flags @a.flags")
    assert read(*argv) == found


def test_without_a_parser_a_word_behind_a_flag_may_be_its_value(folder):
    (folder / "a.flags").write_text("--depth=6")
    assert expand_flag_files(["--fast", "@a.flags"]) == ["--fast", "@a.flags"]
    assert expand_flag_files(["-p", "@you", "@a.flags", "--x", "-1", "@a.flags"]) == [
        "-p", "@you", "--depth=6", "--x", "-1", "--depth=6"]


# Files in files, and where they lie

def test_a_file_names_another_relative_to_itself(folder):
    (folder / "sub").mkdir()
    (folder / "a.flags").write_text("--name=a @sub/b.flags --fast")
    (folder / "sub" / "b.flags").write_text(f"@../c.flags --depth=7 @{folder}/c.flags")
    (folder / "c.flags").write_text("--depth=5")
    assert expand_flag_files(["@a.flags"]) == ["--name=a", "--depth=5", "--depth=7", "--depth=5", "--fast"]
    assert expand_flag_files(["@sub/../a.flags"]) == expand_flag_files([f"@{folder}/a.flags"])


def test_a_file_may_come_twice_but_not_in_itself(folder):
    (folder / "a.flags").write_text("--depth=5")
    (folder / "link").symlink_to("c.flags")
    (folder / "b.flags").write_text("@b.flags")
    (folder / "c.flags").write_text("--fast @d.flags")
    (folder / "d.flags").write_text("--depth=5 @link")
    assert expand_flag_files(["@a.flags", "@a.flags"]) == ["--depth=5", "--depth=5"]
    for name in ("b.flags", "c.flags"):
        assert str(folder / name) in refusal(f"@{name}")


def test_relative_paths_start_from_the_users_folder(folder, monkeypatch):
    (folder / "a.flags").write_text("--depth=6")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NANOCHAT_CWD", str(folder))
    assert read("@a.flags") == read("@~/a.flags") == Words(depth=6)
    (folder / "b.flags").write_text("@~/a.flags")
    assert read("@b.flags") == Words(depth=6)


# What is refused

@pytest.mark.parametrize("content", [b"--name='open", b"--depth=6 \\", b"--name=\xe4", b"--name=a\0b", None],
                         ids=["quote", "backslash", "Latin-1", "NUL", "folder"])
def test_a_broken_file_is_named(folder, content):
    if content is None:
        (folder / "a.flags").mkdir()
    else:
        (folder / "a.flags").write_bytes(content)
    (folder / "b.flags").write_text("@a.flags")
    assert str(folder / "a.flags") in refusal("@a.flags")
    assert str(folder / "a.flags") in refusal("--fast", "@b.flags")


@pytest.mark.parametrize("word", ["@none.flags", "@none/none", "@", "@@a.flags", "@a.flags/b", "@~no-such-user/a"])
def test_a_missing_file_is_named(folder, word):
    (folder / "a.flags").write_text("--depth=6")
    assert word[1:] in refusal(word)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_named(folder):
    (folder / "a.flags").write_text("--depth=6")
    (folder / "a.flags").chmod(0)
    assert str(folder / "a.flags") in refusal("@a.flags")


def test_a_link_to_itself_is_named(folder):
    (folder / "a.flags").symlink_to("a.flags")
    assert str(folder / "a.flags") in refusal("@a.flags")


def test_profiles_are_suggested_for_names_like_theirs(folder):
    for word in ("@cpu-d4", "@configs/cpu-d5.flags", "@gpu_d12.flags"):
        assert all(name in refusal(word) for name in profiles())
    assert "cpu-smoke" not in refusal("@my-own-experiment.flags")


def test_a_program_ends_with_status_2():
    for word in ("@none.flags", "@configs"):
        done = subprocess.run([sys.executable, "-m", "scripts.base_train", word], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and word[1:] in done.stderr


# The profiles of this repository

@pytest.mark.parametrize("name", profiles())
def test_every_profile_is_a_valid_run(name):
    path = CONFIGS / f"{name}.flags"
    config = parse_config(FEATURES, [f"@{path}"])
    assert config.eval.core_metric_every == config.eval.sample_every == -1, "CORE needs a download"
    assert config.model.window_pattern == "L" or name == "speedrun-d24", "that one is the public nanochat's own"
    assert parse_config(FEATURES, [f"@{path}", "--depth=3"]).model.depth == 3
    about = [line.lower() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("python -m" in line for line in about) and any("time" in line and "result:" in line for line in about)


def test_a_value_for_shell_scripts():
    words = ["--depth=4", "--name", "x", "--depth", "6", "--depth-more=7"]
    assert [value_of(words, name) for name in ("depth", "name", "none")] == ["6", "x", ""]
    for name, value in (("depth", "4"), ("eval-every", "20"), ("none", "")):
        command = [sys.executable, "-m", "nanochat.cli.flag_files", "configs/lab-cpu.flags", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"{value}\n")
