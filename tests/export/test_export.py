"""`scripts.export`: files of runs, runs of files, runs of the public nanochat's checkpoints; and what is refused."""

import json
import os
import pickle
import shutil

import pytest
import tiktoken
import torch
from safetensors import safe_open

import processes
from nanochat.checkpoint_manager import load_checkpoint, load_model
from nanochat.common import UserError
from nanochat.export.hf import hf_weights
from nanochat.export.public_nanochat import read_moments, read_public
from nanochat.export.public_tokenizer import pickled_state, read_public_tokenizer
from nanochat.export.single_file import read_file
from nanochat.export.trained import read_run
from nanochat.features import FEATURES
from nanochat.tokenizer import get_tokenizer
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from scripts.export import main

STEPS = ["--num-iterations=4", "--save-every=2", "--dtype=float32"]


def train(base, tag, *flags):
    config = parse_config(FEATURES, processes.tiny_flags(base, tag, *STEPS, *flags))
    return processes.trained(build_run(config)).plan.run_dir


@pytest.fixture(scope="module")
def run_dir(base):
    """A run of four steps, with a checkpoint at the second."""
    return train(base, "original")


def same_tensors(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name].float(), b[name].float()) for name in a)


# ---- one file

def test_a_file_becomes_a_run_again(run_dir, tmp_path, capsys):
    path = tmp_path / "my weights.safetensors"
    main(["--to", "safetensors", "--out", str(path), "--model-tag=original", "--step=2"])
    weights, _, state = load_checkpoint(run_dir, 2)
    with safe_open(path, framework="pt") as file:  # as any other program reads it
        metadata = file.metadata()
        same_tensors(weights, {name: file.get_tensor(name) for name in file.keys()})
    assert metadata["source_run"] == "original" and metadata["step"] == "2"
    assert json.loads(metadata["model_config"]) == state["model_config"]
    assert str(path.parent) not in str(metadata) and str(run_dir.parent) not in str(metadata)  # no places on this machine
    main(["--from", "safetensors", str(path), "--model-tag=again"])
    assert "--resume-from-step=latest" in capsys.readouterr().out
    model, tokenizer, state = load_model("base", torch.device("cpu"), "eval", "again", dtype="float32")
    same_tensors(weights, model.state_dict())
    assert state["step"] == 2 and tokenizer.fingerprint() == get_tokenizer(run_dir / "tokenizer").fingerprint()
    with pytest.raises(UserError, match="again is there already.*--model-tag"):
        main(["--from", "safetensors", str(path), "--model-tag=again"])


@pytest.mark.parametrize("content, words", [(b"", "cannot be read"), (b"x" * 100, "cannot be read")])
def test_a_damaged_file_is_named(tmp_path, content, words):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"w.safetensors {words}"):
        read_file(path)


def test_hf_weights_have_no_padding_and_one_dtype(run_dir):
    trained = read_run("original", None)
    weights = hf_weights(trained, torch.bfloat16)
    assert trained.step == 4 and trained.val_bpb == json.loads((run_dir / "result.json").read_text())["val_bpb"]
    assert trained.weights["lm_head.weight"].size(0) == 320 and weights["lm_head.weight"].size(0) == trained.shape.vocab_size
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


# ---- the public nanochat

def write_public(folder, run_dir, step, ranks=1):
    """A checkpoint as the public nanochat writes it, of one of ours: its names, its order of parameters, its pickles."""
    folder.mkdir(parents=True, exist_ok=True)
    weights, moments, state = load_checkpoint(run_dir, step)
    names = {name: {"smear_gate": "smear_gate.weight"}.get(name, name) for name in weights}
    torch.save({names[name]: tensor for name, tensor in weights.items()}, folder / f"model_{step:06d}.pt")
    flags = {name: value for name, value in state["user_config"].items() if name not in ("data", "dtype", "compile")}
    config = {name: value for name, value in state["model_config"].items() if name != "short_conv"}
    meta = {"step": step, "val_bpb": 1.5, "model_config": config, "user_config": flags | {"run": "dummy"},
            "total_batch_size": 128, "loop_state": {"total_training_time": 12.0, "min_val_bpb": 1.4}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    blocks = [f"transformer.h.{i}.{part}.weight" for i in range(2)
              for part in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "attn.ve_gate", "mlp.c_fc", "mlp.c_proj")]
    matrices = [name for name in blocks if name in weights]
    adamw = [["lm_head.weight"], ["transformer.wte.weight"], ["value_embeds.1.weight"], ["resid_lambdas"], ["x0_lambdas"],
             ["smear_gate", "smear_lambda", "backout_lambda"]]
    muon = [[n for n in matrices if weights[n].shape == shape] for shape in sorted({weights[n].shape for n in matrices})]
    for rank in range(ranks):
        saved, groups, number = {}, [], 0
        for kind, group in [*(("adamw", g) for g in adamw), *(("muon", g) for g in muon)]:
            groups.append({"kind": kind, "lr": 0.1, "params": list(range(number, number + len(group)))})
            for i, name in enumerate(group):
                if kind == "adamw":
                    cut = weights[name].numel() >= 1024 and ranks > 1
                    saved[number] = {key: moments[f"{name}/{key}"].chunk(ranks)[rank] if cut else moments[f"{name}/{key}"]
                                     for key in ("exp_avg", "exp_avg_sq")} | {"step": int(moments[f"{name}/step"])}
                elif i == 0:
                    size = -(-len(group) // ranks)
                    stack = {key: torch.stack([moments[f"{n}/{key}"] for n in group]) for key in
                             ("momentum_buffer", "second_momentum")}
                    saved[number] = {("second_momentum_buffer" if key == "second_momentum" else key): torch.cat(
                        [t, torch.zeros(size * ranks - len(group), *t.shape[1:])])[rank * size:(rank + 1) * size].clone()
                        for key, t in stack.items()}
                number += 1
        torch.save({"state": saved, "param_groups": groups}, folder / f"optim_{step:06d}_rank{rank}.pt")
    tokenizer = get_tokenizer(run_dir / "tokenizer")
    encoding = tiktoken.Encoding("rustbpe", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks,
                                 special_tokens=tokenizer.special_tokens)
    (folder.parent.parent / "tokenizer").mkdir(exist_ok=True)
    (folder.parent.parent / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    return folder


@pytest.fixture(scope="module")
def public(run_dir, tmp_path_factory):
    return write_public(tmp_path_factory.mktemp("public") / "base_checkpoints" / "d2", run_dir, step=2)


@pytest.fixture
def copied(public, tmp_path):
    """A copy of the public checkpoint, to be changed."""
    shutil.copytree(public.parent.parent, tmp_path / "copy")
    return tmp_path / "copy" / "base_checkpoints" / "d2"


def test_a_public_checkpoint_goes_on_to_the_same_bits(base, run_dir, public, capsys):
    main(["--from", "nanochat", str(public), "--model-tag=imported"])
    assert "with the optimizer's moments" in capsys.readouterr().out
    imported = run_dir.parent / "imported"
    weights, moments, state = load_checkpoint(imported, 2)
    expected, expected_moments, _ = load_checkpoint(run_dir, 2)
    same_tensors(weights, expected)
    same_tensors(moments, expected_moments)
    assert state["val_bpb"] == 1.5 and state["clock"]["train"] == 12.0
    with pytest.raises(UserError, match="would not go on with the same run"):  # of the text nothing is known
        train(base, "imported", "--resume-from-step=latest")
    train(base, "imported", "--resume-from-step=latest", "--allow-change")
    same_tensors(load_checkpoint(imported, 4)[0], load_checkpoint(run_dir, 4)[0])


def test_moments_of_several_gpus_are_put_together(run_dir, tmp_path, capsys):
    shape, expected = read_run("original", 2).shape, load_checkpoint(run_dir, 2)[1]
    for ranks in (2, 3, 4):
        folder = tmp_path / f"of{ranks}" / "base_checkpoints" / "d2"
        if 320 % ranks == 0:
            same_tensors(read_moments(write_public(folder, run_dir, 2, ranks), 2, shape), expected)
    (folder / "optim_000002_rank3.pt").unlink()
    assert read_moments(folder, 2, shape) == {} and "file of a GPU is missing" in capsys.readouterr().out


def test_other_architectures_are_refused_by_their_tensors(copied):
    path = copied / "model_000002.pt"
    weights = torch.load(path, weights_only=True)
    older = {name: t for name, t in weights.items() if not name.startswith(("smear", "backout"))}
    torch.save(older | {"_orig_mod.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="lacks backout_lambda, smear_gate, smear_lambda; it has the unknown extra.weight"):
        read_public(copied, None, None)
    torch.save(weights | {"lm_head.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(UserError, match="another size of lm_head.weight"):
        read_public(copied, None, None)


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["NANOCHAT_BASE_DIR"] + "/evil",)


def test_no_pickled_code_is_run(copied, base):
    tokenizer = copied.parent.parent / "tokenizer" / "tokenizer.pkl"
    for content in (pickle.dumps(Evil()), pickle.dumps({"pat_str": Evil()}), pickle.dumps("gpt2"), b"", b"\x80\x04N.",
                    tokenizer.read_bytes()[:-9], b"cos\nsystem\n(S'true'\ntR."):
        tokenizer.write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.pkl is not the pickle of a tiktoken.Encoding.*--tokenizer"):
            read_public(copied, None, None)
    torch.save({"lm_head.weight": Evil()}, copied / "model_000002.pt")
    with pytest.raises(UserError, match="model_000002.pt cannot be read as tensors"):
        read_public(copied, None, None)
    assert not (base / "evil").exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_pickled_tokenizer_is_read_as_data(run_dir, tmp_path, protocol):
    ours = get_tokenizer(run_dir / "tokenizer")
    encoding = tiktoken.Encoding("x", pat_str=ours.pattern, mergeable_ranks=ours.ranks | {b"long" * 99: 291},
                                 special_tokens={name: rank + 1 for name, rank in ours.special_tokens.items()})
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding, protocol))
    read = read_public_tokenizer(tmp_path / "tokenizer.pkl")
    assert read.ranks == encoding._mergeable_ranks and read.special_tokens == encoding._special_tokens
    assert read("long" * 99) == [291] and pickled_state(pickle.dumps(encoding, protocol))["name"] == "x"


def test_a_tokenizer_of_ours_can_take_its_place(copied, run_dir):
    shutil.rmtree(copied.parent.parent / "tokenizer")
    with pytest.raises(UserError, match="no tokenizer.json of ours and no tokenizer.pkl"):
        read_public(copied, None, None)
    for place in (run_dir / "tokenizer", run_dir / "tokenizer" / "tokenizer.json"):
        assert read_public(copied, 2, place).tokenizer.get_vocab_size() == 300


def test_what_is_missing_or_empty_is_named(copied, tmp_path):
    with pytest.raises(UserError, match="meta_000007.json"):
        read_public(copied, 7, None)
    (copied / "meta_000002.json").write_text("{}")
    with pytest.raises(UserError, match="does not say what its model is like"):
        read_public(copied, None, None)
    (copied / "model_000002.pt").write_bytes(b"")
    with pytest.raises(UserError, match="model_000002.pt cannot be read"):
        read_public(copied, None, None)
    for folder, words in ((tmp_path / "nowhere", "is no folder"), (tmp_path, "no model_<step>.pt")):
        with pytest.raises(UserError, match=words):
            read_public(folder, None, None)


# ---- the command line

@pytest.mark.parametrize("flags, words", [
    ("", "--to FORMAT"),
    ("--to gguf --out x", "value embeddings"),
    ("--to hf", "--out"),
    ("--to hf --out x --from nanochat y --model-tag z", "--to FORMAT"),
    ("--to safetensors --out {tmp}/there", "--overwrite"),
    ("--to safetensors --out {tmp}", "is a folder"),
    ("--to safetensors --out {tmp}/x --dtype bfloat16", "--dtype would do nothing"),
    ("--to hf --out {tmp}/there", "is a file"),
    ("--from nanochat", "a kind"),
    ("--from llama x --model-tag y", "a kind"),
    ("--from nanochat x", "--model-tag"),
    ("--from nanochat x --model-tag a/b", "--model-tag"),
    ("--from safetensors x --model-tag y --step 3", "--step"),
])
def test_wrong_command_lines(base, tmp_path, flags, words):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UserError, match=words):
        main(flags.format(tmp=tmp_path).split())
    assert (tmp_path / "there").read_text() == "mine"
