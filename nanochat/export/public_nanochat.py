"""Checkpoints of the public nanochat (github.com/karpathy/nanochat), read as data: `torch.load(weights_only=True)` and JSON.

    model_000650.pt         the weights, by name
    meta_000650.json        step, model_config, user_config (its flags), val_bpb, total_batch_size, loop_state
    optim_000650_rank0.pt   torch's optimizer state, one file for each GPU that trained, and none may be missing

The architecture here is that of the public nanochat from 14 March 2026 (commit a825e63) to 3 July 2026 (92d63d4, the newest that
was compared). Between these nothing changed that the weights depend on. Earlier ones lack tensors, and are refused by their
names. The only tensor with another name is smear_gate, a layer there and a parameter here.
"""

import re
from pathlib import Path

import torch

from nanochat.checkpoint_manager import empty_model, saved_shape
from nanochat.common import UserError, print0
from nanochat.export.public_tokenizer import read_public_tokenizer
from nanochat.export.trained import RECIPE, Trained
from nanochat.recipe.shape import GPTConfig
from nanochat.runtime.files import read_json
from nanochat.tokenizer import FILE_NAME, Tokenizer

VERSIONS = "the public nanochat from 14 March 2026 (commit a825e63) to 3 July 2026 (92d63d4)"
PICKLED = "tokenizer.pkl"
RENAMED = {"smear_gate.weight": "smear_gate"}
CONFIG = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")  # in meta_, all of them
COMPILED = "_orig_mod."  # in front of the names that older versions saved
MOST_NAMED = 8  # tensors, in a message
# Keys of the optimizer's state there and here: of an AdamW parameter, and of a group of matrices, stacked, at its first one
ADAMW = {"step": "step", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
MUON = {"momentum_buffer": "momentum_buffer", "second_momentum_buffer": "second_momentum"}


def read_public(folder: Path, step: int | None, tokenizer_path: Path | None) -> Trained:
    """The model of a public checkpoint; by default of the last step in the folder.

    tokenizer_path: of ours or theirs, a file or its folder; by default one in the folder, or in the base directory around it.
    Raises: UserError where something is missing, damaged, or of another version of the architecture.
    """
    step = _last_step(folder) if step is None else step
    weights_file, meta_file = folder / f"model_{step:06d}.pt", folder / f"meta_{step:06d}.json"
    try:
        meta = read_json(meta_file)
    except (OSError, ValueError) as e:
        raise UserError(f"{meta_file}: {e}. Each step of the public nanochat has a model_ and a meta_ file.") from None
    weights = {RENAMED.get(name := raw.removeprefix(COMPILED), name): tensor for raw, tensor in _load(weights_file).items()}
    shape = _shape(meta, weights, weights_file)
    flags, loop = meta.get("user_config", {}), meta.get("loop_state", {})
    flags = {name: value for name, value in flags.items() if name in RECIPE} | {
        "data": "unknown", "depth": shape.n_layer, "head_dim": shape.head_dim, "max_seq_len": shape.sequence_len,
        "window_pattern": shape.window_pattern}
    if "aspect_ratio" not in flags:
        flags["aspect_ratio"] = shape.n_embd // shape.n_layer
    trained = Trained(
        name=folder.name, step=step, shape=shape, weights=weights, tokenizer=find_tokenizer(folder, tokenizer_path), flags=flags,
        val_bpb=meta.get("val_bpb"), tokens_per_step=meta.get("total_batch_size"),
        train_seconds=loop.get("total_training_time", 0.0))
    trained.moments = read_moments(folder, step, shape)
    return trained


def find_tokenizer(folder: Path, given: Path | None) -> Tokenizer:
    """The tokenizer at `given`, a file or its folder, ours or a pickle; else one near the checkpoint. Raises: UserError."""
    near = [folder, folder / "tokenizer", folder.parent.parent / "tokenizer"]
    places = [given if given.is_dir() else given.parent] if given else near
    names = [given.name] if given and not given.is_dir() else [FILE_NAME, PICKLED]
    for place in places:
        for name in names:
            if (place / name).is_file():
                print0(f"tokenizer: {place / name}" + (", whose data is read without unpickling it" if name == PICKLED else ""))
                return read_public_tokenizer(place / name) if name.endswith(".pkl") else Tokenizer.from_directory(place)
    raise UserError(f"no {FILE_NAME} of ours and no {PICKLED} of the public nanochat in {', '.join(map(str, places))}. "
                    "Say where it is with --tokenizer.")


def read_moments(folder: Path, step: int, shape: GPTConfig) -> dict:
    """The optimizer's moments as `MuonAdamW.named_state` has them; {}, with a line, where they are not there or do not fit."""
    prefix = f"optim_{step:06d}_rank"
    files = sorted(folder.glob(f"{prefix}*.pt"), key=lambda p: (len(p.name), p.name))  # by rank
    if not files:
        print0(f"no {prefix}0.pt: training would go on with new moments")
        return {}
    try:
        return _moments([_load(file) for file in files], shape)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as e:
        print0(f"the moments in {prefix}*.pt are not those of this model, or the file of a GPU is missing ({type(e).__name__}: "
               f"{str(e)[:100]}): training would go on with new ones")
        return {}


def _moments(saved: list[dict], shape: GPTConfig) -> dict:
    """saved: the optimizer's state_dict of each rank. Groups and the parameters in them come in the order of ours; large AdamW
    moments are cut by rows over the ranks, Muon's stacks by matrices, with padding at the end."""
    ours = empty_model(shape, torch.float32).setup_optimizer()
    groups = saved[0]["param_groups"]
    if [(group["kind"], len(group["params"])) for group in groups] != [(g["kind"], len(g["params"])) for g in ours.param_groups]:
        raise ValueError("other groups of parameters")
    moments = {}
    for group, mine in zip(groups, ours.param_groups, strict=True):
        names = [ours.names[p] for p in mine["params"]]
        if group["kind"] == "muon":
            states = [rank["state"][group["params"][0]] for rank in saved]
            for theirs, key in MUON.items():
                stack = torch.cat([state[theirs] for state in states])
                for name, tensor in zip(names, stack[:len(names)], strict=True):
                    moments[f"{name}/{key}"] = tensor
            continue
        for name, p, number in zip(names, mine["params"], group["params"], strict=True):
            states = [rank["state"][number] for rank in saved]
            for theirs, key in ADAMW.items():
                values = [torch.as_tensor(state[theirs]) for state in states]
                whole = key == "step" or values[0].shape == p.shape
                moments[f"{name}/{key}"] = values[0] if whole else torch.cat(values)
    ours.load_named_state(moments)  # on the device meta: nothing but the shapes is compared
    return moments


def _last_step(folder: Path) -> int:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder. Name the one with model_<step>.pt in it.")
    steps = [int(match[1]) for p in folder.iterdir() if (match := re.fullmatch(r"model_(\d+)\.pt", p.name))]
    if not steps:
        raise UserError(f"no model_<step>.pt in {folder}: it is no checkpoint folder of the public nanochat.")
    return max(steps)


def _load(path: Path) -> dict:
    """A dict that torch.save has written. Nothing but tensors and plain data is read. Raises: UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except Exception as e:  # a damaged file, or one that holds more than data, may raise anything
        said = (str(e).strip() or type(e).__name__).splitlines()[0][:150]
        raise UserError(f"{path} cannot be read as tensors, and nothing else is read from it ({said}).") from None


def _shape(meta: dict, weights: dict, path: Path) -> GPTConfig:
    """The shape of the model. Raises: UserError that names the tensors where it is of another architecture."""
    config = meta.get("model_config")
    missing = [name for name in CONFIG if name not in (config or {})]
    shape = saved_shape(meta if config else {}, path)
    if shape.n_layer > len(weights):
        raise UserError(f"{path} has {len(weights)} tensors, and its meta_ file names {shape.n_layer} layers.")
    own = {name: tensor.shape for name, tensor in empty_model(shape, torch.float32).state_dict().items()}
    trouble = [f"it {verb} {_named(names)}" for verb, names in (
        ("lacks", own.keys() - weights.keys()), ("has the unknown", weights.keys() - own.keys()),
        ("has another size of", {n for n in own.keys() & weights.keys() if own[n] != getattr(weights[n], "shape", None)}))
        if names]
    if missing:
        trouble.append(f"its meta_ file does not give {', '.join(missing)}")
    if trouble:
        raise UserError(f"{path} is of another architecture than {VERSIONS}, which is the one here: {'; '.join(trouble)}.")
    return shape


def _named(names: set[str]) -> str:
    shown = sorted(names)[:MOST_NAMED]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more tensors" if len(names) > len(shown) else "")
