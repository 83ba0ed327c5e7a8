"""Import every module of nanochat and scripts, but for those that exported models carry:   python -m dev.import_all

This must work with the packages of an installation without extras (`pip install .`), as optional ones are imported where they
are used. Exit status 1, with a list, where modules cannot be imported.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def modules() -> list[str]:
    paths = [path for folder in ("nanochat", "scripts") for path in (ROOT / folder).rglob("*.py")
             if path.parent.name != "hf_files"]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths)


def main() -> int:
    found, failed = modules(), {}
    for name in found:
        try:
            importlib.import_module(name)
        except Exception as e:  # any error of an import is what this looks for
            failed[name] = e
    for name, e in failed.items():
        print(f"{name}: {type(e).__name__}: {e}")
    print(f"{len(found) - len(failed)} of {len(found)} modules can be imported")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
