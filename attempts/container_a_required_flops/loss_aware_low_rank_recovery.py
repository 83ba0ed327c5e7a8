"""Does training repair low-rank layers? Factors from an SVD, then steps on the training loss; quality over steps and rank.

    python attempts/container_a_required_flops/loss_aware_low_rank_recovery.py --preset smoke --json-out a2.json

Every block matrix W becomes A B, made by SVD, by the data-aware optimum (approximations.py) or at random, and only A and
B are trained. A dense copy of the same model trains its block matrices for the same steps on the same batches: what any
training improves is not recovery, so the loss is compared with that of the dense copy. The steps of all are interleaved, so
the speed of a step is measured too.

The verdict depends on the learning rates. Those of the presets `smoke` and `default` were the best of 3e-4, 1e-3 and 3e-3 for
the dense copy, and a compromise for the factors, whose best rate differs by rank and start. `gpu` has those of `default`,
which were not tried there. For another model try several.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

from measure import Quality, RankFlags, rank_of
from nanochat.benchmarks.attempt import Attempt
from nanochat.benchmarks.interleaved_training import Training, train_interleaved
from nanochat.benchmarks.trained_model import block_matrices, second_moments
from nanochat.cli.flags import flag
from nanochat.cli.program import cli
from nanochat.common import format_table

SCRIPT = "attempts/container_a_required_flops/loss_aware_low_rank_recovery.py"
INITS = ("svd", "data_aware", "random")
PRESETS = {
    "smoke": dict(batches=4, val_tokens=8192, shares=[0.25], steps=30, lr=3e-3, dense_lr=1e-3),
    "default": dict(batches=16, val_tokens=16384, shares=[0.125, 0.25, 0.5], steps=30, lr=1e-3, dense_lr=3e-4),
    "gpu": dict(batches=32, val_tokens=2**20, shares=[0.0625, 0.125, 0.25, 0.5], steps=500, lr=1e-3, dense_lr=3e-4),
}


@dataclass
class BenchFlags(RankFlags):
    """The attempt; the preset gives the sizes that are not given"""
    init: list[str] = flag(["svd", "data_aware"], "how the factors are initialized", choices=INITS)
    steps: int | None = flag(None, "training steps of every variant", low=2)
    lr: float | None = flag(None, "initial learning rate of AdamW for the factors; it falls linearly to 0", low=0)
    dense_lr: float | None = flag(None, "the same for the dense copy", low=0)

    presets = PRESETS


def factors(init: str, weight, moments, rank: int, seed: int) -> tuple:
    """A (out, rank) and B (rank, in). Random ones are normal, scaled so that the norm of A B is that of the matrix."""
    import torch

    from approximations import fit
    if init != "random":
        return fit(init, weight, moments, rank)
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((len(weight), rank), (rank, weight.size(1))))
    scale = (weight.norm() / (a @ b).norm()).sqrt()
    return scale * a, scale * b


def make_runs(trained, flags: BenchFlags) -> dict[str, tuple[Training, str | None, float | None]]:
    """The runs to train: name -> (run, init, share), the dense copy first."""
    from approximations import LowRank
    named = block_matrices(trained.model)
    moments = second_moments(trained.model, named, trained.train_batches(flags.batches, flags.seed))
    weights = {name: layer.weight.detach().cpu() for name, layer in named.items()}
    model = trained.variant(lambda *_: None)
    runs = {"dense": (Training(model, [layer.weight for layer in block_matrices(model).values()], flags.dense_lr), None, None)}
    for share in sorted(flags.shares):
        for init in flags.init:
            model = trained.variant(lambda name, _, init=init, share=share: LowRank(*factors(
                init, weights[name], moments[name], rank_of(share, weights[name].shape), flags.seed)))
            parameters = [p for layer in model.modules() if isinstance(layer, LowRank) for p in layer.parameters()]
            runs[f"{init} share {share:g}"] = Training(model, parameters, flags.lr), init, share
    return runs


def draw(figure, result: dict) -> None:
    curves, ranks = figure.subplots(1, 2)
    for name, trace in result["traces"].items():
        curves.plot(*zip(*trace["bpb"], strict=True), marker="o", markersize=3, label=name)
    curves.axhline(result["config"]["bpb_dense"], color="black", linewidth=0.8)
    curves.set(title="validation bits per byte over recovery steps", xlabel="step")
    rows = [row for row in result["results"].values() if row["share"] is not None]
    for init in dict.fromkeys(row["init"] for row in rows):
        mine = [row for row in rows if row["init"] == init]
        for field, style, when in (("rise_vs_dense_pct", "o-", "recovered"), ("rise_before_pct", ".:", "before")):
            ranks.plot([r["share"] for r in mine], [r[field] for r in mine], style, label=f"{init}, {when}")
    ranks.set(title="bits per byte: worse by %", xlabel="rank / smaller side")
    for axes in (curves, ranks):
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)


def main(argv: list[str] | None = None) -> int:
    attempt = Attempt(SCRIPT, BenchFlags, argv, __doc__)
    flags, trained = attempt.flags, attempt.open_model()
    quality, chosen = Quality(trained, flags.val_tokens), make_runs(trained, flags)
    runs = {name: run for name, (run, _, _) in chosen.items()}
    train_interleaved(trained, runs, flags.steps, flags.seed + 1, quality.batches)

    dense, results = runs["dense"], {}
    size = {name: sum(p.numel() for p in run.parameters) for name, run in runs.items()}
    for name, (run, init, share) in chosen.items():
        before = run.curve[0][1]
        results[name] = {
            "init": init, "share": share, "flops_ratio": size[name] / size["dense"], "bpb_before": before, "bpb_after": run.bpb,
            "rise_before_pct": quality.rise_pct(before), "train_loss_end": run.losses[-1], **run.compared_with(dense)}
    print(format_table([{"variant": name, "FLOPs": r["flops_ratio"], "bpb before": r["bpb_before"], "after": r["bpb_after"],
                         "worse than dense by %": r["rise_vs_dense_pct"], "x step": r["speedup_step"]["median"]}
                        for name, r in results.items()]))
    traces = {name: {"bpb": run.curve, "train_loss": run.losses} for name, run in runs.items()}
    attempt.save(results, draw, traces, bpb_dense=quality.dense)
    return 0


if __name__ == "__main__":
    cli(main)
