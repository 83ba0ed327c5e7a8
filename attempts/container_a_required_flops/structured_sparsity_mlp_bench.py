"""How much of a relu-squared MLP can be removed in pieces that hardware can skip? Neurons, groups, blocks of weights, 2:4.

    python attempts/container_a_required_flops/structured_sparsity_mlp_bench.py --preset smoke --json-out a4.json

y = W2 relu(W1 x)^2. Removed from every MLP of a trained model, for each share that is kept:

    neurons      rows of W1 and their columns of W2, by their contribution to the output: E[h_i^2] |w2_i|^2. The products are
                 then smaller on every device. `neurons_by_weight` uses |w1_i|^2 |w2_i|, without data.
    groups       the same by whole groups of --block neighbours, which a kernel that skips tiles needs.
    weights_bsr  blocks of --block x --block weights with the smallest norm; PyTorch's kernels for block-sparse rows.
    weights_2_4  two weights of every four in a row stay, those with the largest |w_ij| rms(x_j) (Wanda, arXiv 2306.11695).
    hidden_2_4   two hidden values of every four stay, and all weights (for squared ReLU: arXiv 2503.16672).

`refit` then solves for W2 by least squares, so that the rest reproduces the old outputs as well as possible: closed form, no
training. Finally some of the variants and a dense copy are trained for the same few steps. Where the device has no kernel for a
pattern, only quality is measured, and the row has the reason.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

from measure import Flags, Quality, mean, share_problems
from nanochat.benchmarks.attempt import Attempt
from nanochat.benchmarks.interleaved_training import Training, train_interleaved
from nanochat.benchmarks.trained_model import ModelFlags, block_matrices, inputs_of, second_moments
from nanochat.cli.flags import flag
from nanochat.cli.program import cli
from nanochat.common import format_table

SCRIPT = "attempts/container_a_required_flops/structured_sparsity_mlp_bench.py"
PRESETS = {
    "smoke": dict(batches=4, val_tokens=8192, repeats=5, keep=[0.5], steps=20, block=16),
    "default": dict(batches=16, val_tokens=16384, repeats=9, keep=[0.25, 0.5, 0.75], steps=20, block=32),
    "gpu": dict(batches=32, val_tokens=2**20, repeats=21, keep=[0.25, 0.5, 0.75], steps=500, block=64),
}
UNTRAINED = {"rise_vs_dense_pct": None, "step_ms": None, "speedup_step": None}


@dataclass
class BenchFlags(Flags):
    """The attempt; the preset gives the sizes that are not given"""
    repeats: int | None = flag(None, "timings of each variant, interleaved", low=2)
    keep: list[float] = flag([], "shares of neurons or blocks that are kept; by default the preset's")
    block: int | None = flag(None, "neurons in a group, and the side of a block of weights", low=2)
    steps: int | None = flag(None, "training steps of the variants that recover; 0 skips recovery", low=0)
    lr: float = flag(1e-3, "initial learning rate of AdamW in recovery; it falls linearly to 0", low=0)

    presets = PRESETS

    def validate(self) -> list[str]:
        return super().validate() + share_problems("--keep", self.keep)


def shape_problems(flags: BenchFlags, model: ModelFlags) -> list[str]:
    """Blocks that do not divide the model's MLP."""
    if model.validate():
        return []
    width, block = model.shape(flags.preset).n_embd, flags.filled().block
    return [] if width % block == 0 else [f"--block {block} does not divide the width of the model, {width}"]


def draw(figure, result: dict) -> None:
    quality, tradeoff = figure.subplots(1, 2)
    rows = result["results"]
    for y, (name, row) in enumerate(rows.items()):
        quality.barh(y, row["bpb_rise_pct"], color="tab:blue", alpha=0.5)
        if row["rise_vs_dense_pct"] is not None:
            quality.plot(row["rise_vs_dense_pct"], y, "o", color="tab:red")
        if row["speedup_forward"]:
            tradeoff.plot(row["speedup_forward"]["median"], row["bpb_rise_pct"], "o")
            tradeoff.annotate(name, (row["speedup_forward"]["median"], row["bpb_rise_pct"]), fontsize=6)
    quality.set_yticks(range(len(rows)), rows, fontsize=6)
    quality.set(title="bits per byte: worse by % (dot: recovered, against dense)")
    tradeoff.axvline(1, color="black", linewidth=0.8)
    tradeoff.set(title="worse by % over the MLP's speed-up, forward")
    tradeoff.margins(x=0.3)
    for axes in (quality, tradeoff):
        axes.grid(alpha=0.25)


def evaluate(variants: dict, models: dict, quality: Quality, model, seen: dict) -> dict[str, dict]:
    """Errors and quality before recovery."""
    from sparsity import error_of
    weights = sum(p.numel() for block in model.transformer.h for p in block.mlp.parameters())
    return {name: {"kept": sum(layer.kept for layer in layers.values()) / weights,
                   "mlp_error": error_of(model, models[name], seen), **quality.of(models[name])}
            for name, layers in variants.items()}


def recover(models: dict, quality: Quality, trained, flags: BenchFlags) -> dict[str, Training]:
    """Train the MLPs of these models and of a dense copy."""
    runs = {name: Training(model, [p for block in model.transformer.h for p in block.mlp.parameters()], flags.lr)
            for name, model in ({"dense": trained.variant(lambda *_: None)} | models).items()}
    train_interleaved(trained, runs, flags.steps, flags.seed + 1, quality.batches, evaluations=1)
    return runs


def table(results: dict) -> str:
    return format_table([{
        "variant": name, "weights": row["kept"], "MLP error": row["mlp_error"], "worse by %": row["bpb_rise_pct"],
        "recovered": row["rise_vs_dense_pct"], "x forward": (row["speedup_forward"] or {}).get("median"),
        "x training": (row["speedup_training"] or {}).get("median")} for name, row in results.items()])


def by_reason(results: dict) -> dict[str, list[str]]:
    found = defaultdict(list)
    for name, row in results.items():
        if row["why_not_timed"]:
            found[row["why_not_timed"]].append(name)
    return found


def main(argv: list[str] | None = None) -> int:
    attempt = Attempt(SCRIPT, BenchFlags, argv, __doc__, shape_problems)
    flags, trained = attempt.flags, attempt.open_model()
    from sparsity import is_recovered, make_variants, timings
    named = {name: layer for name, layer in block_matrices(trained.model).items() if ".mlp." in name}
    moments = second_moments(trained.model, named, trained.train_batches(flags.batches, flags.seed))
    quality = Quality(trained, flags.val_tokens)
    seen = inputs_of(trained.model, named, quality.batches[0][0])
    zeros = mean([(x == 0).float().mean().item() for name, x in seen.items() if name.endswith("c_proj")])

    variants = make_variants(named, moments, flags.keep, flags.block)
    models = {variant: trained.variant(lambda name, _, layers=layers: layers.get(name)) for variant, layers in variants.items()}
    results = evaluate(variants, models, quality, trained.model, seen)
    speed = timings(models, trained.model, seen, attempt.device, flags.block, flags.repeats)
    runs = recover({name: models[name] for name in models if is_recovered(name)}, quality, trained, flags) if flags.steps else {}
    for name, row in results.items():
        row |= speed[name] | (runs[name].compared_with(runs["dense"]) if name in runs else UNTRAINED)

    print(table(results))
    print(f"bits per byte as it was trained: {quality.dense:.4f}; {zeros:.1%} of the hidden values are 0")
    for reason, names in by_reason(results).items():
        print(f"no speed of {', '.join(names)}: {reason}")
    attempt.save(results, draw, {name: {"bpb": run.curve} for name, run in runs.items()},
                 bpb_dense=quality.dense, hidden_zero_share=zeros)
    return 0


if __name__ == "__main__":
    cli(main)
