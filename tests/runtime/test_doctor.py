"""The doctor: what it launches, what it says of a machine that lacks something, and what a bug report must not hold."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from nanochat.flash_attention import BACKENDS
from nanochat.runtime import diagnosis
from nanochat.runtime.diagnosis import MISSING, NAME_WIDTH, NOT_HERE, OK, SLOW, Finding, anonymous, findings_of
from nanochat.runtime.other_load import OtherLoad

ROOT = Path(__file__).parents[2]


def doctor(home, before="", *flags, **environment):
    """The doctor in a process of its own whose home folder and base directory are `home`."""
    base = home / "runs of mine, ü"
    base.mkdir(parents=True, exist_ok=True)
    code = f"""import runpy, sys
{before}
sys.argv = ['doctor', *{flags!r}]
runpy.run_module('scripts.doctor', run_name='__main__')"""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, "HOME": str(home), "NANOCHAT_BASE_DIR": str(base), "PYTHONIOENCODING": "utf-8", **environment})


@pytest.mark.slow
def test_a_machine_without_a_compiler_can_train(tmp_path):
    """Everything is tried, what is missing says what to install, the bug report names nobody, and the exit status is 0."""
    home = tmp_path / "home" / "jo"
    done = doctor(home, "", "--json", "--device-type=cpu", "--dtype=float32", CXX="no-such-compiler", NANOCHAT_NATIVE="0",
                  TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"))
    assert done.returncode == 0, done.stderr
    assert str(home) not in done.stdout
    report = json.loads(done.stdout)
    found = {f["name"]: f for f in report["findings"]}
    assert report["can_train"] and {f["status"] for f in found.values()} <= {OK, SLOW, MISSING, NOT_HERE}
    assert found["base directory"]["detail"].startswith("~/runs of mine")
    assert found["C++ compiler"]["status"] == MISSING and "no-such-compiler" in found["C++ compiler"]["detail"]
    assert found["torch.compile"]["status"] == MISSING and found["torch.compile"]["detail"].endswith("--no-compile")
    assert "NANOCHAT_NATIVE=0" in found["C++ kernels"]["detail"]
    assert found["training"]["status"] == OK and found["training"]["numbers"]["seconds"] > 0
    assert {f"attention {name}" for name in BACKENDS} <= found.keys()
    assert found["attention sdpa"]["numbers"]["milliseconds"].keys() == {"full context"}
    assert found["attention fa3"]["status"] == NOT_HERE and found["attention masked"]["status"] == OK
    assert all(found[f"matrix {name}"]["numbers"]["flops_per_sec"] > 1e6 for name in ("float32", "bfloat16"))
    assert not list((home / "runs of mine, ü").glob(".doctor*"))


def test_without_a_package_that_training_needs_the_status_is_1(tmp_path):
    done = doctor(tmp_path, "sys.modules['torch'] = None")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("package torch"))
    assert MISSING in line and "pip install torch" in line
    assert done.stdout.splitlines()[-1] == "nothing can be trained here: see package torch"


def test_a_base_directory_that_cannot_be_written_prevents_training(tmp_path):
    (tmp_path / "file").write_text("")
    found, = diagnosis.disk(tmp_path / "file")
    assert found.prevents_training and "NANOCHAT_BASE_DIR" in found.detail


def test_the_disk_is_tried_and_left_as_it_was(tmp_path):
    room, speed = diagnosis.disk(tmp_path)
    assert room.required and room.numbers["free"] > 0 and speed.numbers["bytes_per_sec"] > 1e5
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_is_a_finding_and_prints_nothing(capsys):
    def noisy():
        print("noise")
        yield Finding("fine", OK, "")
        raise RuntimeError("the kernel\ncrashed")
    found, = findings_of("kernel", noisy, required=True)
    assert (found.name, found.status, found.detail) == ("kernel", MISSING, "RuntimeError: the kernel")
    assert found.prevents_training and capsys.readouterr().out == ""


@given(st.lists(st.builds(Finding, st.text("ab ", min_size=1, max_size=NAME_WIDTH),
                          st.sampled_from([OK, SLOW, MISSING, NOT_HERE]), st.text("xyz", min_size=1)), min_size=1))
def test_the_table_lines_up(found):
    columns = {(len(line) - len(f.detail), line[NAME_WIDTH + 2:].startswith(f.status)) for f in found for line in [f.line()]}
    assert len(columns) == 1 and columns.pop()[1]


@pytest.mark.parametrize("text, expected", [
    ("/home/jo/runs: 3 GiB", "~/runs: 3 GiB"), ("in /home/jo", "in ~"), ("/home/john/x", "/home/john/x"),
    ("/tmp/torchinductor_jo/a", "/tmp/torchinductor_USER/a"), ("/home/jo-2/x", "/home/USER-2/x"),
    ("major, join, JO", "major, join, JO"), ("jo@pc: no", "USER@pc: no"), ("", "")])
def test_nobody_is_named(text, expected):
    assert anonymous(text, home="/home/jo", user="jo") == expected


@given(st.text("/johme ._-", max_size=30))
def test_a_home_folder_never_stays(text):
    assert "/home/jo/" not in anonymous(f"{text} /home/jo/{text}", home="/home/jo", user="jo")


def test_a_home_folder_at_the_root_hides_nothing():
    assert anonymous("/a/b", home="/", user="root") == "/a/b"


@pytest.mark.parametrize("now, status", [(3_100_000, OK), (1_200_000, SLOW)])
def test_a_clock_that_is_held_back_is_slow(tmp_path, now, status):
    folder = tmp_path / "cpu0" / "cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_cur_freq").write_text(f"{now}\n")
    (folder / "cpuinfo_max_freq").write_text("3700000\n")
    found, = diagnosis.clock_rate(tmp_path, tmp_path / "none")
    assert found.status == status and found.numbers == {"mhz": now / 1000, "mhz_at_most": 3700}
    unknown, = diagnosis.clock_rate(tmp_path / "none", tmp_path / "none")
    assert unknown.status == NOT_HERE


def test_figures_beside_other_programs_are_called_too_low(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu 0 0 0 1000 0 0 0 0\n")
    load = OtherLoad(stat)
    stat.write_text("cpu 500000 0 0 501000 0 0 0 0\n")
    found, = diagnosis.other_programs(load)
    assert found.status == SLOW and "50%" in found.detail
    unknown, = diagnosis.other_programs(OtherLoad(tmp_path / "none"))
    assert unknown.status == NOT_HERE


def test_optional_packages_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(diagnosis, "OPTIONAL", {"no_such_module": ("'no-such>=5'", "nothing"), "numpy": ("numpy", "arrays")})
    missing, there = diagnosis.optional_packages()
    assert missing.status == MISSING and missing.detail == "for nothing: pip install 'no-such>=5'"
    assert there.status == OK and re.match(r"\d+\.\d+.* \(arrays\)", there.detail) and not missing.prevents_training


def test_fp8_counts_only_where_it_beats_bf16():
    from nanochat.training.kernel_checks import fp8
    found, = fp8(torch.device("cpu"), bf16_rate=1e30)
    assert found.status in (SLOW, NOT_HERE) and "leave --fp8 out" in found.detail.lower()
