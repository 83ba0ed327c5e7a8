"""Does low rank work if it is fitted to the data? Plain SVD, the best rank for real inputs, and that plus a diagonal.

    python attempts/container_a_required_flops/data_aware_low_rank_plus_diag.py --preset smoke --json-out a3.json

min ||X (W - W')^T|| over W' of rank r has a closed form (approximations.py): the principal directions of the outputs. It is
fitted to the second moments of the inputs on training text, and evaluated on validation text, where it could be worse. One
matrix is also fitted by an optimizer from random factors, which must not find anything better. Then all block matrices are
replaced at once, and the model is validated.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

from measure import Quality, RankFlags, mean, rank_of, time_layers
from nanochat.benchmarks.attempt import Attempt
from nanochat.benchmarks.trained_model import block_matrices, inputs_of, second_moments
from nanochat.cli.flags import flag
from nanochat.cli.program import cli
from nanochat.common import format_table

SCRIPT = "attempts/container_a_required_flops/data_aware_low_rank_plus_diag.py"
METHODS = ("svd", "data_aware", "data_aware_diagonal")
PRESETS = {
    "smoke": dict(batches=4, val_tokens=8192, repeats=5, shares=[0.125, 0.25], rounds=2),
    "default": dict(batches=16, val_tokens=16384, repeats=9, shares=[0.125, 0.25, 0.5], rounds=3),
    "gpu": dict(batches=32, val_tokens=2**20, repeats=21, shares=[0.03125, 0.0625, 0.125, 0.25, 0.5], rounds=3),
}


@dataclass
class BenchFlags(RankFlags):
    """The attempt; the preset gives the sizes that are not given"""
    repeats: int | None = flag(None, "timings of each variant, interleaved", low=2)
    rounds: int | None = flag(None, "how often the diagonal and the low rank are fitted, one after the other", low=1)
    optimizer_steps: int = flag(300, "steps of L-BFGS that check the closed form; 0 skips the check", low=0)

    presets = PRESETS


def by_optimizer(weight, moments, rank: int, steps: int, seed: int) -> float:
    """The relative output error that L-BFGS reaches from random factors, in float64."""
    import torch

    from approximations import energy
    weight, moments = weight.double(), moments.double()
    generator = torch.Generator().manual_seed(seed)
    scale = (weight.square().mean() / rank).sqrt().sqrt()
    factors = [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
               for shape in ((len(weight), rank), (rank, weight.size(1)))]
    whole = energy(weight, moments)
    optimizer = torch.optim.LBFGS(factors, max_iter=steps, history_size=20, line_search_fn="strong_wolfe",
                                  tolerance_grad=0, tolerance_change=0)

    def loss():
        optimizer.zero_grad()
        value = energy(weight - factors[0] @ factors[1], moments) / whole
        value.backward()
        return value
    optimizer.step(loss)
    return loss().sqrt().item()


def check(weights: dict, moments: dict, flags: BenchFlags) -> dict:
    """The errors of the closed form and of the optimizer, for the query matrix of the last layer."""
    from approximations import data_aware_errors
    name = [name for name in weights if name.endswith("attn.c_q")][-1]
    weight, rank = weights[name], rank_of(min(flags.shares), weights[name].shape)
    return {"layer": name, "rank": rank, "closed_form": data_aware_errors(weight, moments[name])[rank].item(),
            "optimizer": by_optimizer(weight, moments[name], rank, flags.optimizer_steps, flags.seed)}


def errors(weights: dict, factors: dict, fitted_to: dict, unseen: dict) -> dict[str, float]:
    """Means over the layers: error of the weights, of the outputs on the training text of the fit, and on validation text."""
    from approximations import diagonal_matrix, output_error, weight_error
    found = defaultdict(list)
    for name, weight in weights.items():
        a, b, *d = factors[name]
        whole = a @ b + (diagonal_matrix(d[0], *weight.shape) if d else 0)
        found["weight_error"].append(weight_error(weight, whole))
        found["output_error_fit"].append(output_error(weight, whole, fitted_to[name]))
        found["output_error"].append(output_error(weight, whole, unseen[name]))
    return {what: mean(values) for what, values in found.items()}


def timings(weight, factors: dict, x, device, repeats: int) -> dict:
    """The speed of a layer for each replacement, {variant: its factors}."""
    import torch.nn.functional as F

    from approximations import low_rank
    variants = {variant: (low_rank, parts) for variant, parts in factors.items()}
    return time_layers({"dense": (F.linear, [weight])} | variants, x, device, repeats)


def draw(figure, result: dict) -> None:
    error, quality = figure.subplots(1, 2)
    by_method = defaultdict(list)
    for row in result["results"].values():
        by_method[row["method"]].append(row)
    for method, rows in by_method.items():
        shares = [row["share"] for row in rows]
        error.plot(shares, [row["output_error"] for row in rows], marker="o", label=method)
        quality.plot(shares, [row["bpb_rise_pct"] for row in rows], marker="o", label=method)
    for axes, title in ((error, "relative error of the outputs (validation text)"),
                        (quality, "validation bits per byte: worse by %")):
        axes.set(title=title, xlabel="rank / smaller side")
        axes.grid(alpha=0.25)
    error.legend()


def main(argv: list[str] | None = None) -> int:
    attempt = Attempt(SCRIPT, BenchFlags, argv, __doc__)
    flags, trained = attempt.flags, attempt.open_model()
    from approximations import LowRank, fit
    named, batches = block_matrices(trained.model), trained.train_batches(flags.batches, flags.seed)
    quality = Quality(trained, flags.val_tokens)
    seen = second_moments(trained.model, named, batches)
    unseen = second_moments(trained.model, named, quality.batches)
    weights = {name: layer.weight.detach().cpu().double() for name, layer in named.items()}

    variants = {f"{method} share {share:g}": (method, share) for share in sorted(flags.shares) for method in METHODS}
    fitted = {variant: {name: fit(method, weight, seen[name], rank_of(share, weight.shape), flags.rounds)
                        for name, weight in weights.items()} for variant, (method, share) in variants.items()}
    first = next(name for name in named if name.endswith("mlp.c_fc"))
    speed = timings(weights[first], {variant: factors[first] for variant, factors in fitted.items()},
                    inputs_of(trained.model, named, batches[0][0])[first], attempt.device, flags.repeats)
    results = {variant: {"method": method, "share": share, **errors(weights, fitted[variant], seen, unseen),
                         **quality.of(trained.variant(lambda name, _, factors=fitted[variant]: LowRank(*factors[name]))),
                         **speed[variant]}
               for variant, (method, share) in variants.items()}
    checked = check(weights, seen, flags) if flags.optimizer_steps else None

    print(format_table([{"variant": name, "weight error": r["weight_error"], "output error, fitted": r["output_error_fit"],
                         "validation": r["output_error"], "bpb": r["bpb"], "worse by %": r["bpb_rise_pct"],
                         "x training": r["speedup_training"]["median"]} for name, r in results.items()]))
    print(f"bits per byte of the model as it was trained: {quality.dense:.4f}; speed is that of {first} alone")
    if checked:
        print(f"{checked['layer']} at rank {checked['rank']}: error {checked['closed_form']:.6f} in closed form, "
              f"{checked['optimizer']:.6f} by an optimizer from random factors")
    attempt.save(results, draw, bpb_dense=quality.dense, closed_form_check=checked)
    return 0


if __name__ == "__main__":
    cli(main)
