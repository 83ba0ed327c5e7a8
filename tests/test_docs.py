"""The documentation is true of the code: its commands run, and its links, file names and flags exist.

Commands: every block that begins with ```bash, in README.md, docs/ and CONTRIBUTING.md, is executed by bash in a checkout of
links to this one, with a home that has a little text (~/texts) and a base directory that has a trained model. `python` is a
stand-in there (STAND_IN):

- What prepares text, trains, evaluates or writes (the keys of SMALL) runs, with flags appended that make it small.
- Any other program of ours, and training that names a flag of the compiler, checks its command line: it ends with status 0 as
  soon as it would load torch, start a program or listen, since every problem of a command line is found before that.
- A program of others (pytest, ruff) does nothing; nor do pip, uv and the like.

In a block that begins with ```bash check, for what needs a GPU, a network or minutes, our programs only check their command
lines, and the text is prepared, small. What `torchrun` starts is checked in every block. Lines with a word for the reader to
replace (DIR, FILE) are left out.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from nanochat.cli.flags import build_parser, flag_name
from nanochat.features import FEATURES
from nanochat.training.config import Config
from training_text import write_text

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", ROOT / "attempts" / "README.md", ROOT / "dev" / "bench" / "README.md",
         ROOT / "dev" / "GPU_DAY.md", *sorted((ROOT / "nanochat").glob("*/README.md"))]
BLOCK = re.compile(r"^```(\w*)( check)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACEHOLDER = re.compile(r"^[^#\n]* (DIR|FILE)\b.*\n", re.MULTILINE)
CODE_FILES = (".py", ".sh", ".cpp", ".md", ".toml")  # by these names the documentation means files of the repository

STAND_IN = '''
import os, runpy, sys

QUICK = os.environ.pop("QUICK_PYTHON")
TEXT = ["--data=" + os.path.expanduser("~/texts")]
CPU = ["--device-type=cpu"]
SMALL = {  # appended to a program's flags: the last one of a name counts
    "scripts.base_train": [*TEXT, *CPU, *"""--depth=2 --aspect-ratio=16 --head-dim=16 --max-seq-len=32 --vocab-size=300
        --num-iterations=2 --device-batch-size=2 --total-batch-size=128 --eval-tokens=64 --core-metric-every=-1
        --sample-every=-1 --save-every=1 --no-compile""".split()],
    "scripts.tok_train": [*TEXT, "--vocab-size=300"],
    "nanochat.dataset": TEXT,
    "scripts.tok_eval": ["--help"],  # other tokenizers come over a network
    "scripts.base_eval": [*CPU, "--split-tokens=64"],
    "scripts.sample": [*CPU, "--max-tokens=2"],
    "scripts.chat_cli": [*CPU, "--max-tokens=2"],
}
SMALL_TOO = {"dynamic_suffix": ["--dyn-warmup-steps=0"], "--fp8": ["--fp8-emulate", "--fp8-min-dim=16"],
             "--initial-depth": ["--initial-depth=1", "--depth-growth-frac=0.5"]}  # with these words
NEEDS_COMPILER = ("--compile", "--recompute")


def accepted(event, arguments):
    """The command line is right: work would begin now."""
    if (event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "socket.bind")
            or event == "import" and arguments[0] in ("torch", "multiprocessing.popen_spawn_posix")):
        os._exit(0)


sys.modules["matplotlib"] = None  # a second of importing per run: a run has no picture without it
sys.argv.pop(0)
if sys.argv[0] == "-c":
    code = sys.argv.pop(1)
    exec(code)
    sys.exit()
if sys.argv[0] == "-m":
    del sys.argv[0]
module = sys.argv[0]
if module.split(".")[0] not in ("nanochat", "scripts", "dev"):
    sys.exit(", ".join(a for a in sys.argv if a.startswith("tests/") and not os.path.exists(a)) or None)
prepares = module in ("scripts.tok_train", "nanochat.dataset", "nanochat.cli.paths")  # without torch, in no time
checks = not prepares and ("CHECK" in os.environ or module not in SMALL or any(a.startswith(NEEDS_COMPILER) for a in sys.argv))
if checks:
    sys.addaudithook(accepted)
else:
    for word, flags in SMALL_TOO.items():
        sys.argv += flags if any(word in a for a in sys.argv) else []
    sys.argv += SMALL.get(module, [])
    if module == "scripts.base_train" and not any(flag.startswith("--resume-from-step") for flag in sys.argv):
        sys.argv += ["--overwrite"]
if checks or prepares:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
else:  # in a Python that has loaded torch already
    os.execv(QUICK, [QUICK, "-m", *sys.argv])
'''


def blocks(path: Path) -> list[tuple[int, bool, str]]:
    """Line number, whether it is for checking only, and text of each bash block of a page."""
    text = path.read_text(encoding="utf-8")
    return [(text[:match.start()].count("\n") + 1, bool(match[2]), PLACEHOLDER.sub("", match[3]))
            for match in BLOCK.finditer(text) if match[1] == "bash"]


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, quick_python, quick_programs):
    """A function that executes bash text in the checkout of stand-ins: (text, base directory, more of the environment) ->
    finished process."""
    folder = tmp_path_factory.mktemp("docs")
    checkout, home = folder / "checkout", folder / "home"
    checkout.mkdir()
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git"):
            (checkout / path.name).symlink_to(path)
    (folder / "stand_in.py").write_text(STAND_IN)
    python = checkout / ".venv" / "bin" / "python"
    program(python, f'exec "{sys.executable}" "{folder / "stand_in.py"}" "$@"')
    program(python.with_name("activate"), "")
    for name in ("python", "python3"):
        program(folder / "bin" / name, f'exec "{python}" "$@"')
    program(folder / "bin" / "torchrun", 'while [ "$1" != -m ]; do shift; done; CHECK=1 exec python "$@"')
    program(folder / "bin" / "nvidia-smi", "exit 9")  # no GPU
    for name in ("pip", "uv", "poetry", "pre-commit", "clang-format"):
        program(folder / "bin" / name, "")
    home.mkdir(parents=True)
    write_text(home / "texts", files=2, characters=8000)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("NANOCHAT_", "FP8_", "DYN_"))}
    environment = clean | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(home), "QUICK_PYTHON": quick_python,
                           "PYTHONPATH": quick_programs["PYTHONPATH"] + os.pathsep + str(ROOT), "NANOCHAT_NATIVE": "0",
                           "OMP_NUM_THREADS": "1", "SKIP_SETUP": "1", "PYTHON": str(python)}

    def execute(text: str, base: Path, **more):
        return subprocess.run(["bash", "-c", f"set -ex\n{text}"], cwd=checkout, text=True, timeout=300, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=environment | {"NANOCHAT_BASE_DIR": str(base), **more})
    return execute


@pytest.fixture(scope="module")
def trained(checkout, tmp_path_factory):
    """A base directory with a trained model."""
    base = tmp_path_factory.mktemp("trained")
    done = checkout("python -m scripts.base_train --model-tag=d4", base)
    assert done.returncode == 0, done.stdout
    return base


def command_blocks(check: bool):
    found = [(path, line, text) for path in GUIDES for line, only_checked, text in blocks(path) if only_checked == check]
    return pytest.mark.parametrize("text", [text for *_, text in found],
                                   ids=[f"{path.relative_to(ROOT)}:{line}" for path, line, _ in found])


@pytest.mark.slow
@command_blocks(check=False)
def test_commands_run(checkout, trained, tmp_path, text):
    done = checkout(text, shutil.copytree(trained, tmp_path / "base"))
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@command_blocks(check=True)
def test_command_lines_that_cannot_run_here_are_accepted(checkout, tmp_path, text):
    done = checkout(text, tmp_path, CHECK="1")
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("command", ["python -m scripts.base_train --no-such-flag", "torchrun -m scripts.base_train --depth=x",
                                     "python -m scripts.lab compare --candidate=--no-such-flag",
                                     "python -m dev.bench.train_step -- --no-such-flag", "bash runs/no_such_runner.sh"])
def test_a_wrong_command_fails(checkout, tmp_path, command):
    """The stand-in does not hide mistakes."""
    for check in ({}, {"CHECK": "1"}):
        assert checkout(command, tmp_path, **check).returncode not in (0, 1)


# --- names -----------------------------------------------------------------------------------------------------------

def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


def spans(path: Path) -> list[str]:
    """What a page has in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def anchors(path: Path) -> set[str]:
    """The headings of a page as GitHub links them."""
    headings = re.findall(r"^#+ +(.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


by_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@by_page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        file, _, anchor = target.partition("#")
        if not re.match(r"\w+:", target):
            place = (path.parent / file).resolve() if file else path
            assert place.exists(), target
            assert not anchor or anchor in anchors(place), target


@by_page
def test_files_exist(path):
    """Names in backticks of code and pages; and paths that begin in a folder of the repository, the page's own or the root."""
    folders = {entry.name for entry in ROOT.iterdir() if entry.is_dir()}
    for span in spans(path):
        for word in shlex.split(span.replace("'", "")):
            word = word.removeprefix("@")
            first = word.split("/")[0]
            if not re.fullmatch(r"[\w.*/-]+", word) or word.startswith((".", "/")) and first not in folders:
                continue
            if "/" in word and first in folders:
                assert list(ROOT.glob(word.rstrip("/"))), word
            elif word.endswith(CODE_FILES) and not word.startswith("."):
                assert list(path.parent.glob(word)) or list(ROOT.glob(word)) or list(ROOT.glob(f"*/**/{word}")), word


@pytest.fixture(scope="module")
def known_flags():
    """Every flag that a program of the repository declares, or the example of a page."""
    sources = [path for folder in ("nanochat", "scripts", "dev", "attempts") for path in (ROOT / folder).rglob("*.py")]
    declared = {name for path in [*sources, *PAGES]
                for name in re.findall(r"^ +(\w+): .* = flag\(", path.read_text(encoding="utf-8"), re.MULTILINE)}
    of_torchrun = {"--nnodes", "--max-restarts", "--local-addr"}
    ours = {prefix + flag_name(name).removeprefix("--") for name in declared for prefix in ("--", "--no-")}
    return {"--help"} | of_torchrun | ours


@by_page
def test_flags_exist(path, known_flags):
    """In backticks, where the flag stands first; `--dyn-*` stands for several."""
    for span in spans(path):
        if re.match(r"--\w", span):
            name = re.split(r"[= ,]", span)[0]
            assert name in known_flags or name.endswith("*") and any(flag.startswith(name[:-1]) for flag in known_flags), name


def test_the_table_of_optimizations_names_flags_of_base_train():
    groups = [*(field.type for field in fields(Config) if field.name != "features"), *(feature.Config for feature in FEATURES)]
    options = {option for action in build_parser(groups)._actions for option in action.option_strings}
    named = re.findall(r"^\| `(--[\w-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(named) > 5 and set(named) <= options


def test_the_messages_that_are_explained_are_those_of_the_source():
    """What stands in docs/troubleshooting.md between the "…", which are put in while a program runs."""
    known = [path.read_text(encoding="utf-8") for path in (ROOT / "runs").glob("*.sh")]
    for path in (path for folder in ("nanochat", "scripts") for path in (ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        known += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    parts = [part.strip() for match in BLOCK.finditer(page) if match[1] == "text" for part in re.split("[…\n]", match[3])]
    assert len(parts) > 100
    assert [part for part in parts if not any(part in text for text in known)] == []


def test_a_page_stands_beside_each_folder():
    folders = {path.parent for path in (ROOT / "nanochat").glob("*/*.py")}
    assert {folder.name for folder in folders if not (folder / "README.md").exists()} == set()


def test_extras_exist():
    """What the documentation installs, .[dev] and the like, is declared."""
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    for path in GUIDES:
        for extras in re.findall(r"\.\[([\w,]+)\]|--extras? (\w+)", path.read_text(encoding="utf-8")):
            assert set("".join(extras).split(",")) <= declared
