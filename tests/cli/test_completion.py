"""What --print-completion prints, read by real shells: bash everywhere, zsh and fish where they are installed."""

import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from nanochat.cli.completion import completion
from nanochat.cli.flags import CommonFlags, flag
from nanochat.common import ROOT


@dataclass
class Words:
    """Words"""
    depth: int = flag(4, "number of layers: it's a [number] of 'blocks' \\ 50 % off")
    kind: str = flag("auto", "a choice", choices=("", "auto", "many", "more"))
    prompt: list[str] = flag([], "some", aliases=("-p",))
    fast: bool = flag(False, "a switch")
    plot: bool = flag(True, "a switch to turn off")


@dataclass
class Others:
    """Others"""
    device: str = flag("auto", "a device", choices=("auto", "cpu"))


PROGRAMS = {"python -m scripts.base_words": [Words, CommonFlags], "python -m scripts.lab compare": [Others]}


def scripts(shell) -> str:
    return "\n".join(completion(shell, prog, groups) for prog, groups in PROGRAMS.items())


@pytest.mark.parametrize("words, found", [
    ("-m scripts.base_words --de", "--depth"), ("-m scripts.base_words --p", "--prompt --plot --print-config --print-completion"),
    ("-m scripts.base_words --no", "--no-plot"), ("-m scripts.base_words --kind m", "many more"),
    ("-m scripts.base_words --kind = m", "many more"), ("-m scripts.base_words --fast --kind =", "auto many more"),
    ("-m scripts.base_words --depth --", ""), ("-m scripts.base_words --device", ""), ("-m scripts.lab compare --d", "--device"),
    ("-m scripts.lab compare --device c", "cpu"), ("-m scripts.lab --d", ""), ("-m http.server --d", ""), ("--d", "")])
def test_bash(words, found):
    text = f"{scripts('bash')}\nCOMP_WORDS=(python {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n_nanochat_complete\n"
    text += 'echo "${COMPREPLY[@]}"; complete -p python'
    done = subprocess.run(["bash", "--norc", "-c", text], capture_output=True, text=True)
    reply, command = done.stdout.splitlines()
    assert reply == found and command.endswith("-F _nanochat_complete python") and not done.stderr


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish")
def test_fish(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = ["python -m scripts.base_words --de", "python -m scripts.base_words --kind m", "python -m scripts.lab compare --d",
             "python -m http.server --de"]
    lines = [f"echo '{line}:' (complete -C '{line}')" for line in asked]
    done = subprocess.run(["fish", "--no-config", "-c", "\n".join([scripts("fish"), *lines])], capture_output=True, text=True)
    first, second, third, last = done.stdout.splitlines()
    assert f"--depth\t{Words.__dataclass_fields__['depth'].metadata['help']}" in first
    assert "many" in second and "more" in second and "auto" not in second and "--device" in third and last.endswith(":")


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh():
    """It is read without an error, and the specifications are what zsh takes: a wrong one is reported when they are used."""
    text = f"compdef() {{ }}\n{scripts('zsh')}\n_arguments() {{ printf '%s\\n' \"$@\" }}\n"
    done = subprocess.run(["zsh", "-f", "-c", text + "words=(python -m scripts.base_words --d) CURRENT=4; _nanochat_complete"],
                          capture_output=True, text=True)
    specs = done.stdout.splitlines()
    assert not done.stderr and "*--kind=[a choice]:value:(auto many more)" in specs and "*--fast[a switch]" in specs
    assert "*--depth=[number of layers\\: it's a \\[number\\] of 'blocks' \\\\ 50 % off]:value:_files" in specs


def test_a_program_prints_it():
    def run(*argv):
        return subprocess.run([sys.executable, "-m", "scripts.tok_train", *argv], cwd=ROOT, capture_output=True, text=True)
    done, wrong = run("--print-completion", "bash"), run("--print-completion=csh")
    check = subprocess.run(["bash", "-n"], input=done.stdout, capture_output=True, text=True)
    assert done.returncode == check.returncode == 0 and "--vocab-size" in done.stdout and "-m scripts.tok_train" in done.stdout
    assert wrong.returncode == 2 and "bash, zsh, fish" in wrong.stderr
