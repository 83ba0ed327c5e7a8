"""What there is to say about a run, for its page and for the terminal: results, time by part, settings, text, kernels,
checkpoints, and the commands that go on with it. No torch."""

import os
import shlex
import statistics
from contextlib import suppress
from dataclasses import fields

from nanochat.checkpoint_names import optimizer_files
from nanochat.cli.flags import flag_name, title_of
from nanochat.cli.paths import located, step_dir
from nanochat.common import BASE, format_duration, get_base_dir
from nanochat.features import FEATURES
from nanochat.training.config import Config
from nanochat.training.explain import size_text
from nanochat.training.page import figure
from nanochat.training.records import number, read_result
from nanochat.training.run_index import FOREIGN, RUNNING, SET_ASIDE, STATUSES, StoredRun, folder_bytes, part

PARTS = {"train_time_sec": "training steps", "eval_time_sec": "evaluation and samples", "compile_time_sec": "compilation",
         "save_time_sec": "waiting for checkpoints", "unnamed_time_sec": "other, in the training loop"}
BEFORE_AND_AFTER = "before and after the loop"
FEW = 8     # checkpoints that are shown at first
DIGITS = 12  # of a fingerprint
NOT_REPEATED = ("overwrite", "resume_from_step", "allow_change", "model_tag")  # flags that tell how a run was started
HORIZONS = ("target_flops", "num_iterations")
MACHINE = {"host": "host", "device": "device", "dtype": "compute dtype", "torch_version": "torch", "git_commit": "commit",
           "git_dirty": "uncommitted changes", "source_fingerprint": "source"}


def headline(run: StoredRun) -> str:
    """How a run stands, in a line: `ok: 100 of 100 steps, 2.4351 bits per byte, 42s of training`."""
    done, planned = run.steps_done, run.steps_planned
    parts = [f"{done:,} of {planned:,} steps" if planned and done is not None else f"{done:,} steps" if done is not None else "",
             f"{run.best_bpb:.4f} bits per byte" if run.best_bpb is not None else "",
             f"{format_duration(run.train_seconds)} of training" if run.train_seconds is not None else ""]
    said = ": ".join(filter(None, [run.status, ", ".join(filter(None, parts))]))
    return f"{said} ({run.holder})" if run.holder else said


def reason(run: StoredRun) -> str | None:
    """Why a run stands so, in words; None where there is nothing to say."""
    error = run.result.get("error") if run.has_ended else None
    return str(error) if error else STATUSES.get(run.status) if run.status != RUNNING else None


def results(run: StoredRun) -> dict[str, object]:
    """What came of a run, as far as it is known."""
    result, steps = (run.result, []) if run.has_ended else ({}, run.steps)
    last_row = steps[-1] if steps else {}
    last_bpb = result.get("val_bpb", run.val_curve[-1][2] if run.val_curve else None)
    target = number(result.get("time_to_target_sec_measured"))
    forecast = number(part(result, "plan").get("estimated_train_time_sec"))
    found = {
        "bits per byte, best": run.best_bpb, "bits per byte, last": last_bpb,
        "CORE metric": next((row["core_metric"] for row in reversed(run.rows) if row.get("core_metric") is not None), None),
        "training loss, smoothed (nats per token)": result.get("final_train_loss", last_row.get("smooth_loss")),
        "steps": run.steps_done, "tokens": result.get("tokens_seen", last_row.get("tokens_seen")),
        "tokens per second, median": run.tokens_per_second, "share of the hardware's peak (MFU)": result.get("mfu"),
        "training time": format_duration(run.train_seconds) if run.train_seconds is not None else None,
        "training time, estimated before": format_duration(forecast) if forecast is not None else None,
        f"time to {result.get('target_metric_name')} of {result.get('target_metric_threshold')}":
            format_duration(target) if target is not None else None,
        "parameters": result.get("num_params"), "FLOPs per token": result.get("flops_per_token"),
        "steps skipped": result.get("skipped_steps") or None, "rollbacks": result.get("rollbacks") or None,
        "blocks trained, mean": result.get("active_layers_mean"),
        "speed-up over full steps, measured": result.get("speedup_measured"),
        "FP8 layers": result.get("fp8_layers"), "size on disk": size_text(run.size())}
    return {name: value for name, value in found.items() if value is not None}


def time_parts(run: StoredRun) -> dict[str, float]:
    """Seconds by part; {} where no process of the run has come to its end. Those before and after the training loop are known of
    a run that was not resumed."""
    if not run.has_ended:
        return {}
    parts = {name: seconds for field, name in PARTS.items() if (seconds := number(run.result.get(field))) is not None}
    wall = number(run.result.get("wall_time_sec"))
    if parts and wall is not None and not any("--resume-from-step" in word for word in typed(run) or ()):
        parts[BEFORE_AND_AFTER] = max(0.0, wall - sum(parts.values()))
    return parts


def memory(run: StoredRun) -> dict[str, str]:
    """The peak of the run, and the mean of those of its steps."""
    peaks = [peak for row in run.rows if (peak := number(row["peak_mem_mib"])) is not None]
    peak = number(run.result.get("peak_mem_mib")) if run.has_ended else max(peaks, default=None)
    average = statistics.fmean(peaks) if peaks else None
    found = {"peak": peak, "mean of the steps' peaks": average,
             "peak, estimated before": number(part(run.result, "plan").get("estimated_peak_mem_mib"))}
    return {name: f"{value:,.0f} MiB" for name, value in found.items() if value is not None}


# ---- settings

def settings(run: StoredRun) -> list[dict]:
    """Every flag of a run: group, flag, value, default. A flag that this version does not know is in a group of its own."""
    defaults = Config(features={feature.name: feature.Config() for feature in FEATURES})
    values = dict(run.flags)
    found = []
    for group in defaults.groups() if values else []:
        for f in fields(group):
            default = getattr(group, f.name)  # what a class makes of its default: some flags are completed
            found.append({"group": title_of(type(group)), "flag": flag_name(f.name), "value": values.pop(f.name, default),
                          "default": default})
    return found + [{"group": "Of another version", "flag": flag_name(name), "default": None, "value": value}
                    for name, value in values.items()]


def changed_settings(run: StoredRun) -> dict[str, tuple]:
    """Flag -> (value, default), of those that differ."""
    return {row["flag"]: (row["value"], row["default"]) for row in settings(run) if row["value"] != row["default"]}


# ---- text, kernels, machine

def text_facts(run: StoredRun) -> dict[str, object]:
    """Tokenizer and tokens. What is read from the tokens' manifest is left out where they are gone."""
    tokens = run.state.get("tokens")
    manifest = read_result(located(tokens) / "manifest.json") if isinstance(tokens, str) else {}
    flags, fingerprint = run.flags, run.state.get("tokenizer")
    found: dict[str, object] = {
        "text": flags.get("data"), "text for validation": flags.get("val_data") or ("a part of it" if flags else None),
        "vocabulary": manifest.get("vocab_size") or part(run.state, "model_config").get("vocab_size"),
        "tokenizer": fingerprint and str(fingerprint)[:DIGITS], "tokens are in": tokens}
    for split, name in (("train", "training"), ("val", "validation")):
        known = part(part(manifest, "splits"), split)
        tokens_of, documents, size = (number(known.get(key)) for key in ("tokens", "docs", "text_bytes"))
        if tokens_of and documents and size:
            found[f"{name} tokens"] = f"{tokens_of:,} in {documents:,} documents"
            found[f"{name} text"] = f"{size:,} bytes, {size / tokens_of:.2f} per token"
    return {name: value for name, value in found.items() if value is not None}


def kernels(run: StoredRun) -> list[dict]:
    """Which kernels were chosen, why, and what was measured."""
    rows = []
    choices = part(run.result, "kernel_choices")
    for name in choices:
        choice = part(choices, name)
        several = {"": choice} if "name" in choice else {what: part(choice, what) for what in choice}
        for what, one in several.items():
            times = ", ".join(f"{other} {figure(ms)}" for other, ms in part(one, "milliseconds").items())
            rows.append({"for": f"{name}, {what}" if what else name, "chosen": one.get("name"), "why": one.get("reason"),
                         "measured (ms)": times or None})
    return rows


def machine(run: StoredRun) -> dict[str, object]:
    environment = part(run.state, "numerics_environment")  # of a run that has no result
    known = {"device": environment.get("device"), "torch_version": environment.get("torch")} | run.result
    found = {name: known[field] for field, name in MACHINE.items() if known.get(field) is not None}
    return found | {name: str(found[name])[:DIGITS] for name in ("commit", "source") if name in found}


# ---- checkpoints

def evaluation_rows(run: StoredRun) -> list[dict]:
    """A row per checkpoint that scripts.base_eval has evaluated."""
    rows = []
    for path in sorted(run.folder.glob("eval_*.json")):
        record = read_result(path)
        bpb = part(record, "bpb")
        rows.append({"step": record.get("step"), "training (bits per byte)": bpb.get("train"),
                     "validation (bits per byte)": bpb.get("val"), "CORE metric": part(record, "core").get("core_metric")})
    return rows


def checkpoint_rows(run: StoredRun) -> list[dict]:
    """A row per checkpoint: step, bits per byte, bytes, and whether it is the best or the last, and can be resumed from."""
    best, bpb = best_checkpoint(run), {step: value for step, _, value in run.val_curve}
    rows = []
    for step in run.checkpoints:
        folder = step_dir(run.folder, step)
        notes = ["best"] * (step == best) + ["last"] * (step == run.checkpoints[-1])
        notes += [] if optimizer_files(folder) else ["weights only"]
        rows.append({"step": step, "bits per byte": bpb.get(step), "size": size_text(folder_bytes(folder)),
                     "": ", ".join(notes)})
    return rows


def notable(rows: list[dict]) -> list[dict]:
    """The rows of the best checkpoint and of the last ones."""
    return [row for i, row in enumerate(rows) if i >= len(rows) - FEW or "best" in row[""]]


def best_checkpoint(run: StoredRun) -> int | None:
    """The step of the checkpoint with the lowest bits per byte, of those that were evaluated."""
    evaluated = {step: bpb for step, _, bpb in run.val_curve if step in run.checkpoints}
    return min(evaluated, key=evaluated.__getitem__, default=None)


# ---- commands

def commands(run: StoredRun) -> dict[str, str]:
    """What one can do with a run -> the command, for the folder in which it was started: relative paths are meant from there."""
    found: dict[str, str] = {}
    argv, tag = arguments(run), [f"--model-tag={run.name}"]
    if run.status in (SET_ASIDE, FOREIGN):
        return found
    if argv is not None:
        start = training_command(run)
        if run.status == "ok" and run.checkpoints:
            longer = [*without(argv, HORIZONS), f"--num-iterations={2 * run.checkpoints[-1]}"]
            found["train on, here to twice the steps"] = shlex.join([*start, *longer, *tag, "--resume-from-step=latest",
                                                                     "--allow-change"])
        elif run.checkpoints:
            found["resume"] = shlex.join([*start, *argv, *tag, "--resume-from-step=latest"])
        else:
            found["start again, as there is no checkpoint"] = shlex.join([*start, *argv, *tag])
        found["repeat under another name"] = shlex.join([*start, *argv, f"--model-tag={run.name}-again"])
    runs = ["python", "-m", "scripts.runs"]
    found["compare with another run"] = shlex.join([*runs, "compare", run.name, f"{run.name}-again"])
    if run.checkpoints:
        found["sample"] = shlex.join(["python", "-m", "scripts.sample", *tag, "-p", "Once upon a time"])
        found["evaluate"] = shlex.join(["python", "-m", "scripts.base_eval", *tag])
    base = shlex.quote(str(get_base_dir()))
    return {what: f"{BASE}={base} {command}" if os.environ.get(BASE) else command for what, command in found.items()}


def training_command(run: StoredRun) -> list[str]:
    """What starts as many processes as the run had."""
    ranks = part(run.state, "numerics_environment").get("ranks")
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={ranks}"] if isinstance(ranks, int) and ranks > 1 else ["python"]
    return [*launcher, "-m", "scripts.base_train"]


def arguments(run: StoredRun) -> list[str] | None:
    """The flags that a run was started with, without NOT_REPEATED; None where they are not known."""
    argv = typed(run)
    return None if argv is None else without(argv, NOT_REPEATED)


def typed(run: StoredRun) -> list[str] | None:
    """The flags that were typed, the last time that a process of the run came to its end, or else at its start; None where they
    are not known."""
    if isinstance(argv := run.result.get("argv"), list):
        return [str(word) for word in argv]
    command = read_result(run.folder / "config.json").get("command")
    with suppress(ValueError):  # a quote without its end
        return shlex.split(command)[1:] if isinstance(command, str) else None  # behind the program
    return None


def without(argv: list[str], names: tuple[str, ...]) -> list[str]:
    """`argv` without the flags of these names and their values."""
    dropped, kept, behind = set(map(flag_name, names)), [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if name in dropped:
            behind = not equals and name not in ("--overwrite", "--allow-change")  # its value is the next word
        elif behind:
            behind = False
        else:
            kept.append(word)
    return kept
