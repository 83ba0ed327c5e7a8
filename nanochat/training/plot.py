"""The picture of a run: training loss and validation bits per byte, over steps and over training time.

Where not every step trained every block, the number it did train is drawn underneath.
"""

from pathlib import Path

from nanochat.training.records import read_metrics


def plot_run(run_dir: Path) -> str:
    """Draw `loss.png` from the run's metrics.jsonl. Returns a line for the user: where it is, or why there is none."""
    try:
        return _plot_run(run_dir)
    except Exception as e:  # rows that were damaged, a full disk: no picture is worth a run
        return f"no plot: {type(e).__name__}: {e}"


def _plot_run(run_dir: Path) -> str:
    rows = read_metrics(run_dir / "metrics.jsonl")
    steps = [r for r in rows if r["loss"] is not None]
    evals = [r | {"val_bpb": float(r["val_bpb"])} for r in rows if r["val_bpb"] is not None]  # "NaN" is a string there
    if not steps:
        return "no plot: no step was finished"
    try:
        from matplotlib.figure import Figure  # the object interface: no display, no global state
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    varies = len({r["active_layers"] for r in steps}) > 1
    figure = Figure(figsize=(11, 5.6 if varies else 4.2), layout="constrained")
    grid = figure.subplots(1 + varies, 2, squeeze=False, sharex="col", height_ratios=[3, 1] if varies else [1])
    for column, (x, label) in enumerate((("step", "optimizer step"), ("train_time_sec", "training time (s)"))):
        _draw(grid[0][column], steps, evals, x)
        if varies:
            _draw_active(grid[1][column], steps, x)
        grid[-1][column].set_xlabel(label)
    last = steps[-1]
    title = f"{run_dir.name}: loss {last['smooth_loss']:.3f} nats"
    if evals:
        title += f", validation {evals[-1]['val_bpb']:.4f} bits per byte"
    figure.suptitle(title)
    figure.savefig(run_dir / "loss.png", dpi=120)
    return f"loss plot: {run_dir / 'loss.png'}"


def _draw(axes, steps: list[dict], evals: list[dict], x: str) -> None:
    axes.plot([r[x] for r in steps], [r["loss"] for r in steps], color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot([r[x] for r in steps], [r["smooth_loss"] for r in steps], color="tab:blue", label="training loss (smoothed)")
    axes.set_ylabel("training loss (nats per token)", color="tab:blue")
    axes.grid(alpha=0.25)
    if evals:
        right = axes.twinx()
        right.plot([r[x] for r in evals], [r["val_bpb"] for r in evals], color="tab:red", marker="o", markersize=4,
                   label="validation")
        right.set_ylabel("validation (bits per byte)", color="tab:red")


def _draw_active(axes, steps: list[dict], x: str) -> None:
    axes.step([r[x] for r in steps], [r["active_layers"] for r in steps], where="post", color="tab:green", linewidth=0.9)
    axes.set_ylabel("blocks trained")
    axes.set_ylim(0, None)
    axes.grid(alpha=0.25)
