"""The JSON file that every bench and attempt writes, in one format (attempts/schema.json), with a picture beside it."""

import json
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from nanochat.common import resolve
from nanochat.runtime.files import write_atomic
from nanochat.runtime.provenance import git_state
from nanochat.training.records import finite

if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 1


def make_result(script: str, device: "torch.device | str", config: dict, results: dict, elapsed: float,
                traces: dict | None = None, argv: list[str] | None = None) -> dict:
    """The content of the file. device: its name is enough for a program that does not load torch; results: variant -> {field:
    value}; elapsed: seconds; argv: by default this program's flags."""
    if not isinstance(device, str):
        from nanochat.runtime.device import device_name
        device = device_name(device)
    return {"schema_version": SCHEMA_VERSION, "script": script, "argv": sys.argv[1:] if argv is None else argv,
            "git_commit": git_state()[0], "device": device, "torch_version": version("torch"), "config": config,
            "results": results, "traces": traces or {}, "elapsed_sec": elapsed}


def json_text(content: dict) -> str:
    """The text of the file: strict JSON, NaN and infinities as strings; a list of numbers, or a dict without others in it, is one
    line."""
    text = json.dumps(_strict(content), indent=1)
    return re.sub(r"[\[{][^][{}]*[]}]", lambda found: re.sub(r"\n *", " ", found[0]), text) + "\n"


def _strict(value):
    if isinstance(value, dict):
        return {name: _strict(v) for name, v in value.items()}
    return [_strict(v) for v in value] if isinstance(value, (list, tuple)) else finite(value)


def write_json(path: str | None, content: dict) -> None:
    """Write the file, in a folder that is made if it is missing; nothing without a path."""
    if not path:
        return
    target = resolve(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, json_text(content))
    print(f"json: {path}")


def save(path: str | None, content: dict, draw: Callable | None = None) -> None:
    """Write the file, and beside it, where matplotlib is installed, the picture that `draw(figure, content)` makes."""
    write_json(path, content)
    if not path or draw is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("plot left out: pip install matplotlib")
        return
    picture = resolve(path).with_suffix(".png")
    figure = Figure(figsize=(11, 4), layout="constrained")
    draw(figure, content)
    figure.savefig(picture, dpi=100)
    print(f"plot: {picture}")
