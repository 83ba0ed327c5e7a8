"""The Python that starts at once (quick_python.py) does what a real one does, so that tests may start programs by it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ANSWER = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['A'], input()); print('e', file=sys.stderr); sys.exit(3)"


@pytest.fixture(params=["quick", "real"])
def python(request):
    return request.getfixturevalue("quick_python") if request.param == "quick" else sys.executable


def run(python, *words, **options):
    return subprocess.run([python, *words], capture_output=True, text=True, timeout=60, **options)


def test_words_folder_environment_streams_and_status(python, tmp_path):
    done = run(python, "-c", ANSWER, "x y", "ü\udcff", cwd=tmp_path, env=os.environ | {"A": "ü"}, input="typed\n")
    assert (done.returncode, done.stderr) == (3, "e\n") and done.stdout == f"['x y', 'ü\\udcff'] {tmp_path} ü typed\n"


@pytest.mark.parametrize("code, status, said", [
    ("import sys; sys.exit('no')", 1, "no\n"), ("1/0", 1, "ZeroDivisionError: division by zero\n"), ("pass", 0, ""),
    ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"), ("import os; os.kill(os.getpid(), 9)", -9, ""),
    ("import atexit, sys; atexit.register(print, 'last', file=sys.stderr)", 0, "last\n")])
def test_how_it_ended(python, code, status, said):
    done = run(python, "-c", code)
    assert done.returncode == status and done.stderr.endswith(said) and bool(done.stderr) == bool(said)


def test_signals_reach_the_program(python):
    code = "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(7))\nprint('ready', flush=True)\nsignal.pause()"
    with subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.wait(60) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_that_is_killed_is_gone_before_the_next_starts(quick_python):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with subprocess.Popen([quick_python, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.kill()
    assert run(quick_python, "-c", f"import os; print(os.path.exists('/proc/{pid}'))").stdout == "False\n"


def test_closed_and_inherited_files(python, tmp_path):
    """No stdout, and a file that a shell has opened."""
    code = "import sys; print(sys.stdout, open(sys.argv[1]).read(), file=sys.stderr)"
    done = run("bash", "-c", '"$1" -c "$2" <(echo hi) >&-', "bash", python, code)
    assert (done.returncode, done.stderr) == (0, "None hi\n\n")


def test_modules_and_files(python, tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'beside'")
    (tmp_path / "program.py").write_text("import sys\nfrom beside import WORD\nprint(WORD, __name__, *sys.argv[1:])")
    for words, cwd in ((["-m", "program"], tmp_path), (["-u", str(tmp_path / "program.py")], Path("/"))):
        assert run(python, *words, "x", cwd=cwd).stdout == "beside __main__ x\n"


def test_an_ignored_signal_stays_ignored(python):
    """As under nohup."""
    code = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    done = run(python, "-c", code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
