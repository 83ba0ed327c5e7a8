"""The rules of the house, read from the source: who may import whom, and what is loaded before flags are checked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the ground up: each may import what stands below it, and itself. `nanochat` is the modules that lie flat, under the names
# of the public nanochat.
LAYERS = ("nanochat.common", "nanochat.cli", "nanochat.recipe", "nanochat.runtime", "nanochat.data", "nanochat.kernels",
          "nanochat", "nanochat.features", "nanochat.training", "nanochat.export", "nanochat.benchmarks", "nanochat.lab",
          "scripts")
TORCH_FREE = ("nanochat.common", "nanochat.cli", "nanochat.recipe", "nanochat.data", "nanochat.lab")


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


def module_of(path: Path) -> str:
    """The dotted name of a file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> str | None:
    """The layer that a dotted name belongs to; None for what is not of this house."""
    found = [layer for layer in LAYERS if module == layer or module.startswith(layer + ".")]
    return max(found, key=len, default=None)


library = sorted(p for folder in ("nanochat", "scripts") for p in (ROOT / folder).rglob("*.py"))
by_name = pytest.mark.parametrize("path", library, ids=lambda p: str(p.relative_to(ROOT)))


@by_name
def test_a_layer_imports_only_those_below_it(path):
    own = layer_of(module_of(path))
    for name in imports(path):
        assert not uses({name}, "attempts") and not uses({name}, "dev") and not uses({name}, "tests")
        layer = layer_of(name)
        if layer and name != "nanochat":  # `from nanochat import x` counts as nanochat.x too
            assert LAYERS.index(layer) <= LAYERS.index(own), f"{own} is below {name}"


def test_every_folder_is_a_layer():
    """A folder that is new finds its place in LAYERS, or this fails: `nanochat` would take it for one of the flat modules."""
    folders = {module_of(p.parent) for p in library} - {"nanochat", "scripts"}
    assert all(layer_of(folder) not in ("nanochat", None) for folder in folders), folders


@by_name
def test_torch_is_imported_above_the_arithmetic_only(path):
    if layer_of(module_of(path)) in TORCH_FREE:
        assert not uses(imports(path), "torch")


@by_name
def test_one_module_knows_collectives(path):
    if module_of(path) not in ("nanochat.runtime.distributed", "nanochat.runtime.launch"):
        assert not uses(imports(path), "torch.distributed")


def calls(path: Path) -> set[str]:
    """What a file calls, by its last two names: `scaler.step` of `self.scaler.step(...)`, or `print`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            names.add(".".join(ast.unparse(node.func).split(".")[-2:]))
    return names


@by_name
def test_one_module_updates_weights_and_one_writes_records(path):
    """Of a training run: attempts and their tests have small loops of their own."""
    module, called = module_of(path), calls(path)
    if layer_of(module) in ("nanochat.training", "nanochat.features") and module != "nanochat.training.step":
        assert not called & {"optimizer.step", "scaler.step"}
    if layer_of(module) and module != "nanochat.training.recorder":
        assert not called & {"MetricsFile", "write_result", "metrics.write"}


@by_name
def test_features_are_apart_and_load_torch_late(path):
    if layer_of(module_of(path)) == "nanochat.features" and path.stem not in ("__init__", "base"):
        others = {p.stem for p in (ROOT / "nanochat/features").glob("*.py")} - {path.stem, "__init__", "base"}
        assert not any(uses(imports(path), f"nanochat.features.{other}") for other in others)
        assert not uses(imports(path, top_level_only=True), "torch"), "flags are parsed before torch is loaded"


@pytest.mark.parametrize("path", library, ids=lambda p: str(p.relative_to(ROOT)))
def test_optional_packages_are_imported_where_they_are_used(path):
    if path.parent.name == "hf_files":  # transformers imports it
        return
    optional = ("wandb", "tensorboard", "trackio", "datasets", "pyarrow", "matplotlib", "scipy", "rich", "yaml", "tokenizers",
                "transformers", "zstandard")
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
