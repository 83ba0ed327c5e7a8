"""The messages of wrong command lines, word for word: tests/messages.golden holds commands and their standard error.

The top of that file says how to write it anew. Its diff then shows every message that a change has altered.
"""

import io
import os
import re
import runpy
import shlex
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "messages.golden"
REWRITE = "REWRITE_MESSAGES" in os.environ
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_golden() -> dict[str, str]:
    """Command -> what it prints on standard error."""
    head, *blocks = re.split(r"^\$ ", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {command: message.strip("\n") for command, _, message in (block.partition("\n") for block in blocks)}


def write_golden(messages: dict[str, str]) -> None:
    head = GOLDEN.read_text(encoding="utf-8").partition("\n$ ")[0].rstrip("\n")
    GOLDEN.write_text(head + "\n" + "".join(f"\n$ {command}\n{said}\n" for command, said in messages.items()), encoding="utf-8")


EXPECTED = read_golden()


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """The messages so far, by command. {tmp} in a command is a folder with a little text, and with files in the wrong place."""
    tmp = tmp_path_factory.mktemp("messages").resolve()
    (tmp / "text").mkdir()
    (tmp / "text" / "a.txt").write_text("Some words, and a few more.\n" * 400)
    (tmp / "rows.jsonl").write_text('{"body": "some words"}\n')
    (tmp / "broken.jsonl").write_text('{"text": "some words"}\n{"text": \n')
    (tmp / "empty").mkdir()
    (tmp / "file").write_text("")
    (tmp / "quote.flags").write_text("--run='a\n")
    (tmp / "loop.flags").write_text("@loop.flags\n")
    (tmp / "wrong.toml").write_text("depht = 4\n[device]\ncompile = 'no'\nseed = [1, 2]\n")
    step = tmp / "base" / "base_checkpoints" / "taken" / "step_000005"
    step.mkdir(parents=True)
    (step / "model.safetensors").write_bytes(b"not a model")
    found = {"tmp": tmp}
    yield found
    if REWRITE:
        write_golden({command: found[command] for command in EXPECTED})


@pytest.mark.parametrize("command", EXPECTED)
def test_message(command, messages, monkeypatch):
    tmp, environment = messages["tmp"], {}
    words = shlex.split(command.replace("{tmp}", str(tmp)))
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    assert words[:2] == ["python", "-m"]
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"NANOCHAT_BASE_DIR": str(tmp / "base"), **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", words[2:])
    monkeypatch.chdir(tmp)
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()), warnings.catch_warnings(), pytest.raises(SystemExit) as status:
        warnings.simplefilter("ignore")  # another test may have imported the module
        runpy.run_module(words[2], run_name="__main__", alter_sys=False)
    said = re.sub(r"\s+$", "", errors.getvalue().replace(str(tmp), "{tmp}").replace(str(ROOT), "{root}"))
    messages[command] = said
    assert status.value.code == 2 and said.startswith("error: ") and "Traceback" not in said, said
    assert REWRITE or said == EXPECTED[command]
