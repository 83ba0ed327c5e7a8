"""The fingerprint of the source: whatever can decide what a run computes, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.runtime.provenance import fingerprint_of, source_fingerprint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path):
    for name in ("nanochat/gpt.py", "nanochat/kernels/cpp/loss.cpp", "nanochat/kernels/cpp/bf16.h", "scripts/base_train.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"the content of {name}\n")
    return tmp_path


@pytest.mark.parametrize("name", ["nanochat/gpt.py", "nanochat/kernels/cpp/loss.cpp", "nanochat/kernels/cpp/bf16.h",
                                  "scripts/base_train.py", "nanochat/features/new.py"])
def test_every_file_of_code_counts(source, name):
    before = fingerprint_of(source)
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("another content\n")
    assert fingerprint_of(source) != before


def test_a_name_and_a_border_between_files_count(source):
    before = fingerprint_of(source)
    (source / "nanochat/gpt.py").rename(source / "nanochat/gqt.py")
    renamed = fingerprint_of(source)
    (source / "nanochat/gqt.py").rename(source / "nanochat/gpt.py")
    assert renamed != before == fingerprint_of(source)
    (source / "nanochat/a.py").write_text("ab")
    (source / "nanochat/b.py").write_text("c")
    one = fingerprint_of(source)
    (source / "nanochat/a.py").write_text("a")
    (source / "nanochat/b.py").write_text("bc")
    assert fingerprint_of(source) != one


def test_other_files_do_not_count(source):
    before = fingerprint_of(source)
    for name in ("nanochat/README.md", "nanochat/__pycache__/gpt.cpython-311.pyc", "tests/test_gpt.py", "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    (source / "nanochat/.#gpt.py").symlink_to("nobody@nowhere")  # an editor's mark on a file that is open
    assert fingerprint_of(source) == before


def test_an_installed_copy_has_the_same_one(tmp_path):
    """Without git, and elsewhere."""
    for package in ("nanochat", "scripts"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    code = "from nanochat.runtime.provenance import git_state, source_fingerprint; print(source_fingerprint(), git_state()[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PATH": "", "PYTHONPATH": str(tmp_path)})
    assert done.stdout.split() == [fingerprint_of(ROOT), "None"], done.stderr
    assert len(source_fingerprint()) == 64
