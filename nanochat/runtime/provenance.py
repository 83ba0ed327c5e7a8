"""Where a result comes from: the commit of the source tree, and a fingerprint of the source itself. No torch."""

import functools
import hashlib
import subprocess
from pathlib import Path

PACKAGES = ("nanochat", "scripts")  # what a run executes, side by side in a checkout and where the package is installed
SOURCE_SUFFIXES = (".py", ".cpp", ".h")


def git_state() -> tuple[str | None, bool | None]:
    """Commit of the source tree and whether it has uncommitted changes; None where git cannot say."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True, check=True).stdout
    try:
        return git("rev-parse", "HEAD").strip(), bool(git("status", "--porcelain").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


@functools.cache
def source_fingerprint() -> str:
    """SHA-256 (hex) of this process's source as it is at the first call: names and content of all files of code."""
    return fingerprint_of(Path(__file__).parents[2])


def fingerprint_of(root: Path) -> str:
    """`source_fingerprint` of the packages in the folder `root`. No git is needed; other files there do not count."""
    digest = hashlib.sha256()
    paths = [path for package in PACKAGES for path in (root / package).rglob("*")
             if path.suffix in SOURCE_SUFFIXES and path.is_file()]
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
