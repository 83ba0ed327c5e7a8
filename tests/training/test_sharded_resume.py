"""A run goes on with another number of ranks than the one that saved it, with real processes."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.torch import load_file

from nanochat.checkpoint_manager import load_checkpoint
from nanochat.checkpoint_names import optimizer_files
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.records import read_metrics
from processes import python_m, tiny_flags, trained
from scripts.export import main as export

FLAGS = "--num-iterations=9 --save-every=3 --dtype=float32 --total-batch-size=256 --head-dim=32 --aspect-ratio=32".split()


def train(base, tag, ranks, *extra):
    """Train on so many ranks; the losses of all steps."""
    flags = tiny_flags(base, tag, *FLAGS, *extra)
    if ranks == 1:
        trained(build_run(parse_config(FEATURES, flags)))
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with ThreadPoolExecutor(ranks) as pool:
            done = [pool.submit(python_m, "scripts.base_train", *flags, RANK=str(rank), LOCAL_RANK=str(rank),
                                WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) for rank in range(ranks)]
        assert all(one.result().returncode == 0 for one in done), [one.result().stderr[-2000:] for one in done]
    return [row["loss"] for row in read_metrics(base / "base_checkpoints" / tag / "metrics.jsonl") if row["loss"] is not None]


def resumed(base, source, step, ranks):
    """The losses of a copy of the run `source`, resumed at `step` on so many ranks."""
    tag = f"on-{ranks}"
    folder = base / "base_checkpoints" / tag
    shutil.copytree(base / "base_checkpoints" / source, folder)
    for later in folder.glob("step_*"):
        if int(later.name[5:]) > step:
            shutil.rmtree(later)
    losses = train(base, tag, ranks, "--resume-from-step=latest")
    assert all(len(optimizer_files(folder / f"step_{later:06d}")) == ranks for later in range(step + 3, 10, 3))
    return losses


@pytest.mark.slow
def test_saved_on_one_resumed_on_two_and_from_there_on_four_and_on_one(base):
    """The first checkpoint is one file of optimizer state, the next a shard of each of two ranks, with rows of tables."""
    losses = train(base, "one", 1)
    assert resumed(base, "one", 3, ranks=2) == pytest.approx(losses, abs=1e-4)
    keys = [key for path in optimizer_files(base / "base_checkpoints/on-2/step_000006") for key in load_file(path)]
    assert any("[" in key for key in keys) and any("[" not in key for key in keys)
    _, moments, _ = load_checkpoint(base / "base_checkpoints/on-2", 6)
    export(["--to=checkpoint", f"--out={base / 'whole'}", "--model-tag=on-2", "--step=6"])
    merged = load_checkpoint(base / "whole", 6)[1]
    assert len(optimizer_files(base / "whole/step_000006")) == 1 and all(merged[key].equal(moments[key]) for key in moments)
    with pytest.raises(UserError, match="is there already"):
        export(["--to=checkpoint", f"--out={base / 'whole'}", "--model-tag=on-2"])
    assert moments.keys() == merged.keys() == load_checkpoint(base / "base_checkpoints/one", 6)[1].keys()
    for ranks in (4, 1):
        assert resumed(base, "on-2", 6, ranks) == pytest.approx(losses, abs=1e-4)
    assert sorted(path.name for path in (base / "base_checkpoints").glob(".*")) == []
