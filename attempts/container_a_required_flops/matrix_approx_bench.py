"""Do low-rank layers save time before they cost too much quality? Truncated SVD of every layer of a trained model, over ranks.

    python attempts/container_a_required_flops/matrix_approx_bench.py --preset smoke --json-out a1.json

For each kind of layer and each rank: the error of the matrix (measured, and by the theorem of Eckart and Young) and of the
layer's outputs on real text, the share of multiplications, and the speed measured on the same inputs. Then all block matrices
of the model are replaced at once, and the model is validated. The break-even rank is where the layer stops being faster:
out * in / (out + in) by counting, less in practice, as two thin products use a machine less well than one.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

from measure import Quality, RankFlags, mean, rank_of, time_layers, time_models
from nanochat.benchmarks.attempt import Attempt
from nanochat.benchmarks.trained_model import ModelFlags, block_matrices, inputs_of, kind_of, second_moments
from nanochat.cli.flags import flag
from nanochat.cli.program import cli
from nanochat.common import format_table

SCRIPT = "attempts/container_a_required_flops/matrix_approx_bench.py"
PRESETS = {
    "smoke": dict(batches=4, val_tokens=8192, repeats=5, shares=[0.125, 0.25, 0.5]),
    "default": dict(batches=16, val_tokens=16384, repeats=9, shares=[0.0625, 0.125, 0.25, 0.375, 0.5, 0.75]),
    "gpu": dict(batches=32, val_tokens=2**20, repeats=21, shares=[0.03125, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75]),
}


@dataclass
class BenchFlags(RankFlags):
    """The attempt; the preset gives the sizes that are not given"""
    repeats: int | None = flag(None, "timings of each variant, interleaved", low=2)
    ranks: list[int] = flag([], "ranks as numbers, instead of --shares", low=1)
    random: bool = flag(False, "matrices and inputs of normal numbers instead of the trained ones, whose spectra differ: "
                               "quality is not measured")

    presets = PRESETS

    def filled(self) -> "BenchFlags":
        flags = super().filled()
        return replace(flags, shares=[]) if flags.ranks else flags

    def validate(self) -> list[str]:
        both = ["--ranks and --shares exclude each other: give one of them"] if self.ranks and self.shares else []
        return super().validate() + both

    def ranks_for(self, shape: tuple[int, int]) -> list[int]:
        return sorted(set(self.ranks or (rank_of(share, shape) for share in self.shares)))


def shape_problems(flags: BenchFlags, model: ModelFlags) -> list[str]:
    """Ranks that the model's matrices cannot have."""
    if model.validate():
        return []
    shape = model.shape(flags.preset)
    smallest = min(shape.n_embd, shape.n_kv_head * shape.head_dim)
    return [f"--ranks {rank}: the smallest matrix of this model has rank {smallest}. Choose from 1 to {smallest}"
            for rank in flags.ranks if rank > smallest]


class Layer:
    """A matrix of the model: weight (out, in), some inputs x (N, in), the second moments of more inputs, and its SVD."""

    def __init__(self, weight, x, moments):
        import torch
        self.weight, self.x, self.moments = weight.detach().cpu().double(), x, moments
        self.svd = torch.linalg.svd(self.weight, full_matrices=False)

    def factors(self, rank: int) -> tuple:
        from approximations import truncated
        return truncated(*self.svd, rank)


def trained_layers(trained, flags: BenchFlags) -> dict[str, Layer]:
    named = block_matrices(trained.model)
    moments = second_moments(trained.model, named, trained.train_batches(flags.batches, flags.seed))
    inputs = inputs_of(trained.model, named, trained.train_batches(1, flags.seed + 1)[0][0])
    return {name: Layer(layer.weight, inputs[name], moments[name]) for name, layer in named.items()}


def random_layers(trained, flags: BenchFlags) -> dict[str, Layer]:
    """Normal matrices and inputs of the same shapes."""
    import torch
    generator, layers = torch.Generator().manual_seed(flags.seed), {}
    for name, layer in block_matrices(trained.model).items():
        x = torch.randn(trained.rows * trained.shape.sequence_len, layer.weight.size(1), generator=generator)
        layers[name] = Layer(torch.randn(layer.weight.shape, generator=generator), x.to(trained.device, trained.dtype),
                             x.T.double() @ x.double() / len(x))
    return layers


def errors(layers: list[Layer], rank: int) -> dict:
    """The errors of the layers of a kind at this rank, as means over them."""
    from approximations import output_error, svd_error, weight_error
    products = [a @ b for a, b in (layer.factors(rank) for layer in layers)]
    (out, features), pairs = layers[0].weight.shape, list(zip(layers, products, strict=True))
    output_errors = [output_error(layer.weight, product, layer.moments) for layer, product in pairs]
    return {"out": out, "in": features, "rank": rank, "share": rank / min(out, features),
            "flops_ratio": rank * (out + features) / (out * features),
            "weight_error": mean([weight_error(layer.weight, product) for layer, product in pairs]),
            "eckart_young": mean([svd_error(layer.svd.S, rank) for layer in layers]),
            "output_error": mean(output_errors), "output_error_worst": max(output_errors)}


def timings(layer: Layer, ranks: list[int], device, repeats: int) -> dict[int, dict]:
    """The speed of a layer at each rank, on its inputs."""
    import torch.nn.functional as F

    from approximations import low_rank
    variants = {rank: (low_rank, layer.factors(rank)) for rank in ranks}
    return time_layers({"dense": (F.linear, [layer.weight])} | variants, layer.x, device, repeats)


def low_rank_layers(layers: dict[str, Layer], flags: BenchFlags, device) -> dict[str, dict[int, dict]]:
    """kind -> rank -> row. Of the layers with one shape the first is timed."""
    kinds, speed, rows = defaultdict(list), {}, {}
    for name, layer in layers.items():
        kinds[kind_of(name)].append(layer)
    for kind, members in kinds.items():
        shape = members[0].weight.shape
        ranks = flags.ranks_for(shape)
        if shape not in speed:
            speed[shape] = timings(members[0], ranks, device, flags.repeats)
        rows[kind] = {rank: errors(members, rank) | speed[shape][rank] for rank in ranks}
    return rows


def break_even(ranks: list[int], speedups: list[float]) -> float | None:
    """The rank at which the speed-up falls below 1, interpolated between the ranks measured; 0 where it is never above 1, None
    where it always is."""
    if speedups[0] < 1:
        return 0.0
    for (low, above), (high, below) in pairwise(zip(ranks, speedups, strict=True)):
        if below < 1:
            return low + (high - low) * (above - 1) / (above - below)
    return None


def break_even_ranks(by_rank: dict[int, dict]) -> dict[str, float | None]:
    """The break-even rank of one kind of layer, by counting multiplications and by measured time."""
    row = next(iter(by_rank.values()))
    clocks = {what: break_even(list(by_rank), [r[f"speedup_{what}"]["median"] for r in by_rank.values()])
              for what in ("forward", "training")}
    return {"by_counting": row["out"] * row["in"] / (row["out"] + row["in"])} | clocks


def low_rank_models(layers: dict[str, Layer], trained, flags: BenchFlags, quality: Quality | None) -> dict[str, dict]:
    """A row for each rank or share, with every block matrix of the model replaced at once."""
    from approximations import LowRank
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    chosen = {f"model rank {rank}": dict.fromkeys(shapes, rank) for rank in sorted(flags.ranks)} \
        | {f"model share {share:g}": {name: rank_of(share, shape) for name, shape in shapes.items()}
           for share in sorted(flags.shares)}
    models = {label: trained.variant(lambda name, _, ranks=ranks: LowRank(*layers[name].factors(ranks[name])))
              for label, ranks in chosen.items()}
    speed = time_models({"dense": trained.variant(lambda *_: None)} | models, trained.train_batches(1, flags.seed)[0],
                        trained.device, flags.repeats)
    dense = sum(out * features for out, features in shapes.values())
    return {label: {"share": mean([rank / min(shapes[name]) for name, rank in ranks.items()]),
                    "flops_ratio": sum(rank * sum(shapes[name]) for name, rank in ranks.items()) / dense}
            | (quality.of(models[label]) if quality else {"bpb": None, "bpb_rise_pct": None}) | speed[label]
            for label, ranks in chosen.items()}


def without_block_matrices(layers: dict[str, Layer], trained):
    """The model with zeros instead of its block matrices."""
    from approximations import LowRank
    return trained.variant(lambda name, _: LowRank(*(0 * factor for factor in layers[name].factors(1))))


def spectra(layers: dict[str, Layer]) -> dict[str, list[float]]:
    """Singular values relative to the largest, about 32 of each matrix."""
    values = {name: layer.svd.S / layer.svd.S[0] for name, layer in layers.items()}
    return {name: [round(v, 5) for v in s[::max(1, len(s) // 32)].tolist()] for name, s in values.items()}


def table(results: dict) -> str:
    return format_table([{
        "variant": name, "FLOPs": row["flops_ratio"], "weight error": row.get("weight_error"),
        "output error": row.get("output_error"), "x forward": row.get("speedup_forward", {}).get("median"),
        "x training": row["speedup_training"]["median"], "bpb": row.get("bpb"), "worse by %": row.get("bpb_rise_pct")}
        for name, row in results.items()])


def rank_or_none(rank: float | None) -> str:
    return "beyond those measured" if rank is None else f"{rank:.0f}"


def draw(figure, result: dict) -> None:
    error, speed, quality = figure.subplots(1, 3)
    kinds = defaultdict(list)
    for name, row in result["results"].items():
        kinds[name.split()[0]].append(row)
    for kind, rows in kinds.items():
        shares = [row["share"] for row in rows]
        speed.plot(shares, [row["speedup_training"]["median"] for row in rows], marker="o", markersize=3, label=kind)
        if kind != "model":
            error.plot(shares, [row["output_error"] for row in rows], marker="o", markersize=3, label=kind)
        elif rows[0]["bpb"] is not None:
            quality.plot(shares, [row["bpb_rise_pct"] for row in rows], marker="o")
    speed.axhline(1, color="black", linewidth=0.8)
    for axes, title in ((error, "relative error of the outputs"), (speed, "speed-up, forward and backward"),
                        (quality, "validation bits per byte: worse by %")):
        axes.set(title=title, xlabel="rank / smaller side")
        axes.grid(alpha=0.25)
    speed.legend(fontsize=7)


def main(argv: list[str] | None = None) -> int:
    attempt = Attempt(SCRIPT, BenchFlags, argv, __doc__, shape_problems)
    flags, trained = attempt.flags, attempt.open_model()
    quality = None if flags.random else Quality(trained, flags.val_tokens)
    layers = (random_layers if flags.random else trained_layers)(trained, flags)
    rows = low_rank_layers(layers, flags, attempt.device)
    even = {kind: break_even_ranks(by_rank) for kind, by_rank in rows.items()}
    results = {f"{kind} rank {rank}": row for kind, by_rank in rows.items() for rank, row in by_rank.items()} \
        | low_rank_models(layers, trained, flags, quality)
    empty = quality and quality.of(without_block_matrices(layers, trained))["bpb"]

    print(table(results))
    if quality:
        print(f"bits per byte of the model as it was trained: {quality.dense:.4f}; without its block matrices: {empty:.4f}")
    for kind, e in even.items():
        print(f"break-even rank of {kind}: {e['by_counting']:.0f} by counting; measured: "
              f"{rank_or_none(e['forward'])} forward, {rank_or_none(e['training'])} training")
    attempt.save(results, draw, {"break_even_rank": even, "singular_values": spectra(layers)},
                 bpb_dense=quality and quality.dense, bpb_without_block_matrices=empty)
    return 0


if __name__ == "__main__":
    cli(main)
