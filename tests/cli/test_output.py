"""Output never ends a run: encodings, closed pipes, closed streams, full disks, file names in any bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRINTS = """import sys
from nanochat.cli.program import cli
def main():
    for i in range(20000): print("bärenträume \\u4f60\\udcff", i)
    print("to the end", file=sys.stderr)
    open({path!r}, "w").write("done")
cli(main{options})"""


def flags(base, tag, *extra):
    return ("--depth=2 --head-dim=16 --aspect-ratio=16 --max-seq-len=32 --device-batch-size=2 --total-batch-size=128 "
            "--num-iterations=4 --eval-every=2 --eval-tokens=256 --core-metric-every=-1 --sample-every=2 --vocab-size=300 "
            f"--device-type=cpu --no-compile --data={base / 'text'} --model-tag={tag}").split() + list(extra)


def train(base, tag, *extra, shell="", python=sys.executable, **environment):
    """base_train in a shell, with `shell` behind its command line; its result.json."""
    words = [python, "-m", "scripts.base_train", *flags(base, tag, *extra)]
    done = subprocess.run(["bash", "-c", f'"$@" {shell}', "bash", *words], cwd=ROOT, capture_output=True, timeout=120,
                          env=os.environ | {"NANOCHAT_BASE_DIR": str(base)} | environment)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr.decode(errors="replace")
    return json.loads((base / "base_checkpoints" / tag / "result.json").read_text()), done


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-16"])
def test_what_cannot_be_encoded_is_replaced(base, encoding, quick_python):
    text = base / "wide"
    text.mkdir(exist_ok=True)
    (text / "a.txt").write_text("你好，世界。\n" * 3000, encoding="utf-8")
    result, done = train(base, f"enc-{encoding}", f"--data={text}", PYTHONIOENCODING=encoding, python=quick_python)
    assert result["status"] == "ok" and result["steps_done"] == 4 and done.returncode == 0
    assert "samples" in done.stdout.decode(encoding)


@pytest.mark.slow
def test_a_locale_without_unicode(base):
    result, _ = train(base, "posix", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result["status"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("name, shell", [
    ("head", "2>&1 | head -c 20"), ("full", "> /dev/full"), ("both-full", "> /dev/full 2> /dev/full"), ("no-stdout", ">&-"),
    ("none", "<&- >&- 2>&-"), ("no-stderr", "2>&-")])
def test_a_run_goes_on_without_a_reader(base, name, shell, quick_python):
    result, _ = train(base, name, shell=shell, python=sys.executable if name == "none" else quick_python)
    assert result["status"] == "ok" and result["steps_done"] == 4
    rows = (base / "base_checkpoints" / name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 0, 1, 2, 2, 2, 3, 4, 4]  # nothing else was written into it


@pytest.mark.slow
def test_file_names_in_any_bytes(base, quick_python):
    folder = os.fsencode(base) + b"/caf\xe9"
    os.makedirs(folder, exist_ok=True)
    for name in (b"na\xefve.txt", "naïve.txt".encode()):
        with open(folder + b"/" + name, "w") as f:
            f.write("some text of a stranger\n" * 400)
    result, _ = train(base, "bytes", f"--data={os.fsdecode(folder)}", python=quick_python)
    assert result["status"] == "ok"
    again, _ = train(base, "bytes", f"--data={os.fsdecode(folder)}", "--resume-from-step=latest", python=quick_python)
    assert again["status"] == "ok"
    with open(folder + b"/bad.txt", "wb") as f:
        f.write(b"\xff\xfe\xfd")
    done = subprocess.run([sys.executable, "-m", "nanochat.dataset", b"--data=" + folder], cwd=ROOT, capture_output=True,
                          env=os.environ | {"NANOCHAT_BASE_DIR": str(base), "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and b"bad.txt" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("options, finishes", [("", True), (", for_its_output=True", False)])
def test_who_stops_when_nobody_reads_any_more(tmp_path, options, finishes):
    path = tmp_path / "done"
    code = PRINTS.format(path=str(path), options=options)
    done = subprocess.run(["bash", "-c", '"$@" | head -n 1; exit ${PIPESTATUS[0]}', "bash", sys.executable, "-c", code], cwd=ROOT,
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout == b"b?rentr?ume ?? 0\n"
    assert path.exists() == finishes and (b"going on in silence" in done.stderr) == finishes


@pytest.mark.parametrize("flags", ["--explain --vocab-size=512", "--print-config", "--print-completion bash"])
def test_what_training_prints_instead_of_training_stops_when_nobody_reads(flags):
    command = f'"{sys.executable}" -m scripts.base_train {flags} | head -c 20 > /dev/null; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and not done.stderr


def test_unbuffered_output_is_there_at_once():
    """PYTHONUNBUFFERED, which containers set: a line must not wait for the end of the program, which may be sudden."""
    program = """import os, sys
from nanochat.cli.output import tolerant_streams
tolerant_streams()
print("out"); print("err", file=sys.stderr)
os._exit(0)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
