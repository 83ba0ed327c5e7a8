"""Where a result comes from: the commit of the source tree. No torch."""

import subprocess
from pathlib import Path


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether it has uncommitted changes; None where git cannot say."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None
