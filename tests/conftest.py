"""What every test shares: a base directory of its own, few threads, no deadlines."""

import os
import shutil
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

from training_text import write_text

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; threads only slow tiny models down
os.environ.pop("NANOCHAT_CWD", None)  # of runs/test.sh, which has been started from anywhere
os.environ["NANOCHAT_BASE_DIR"] = tempfile.mkdtemp(prefix="nanochat-tests-")  # for the scripts that tests start, too

for signum in (signal.SIGINT, signal.SIGHUP):  # ignored in a suite that was started by nohup or in the background,
    if signal.getsignal(signum) == signal.SIG_IGN:  # and so in the programs that it starts, to which tests send them
        signal.signal(signum, lambda *_: None)

settings.register_profile("nanochat", deadline=None)  # the first example pays for imports and compilation
settings.load_profile("nanochat")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory of the module's own, with a little text in base/text."""
    base = tmp_path_factory.mktemp("base")
    write_text(base / "text")
    before, os.environ["NANOCHAT_BASE_DIR"] = os.environ["NANOCHAT_BASE_DIR"], str(base)
    yield base
    os.environ["NANOCHAT_BASE_DIR"] = before


# Tests that look at pictures. In all others runs go without theirs: drawing loss.png takes most of the time of a tiny run.
LOOK_AT_PICTURES = {"test_attempts_command", "test_attempts_runs", "test_container_d", "test_lab_report", "test_train"}


@pytest.fixture(scope="session")
def quick_programs(tmp_path_factory):
    """Environment variables with which the programs that tests start find no matplotlib, as where it is not installed, and do not
    ask the compiler what it can do, which takes six processes, where this process has asked."""
    folder = tmp_path_factory.mktemp("no-matplotlib")
    (folder / "matplotlib.py").write_text("raise ImportError('left out by tests/conftest.py')")
    variables = {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if sys.platform == "linux" and "torch" in sys.modules:
        from torch._inductor import config, cpu_vec_isa
        before = dict(os.environ)  # torch writes its cache folder into it
        found = cpu_vec_isa.valid_vec_isa_list()
        with config.patch({"cpp.vec_isa_ok": True}):
            if cpu_vec_isa.valid_vec_isa_list.__wrapped__() == found:
                variables["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
        for name in os.environ.keys() - before:
            del os.environ[name]
    return variables


@pytest.fixture(scope="session")
def quick_python(tmp_path_factory):
    """The path of a Python that starts at once: tests/quick_python.py. For what starts programs; python_m (processes.py) starts
    one without it."""
    if sys.platform != "linux":  # no pidfd, no /proc
        yield sys.executable
        return
    from processes import started
    from quick_python import serve
    folder, program = tmp_path_factory.mktemp("quick"), Path(__file__).with_name("quick_python.py")
    (python := folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{program}" "{folder / "server"}" "$@"\n')
    python.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "server"))
        listener.listen()
        server = started(serve, listener, str(python))
    yield str(python)
    server.terminate()
    server.join()


@pytest.fixture(scope="module")
def quick_starts(quick_python):
    """In the tests of a module that asks for it, programs started by sys.executable start at once, and what they start does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", quick_python)
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_runs(request, quick_programs):
    """Neither a module's own runs nor the programs that it starts draw pictures, unless its tests look at them."""
    with pytest.MonkeyPatch.context() as patch:
        variables = dict(quick_programs)
        if request.module.__name__.rpartition(".")[2] in LOOK_AT_PICTURES:
            del variables["PYTHONPATH"]
        else:
            for name in ("matplotlib", "matplotlib.figure"):
                patch.setitem(sys.modules, name, None)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def device():
    """Where the numbers of a kernel are tested: the GPU, if there is one, else the CPU. `pytest -m device` runs the tests that
    ask for it, and so proves the kernels of a machine."""
    import torch
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def full_precision():
    """Whatever a run in an earlier test has set: on a GPU, products of fp32 in TF32 have three digits, and sums of bf16 may be
    rounded on the way."""
    if torch := sys.modules.get("torch"):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@pytest.fixture
def large_device(device):
    """A GPU with 40 GB, for tensors of more than 2^31 elements."""
    import torch
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 40e9:
        pytest.skip("needs a GPU with 40 GB")
    yield device
    torch.cuda.empty_cache()


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # pytest-xdist would begin with the files that have the most tests, slow or not


def pytest_collection_modifyitems(config, items):
    """Where processes share the tests file by file (runs/test.sh), begin with the files that have the most slow ones: or the last
    file may be a long one, with all processes but one waiting for it."""
    if hasattr(config, "workerinput"):
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("device")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["NANOCHAT_BASE_DIR"], ignore_errors=True)
