"""Paths: from where the user stands, before work begins, and still right after the base directory has moved."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.cli import paths
from nanochat.common import UserError
from processes import python_m

ROOT = Path(__file__).parents[2]
TINY = ("--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
        "--num-iterations=4 --eval-every=-1 --core-metric-every=-1 --sample-every=-1 --vocab-size=300 --device-type=cpu "
        "--no-compile").split()


def script(module, *words, cwd=ROOT, drop=(), **environment):
    env = {k: v for k, v in os.environ.items() if k not in drop} | environment
    return subprocess.run([sys.executable, "-m", module, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env=env)


@pytest.mark.parametrize("typed, meant", [("x", "/here/x"), ("../x", "/here/../x"), ("/a/b", "/a/b"), ("~/x", "/home/me/x"),
                                          ("~", "/home/me")])
def test_what_a_path_means(monkeypatch, typed, meant):
    monkeypatch.setenv("NANOCHAT_CWD", "/here")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(ROOT)
    assert paths.resolve(typed) == Path(meant)
    monkeypatch.chdir("/")
    assert paths.resolve("x") == Path("/x")


def test_another_users_home_and_one_that_does_not_exist():
    root = paths.resolve("~root/x")
    assert root.is_absolute() and root.name == "x" and "~" not in str(root)
    with pytest.raises(UserError, match="no such home"):
        paths.resolve("~no-such-user/x")


def test_no_home_and_no_entry_in_the_list_of_users(tmp_path):
    """As in a container that runs under a number: `id -u` says 12345, and nobody knows who that is."""
    if os.getuid() != 0:
        pytest.skip("only root can become somebody unknown")
    code = ("import os, sys; os.setuid(12345); sys.argv = ['x', '-p', 'a']; import runpy; "
            "runpy.run_module('scripts.sample', run_name='__main__')")
    env = {k: v for k, v in os.environ.items() if k not in ("HOME", "NANOCHAT_BASE_DIR")} | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    if "ModuleNotFoundError" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip("the interpreter is not readable to others here")
    assert done.returncode == 2 and "NANOCHAT_BASE_DIR" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("module, flag", [
    ("scripts.prove_resume", "--certificate"), ("scripts.base_train", "--result-json")])
def test_an_output_that_cannot_be_is_refused_first(tmp_path, module, flag):
    for bad in (tmp_path / "no" / "such" / "file.json", tmp_path, Path("/proc/x.json")):
        done = script(module, f"{flag}={bad}")
        assert done.returncode == 2 and f"{flag} {bad}" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_base_directory_that_cannot_be_written(base):
    for module, words in (("scripts.tok_train", []), ("nanochat.dataset", []), ("scripts.base_train", TINY)):
        done = script(module, *words, f"--data={base / 'text'}", NANOCHAT_BASE_DIR="/proc/sys")
        assert done.returncode == 2 and "NANOCHAT_BASE_DIR" in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_base_directory_that_was_moved(base, tmp_path):
    """Train, move all of it, take the text away: evaluating, sampling and resuming find everything where it is now."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copytree(base / "text", old / "text")
    words = [*TINY, "--model-tag=m", f"--data={old / 'text'}"]
    done = python_m("scripts.base_train", *words, NANOCHAT_BASE_DIR=str(old))
    assert done.returncode == 0, done.stderr
    for record in (old / "base_checkpoints/m").rglob("*.json"):
        if record.name in ("state.json", "result.json", "config.json"):
            content = json.loads(record.read_text())
            for typed in ("command", "argv"):
                content.pop(typed, None)
            assert str(old) not in json.dumps(content), record
    old.rename(new)
    env = {"NANOCHAT_BASE_DIR": str(new)}
    assert python_m("scripts.base_eval", "--eval=bpb", "--device-type=cpu", **env).returncode == 0
    assert python_m("scripts.sample", "-p", "def", "--max-tokens=3", "--device-type=cpu", **env).returncode == 0
    done = script("scripts.sample", "-p", "def", "--max-tokens=3", "--dtype=bfloat16", "--device-type=cpu", CXX="/no/such",
                  TORCHINDUCTOR_CACHE_DIR=str(new / "empty"), **env)  # kernels that do not compile: said, but not in the text
    assert done.returncode == 0 and done.stdout.startswith("def"), done.stdout + done.stderr
    more = ["--num-iterations=6", "--allow-change", "--resume-from-step=latest"]
    here = [word.replace(str(old), str(new)) for word in words]
    done = python_m("scripts.base_train", *here, *more, **env)
    assert done.returncode == 0 and "--data" not in done.stdout, done.stdout + done.stderr  # the text moved along: no change
    shutil.rmtree(new / "text")
    done = python_m("scripts.base_train", *here, *more, "--num-iterations=7", **env)
    assert done.returncode == 0 and "tokens prepared before" in done.stdout, done.stdout + done.stderr
    assert not old.exists()


def test_the_default_folder_is_shared_which_is_said_once(base, tmp_path):
    said = [script("scripts.tok_train", f"--data={base / 'text'}", "--vocab-size=300", drop=("NANOCHAT_BASE_DIR",),
                   HOME=str(tmp_path)).stdout.count("shared with the public nanochat") for _ in range(2)]
    assert said == [1, 0]


# ---- memory that cannot suffice

@pytest.mark.slow
@pytest.mark.parametrize("limit_kib, extra", [
    (6_000_000, ["--depth=40", "--aspect-ratio=128"]),       # found by counting, before anything is built
    (None, ["--depth=400", "--aspect-ratio=512"]),           # more than any machine has
    (2_500_000, ["--depth=12", "--aspect-ratio=64"]),        # found in the first step
])
def test_memory_that_cannot_suffice_is_an_oom_with_advice(base, tmp_path, limit_kib, extra):
    limit = f"ulimit -v {limit_kib}; " if limit_kib else ""
    words = [sys.executable, "-m", "scripts.base_train", *TINY, "--model-tag=oom", f"--data={base / 'text'}",
             f"--result-json={tmp_path / 'r.json'}", *extra]
    done = subprocess.run(["bash", "-c", limit + '"$@"', "bash", *words], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"NANOCHAT_BASE_DIR": str(base)})
    result = json.loads((tmp_path / "r.json").read_text())
    assert done.returncode == 1 and result["status"] == "oom" and result["exit_code"] == 1, done.stderr
    assert "Traceback" not in done.stderr and "--depth" in result["error"] and result["error"] in done.stderr
    assert result["num_params"] > 1000 and not (base / "base_checkpoints/oom/step_000004").exists()
