"""What every test shares: a base directory of its own, few threads, no deadlines."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; threads only slow tiny models down
os.environ.pop("NANOCHAT_CWD", None)  # of runs/test.sh, which has been started from anywhere
os.environ["NANOCHAT_BASE_DIR"] = tempfile.mkdtemp(prefix="nanochat-tests-")  # for the scripts that tests start, too

settings.register_profile("nanochat", deadline=None)  # the first example pays for imports and compilation
settings.load_profile("nanochat")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base directory of the module's own, with a little text in base/text: some files of the library."""
    base = tmp_path_factory.mktemp("base")
    (base / "text").mkdir()
    for name in ("gpt", "optim", "dataset", "tokenizer", "engine"):
        shutil.copy(Path(__file__).parent.parent / "nanochat" / f"{name}.py", base / "text")
    before, os.environ["NANOCHAT_BASE_DIR"] = os.environ["NANOCHAT_BASE_DIR"], str(base)
    yield base
    os.environ["NANOCHAT_BASE_DIR"] = before


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["NANOCHAT_BASE_DIR"], ignore_errors=True)
