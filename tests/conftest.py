"""What every test shares: a base directory of its own, few threads, no deadlines."""

import os
import shutil
import tempfile

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported; threads only slow tiny models down
os.environ["NANOCHAT_BASE_DIR"] = tempfile.mkdtemp(prefix="nanochat-tests-")  # for the scripts that tests start, too

settings.register_profile("nanochat", deadline=None)  # the first example pays for imports and compilation
settings.load_profile("nanochat")


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["NANOCHAT_BASE_DIR"], ignore_errors=True)
