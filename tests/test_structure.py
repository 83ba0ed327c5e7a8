"""The rules of the house, read from the source: who may import whom, and what is loaded before flags are checked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH_FREE = {"common", "flags", "config", "shape", "horizon", "schedules", "suffix_policy", "explain", "planner", "lock",
              "interruption", "paths", "output", "launch_environment", "program", "run_folder", "reading", "files", "split",
              "hub", "metrics"}
PARTS = {"gpt", "optim", "fp8", "losses", "flash_attention", "native_attention", "norms", "tokenizer", "dataset",
         "dataloader", "sources", "shape", "files", "split", "reading", "hub"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules that a file imports; `from nanochat import x` counts as nanochat.x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(found: set[str], package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in found)


library = sorted((ROOT / "nanochat").rglob("*.py"))
by_name = pytest.mark.parametrize("path", library, ids=lambda p: str(p.relative_to(ROOT)))


@by_name
def test_the_library_imports_neither_scripts_nor_attempts_nor_dev(path):
    assert not any(uses(imports(path), outside) for outside in ("scripts", "attempts", "dev", "tests"))


@by_name
def test_who_may_import_whom(path):
    found, name = imports(path), path.stem
    if name in TORCH_FREE or "lab" in path.parts:
        assert not uses(found, "torch")
    if name in PARTS and "features" not in path.parts:
        for owner in ("config", "features", "metrics", "train", "setup"):
            assert not uses(found, f"nanochat.{owner}"), owner
    if "features" in path.parts and name != "__init__":
        others = {p.stem for p in (ROOT / "nanochat/features").glob("*.py")} - {name, "__init__"}
        assert not any(uses(found, f"nanochat.features.{other}") for other in others)
        assert not uses(found, "nanochat.train") and not uses(found, "nanochat.setup")
        assert not uses(imports(path, top_level_only=True), "torch"), "flags are parsed before torch is loaded"


@pytest.mark.parametrize("path", sorted([*library, *(ROOT / "scripts").glob("*.py")]), ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    optional = ("wandb", "tensorboard", "trackio", "datasets", "pyarrow", "matplotlib", "scipy", "rich", "yaml", "tokenizers",
                "zstandard")
    assert not any(uses(imports(path, top_level_only=True), package) for package in optional)


def test_every_module_can_be_imported():
    """A workflow does the same where only the packages that training needs are installed."""
    done = subprocess.run([sys.executable, "-m", "dev.import_all"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "modules can be imported" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("script", sorted(p.stem for p in (ROOT / "scripts").glob("*.py")))
def test_a_wrong_flag_is_answered_before_torch_is_loaded(script):
    code = f"""import sys, runpy
sys.argv = ["x", "--no-such-flag"]
try: runpy.run_module("scripts.{script}", run_name="__main__")
except SystemExit as e: sys.exit(9 if "torch" in sys.modules else e.code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "--no-such-flag" in done.stderr and "Traceback" not in done.stderr
