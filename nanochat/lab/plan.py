"""Plan an experiment: profiles, templates, variants, matched conditions, and the order of the cells.

A profile is a file of base_train's flags (configs/, nanochat/cli/flag_files.py). A variant is a name and more flags; of a flag
that is given twice the last value counts. A flag may be relative to the baseline: `--lr-multiplier=x1.1`,
`--total-batch-size=x0.7`, `--depth=x1.5`.

A template is a JSON file:
    "about"     its question
    "match"     steps | flops | time | free: what all variants have in common with the baseline (free: nothing)
    "grid"      {"--flag": [values]}: every combination is a variant
    "cross"     [{"name": "flags"}, ...]: every combination of one of each is a variant, such as each shape with each rate; an
                empty name adds nothing to the variant's
    "variants"  {"name": "flags"}: more variants
    "if_implemented"  true: leave out variants with a flag that base_train does not have
"""

import itertools
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from nanochat.cli.flag_files import CONFIGS, expand_flag_files, profiles
from nanochat.cli.flags import build_parser, flag_name
from nanochat.common import UserError, resolve as resolve_path
from nanochat.lab.rows import config_of

HERE = Path(__file__).parent
MATCHES = ("steps", "flops", "time", "free")
NAME = r"[\w.+-]+"       # of a variant
RELATIVE = r"x\d*\.?\d+"  # a flag's value
HORIZON = ("--num-iterations", "--target-flops", "--target-param-data-ratio")  # what sets the length of a run
OWN = ("--seed", "--model-tag", "--result-json", "--resume-from-step", "--overwrite")  # set by the lab
# What is measured and where: device, text, its tokens, when and on what is evaluated, the target, records. A candidate that
# changes one of these is measured by another rule than the baseline.
MEASURED = ("device_type", "max_train_seconds", "run", "tracker", "data", "val_data", "max_chars", "text_column", "skip_bad",
            "doc_cap", "vocab_size", "eval_every", "eval_tokens", "compile_evaluation", "target_metric_name",
            "target_metric_threshold")
RESERVED = r"baseline(-.*)?|control|again|pilot-.*|.*-resumed"  # names of the lab's own runs
SHARE_OF = r"(.+)-\d+"  # a variant at a share of its steps, in percent
ALIASES = {"cpu": "lab-cpu", "gpu": "lab-gpu", "d12": "plan-d12"}  # earlier names of profiles


@dataclass(frozen=True)
class Variant:
    """A name, and the flags of its runs without the seed."""
    name: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    about: str
    match: str
    variants: dict[str, str]  # name -> flags
    missing: list[str]        # names of variants that are left out because a flag of theirs is not implemented


def templates() -> list[str]:
    return sorted(p.stem for p in (HERE / "templates").glob("*.json"))


def read_profile(name: str) -> list[str]:
    """The flags of a profile in configs/, or of a file; none for the name "".

    Raises: UserError if there is no such profile, or the file cannot be read.
    """
    if not name:
        return []
    path = CONFIGS / f"{ALIASES.get(name, name)}.flags"
    path = path if path.exists() else resolve_path(name)
    if not path.exists():
        raise UserError(f"no profile {name!r}: choose one of {', '.join(profiles())}, or name a file of flags")
    return expand([f"@{path}"])


def expand(words: list[str]) -> list[str]:
    """Flags of base_train with every @FILE replaced by its flags."""
    return expand_flag_files(words, build_parser([type(group) for group in config_of([]).groups()]))


def read_template(name: str) -> Template:
    """A template of the lab, by its letter or name, or a file. Raises: UserError for a file that is not a template."""
    shipped = [t for t in templates() if name in (t, t.split("-")[0])]
    path = HERE / "templates" / f"{shipped[0]}.json" if shipped else resolve_path(name)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        unknown = set(read) - {"about", "match", "grid", "cross", "variants", "if_implemented"}
        if unknown or read.get("match", "steps") not in MATCHES:
            raise ValueError(f"unknown key {unknown.pop()!r}" if unknown else f"match must be one of {', '.join(MATCHES)}")
        grid = [{_short(flag, value): f"{flag}={value}" for value in values} for flag, values in read.get("grid", {}).items()]
        found = [*_combined(grid), *_combined(read.get("cross", [])), *read.get("variants", {}).items()]
        variants = {key: str(flags) for key, flags in found}
        if len(variants) < len(found):
            raise ValueError("two of its variants have the same name")
        if bad := [key for key in variants if not re.fullmatch(NAME, key)]:
            raise ValueError(f"a variant's name is made of letters, digits, '.', '_', '+' and '-', not {bad[0]!r}")
    except (OSError, ValueError, AttributeError, TypeError) as e:
        raise UserError(f"template {name!r}: {e}. The lab has {', '.join(templates())}; "
                        "what a template may say is in nanochat/lab/plan.py") from None
    known = {"--" + field.replace("_", "-") for field in config_of([]).flat()}
    missing = [key for key, flags in variants.items() if read.get("if_implemented")
               and any(word.split("=")[0] not in known for word in flags.split())]
    return Template(read.get("about", path.stem), read.get("match", "steps"),
                    {key: flags for key, flags in variants.items() if key not in missing}, missing)


def _combined(factors: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Name and flags of every combination of one of each factor, which is a dict of names and flags; none without factors."""
    combinations = itertools.product(*(factor.items() for factor in factors)) if factors else ()
    return [("_".join(name for name, _ in parts if name), " ".join(flags for _, flags in parts if flags))
            for parts in combinations]


def _short(flag: str, value) -> str:
    return f"{flag.strip('-').replace('-multiplier', '')}-{value}"


def make_variants(profile: list[str], baseline: str, candidates: dict[str, str], match: str) -> tuple[Variant, list[Variant]]:
    """The baseline, and the candidates that differ from it.

    Raises: UserError that names the variant with a wrong flag, one that changes what is measured, or a name of the lab's own.

    Candidates have their flags in addition to the baseline's. If `match` is "steps", all have the baseline's number of steps.
    """
    base, = named_variants(profile, baseline, {"baseline": ""}, match)
    same, different = config_of(base.flags).flat(), []
    for variant in named_variants(profile, baseline, candidates, match):
        values = config_of(variant.flags).flat()
        if changed := [name for name in MEASURED if values[name] != same[name]]:
            raise UserError(f"{variant.name}: {flag_name(changed[0])} changes what is measured, so both sides need the same: "
                            "give it in --baseline or the profile")
        if re.fullmatch(RESERVED, variant.name):
            raise UserError(f"a variant cannot be called {variant.name}: the lab names runs of its own so")
        if (share := re.fullmatch(SHARE_OF, variant.name)) and share[1] in candidates:
            raise UserError(f"variants cannot be called {share[1]} and {variant.name}: the lab names {share[1]} at a share of "
                            "its steps so")
        if values != same:
            different.append(variant)
    return base, different


def named_variants(profile: list[str], baseline: str, texts: dict[str, str], match: str) -> list[Variant]:
    """A variant for each of `texts` (name -> flags), even if two are the same. Their common flags need not be a valid run."""
    common, found = [*profile, *_words("baseline", baseline)], []
    if match == "steps":
        common += steps_of(horizon_of(checked("baseline", common)).num_iterations)
    for name, text in texts.items():
        own = _words(name, text)
        if match != "free" and (lengths := [f.split("=")[0] for f in own if f.split("=")[0] in HORIZON]):
            raise UserError(f"{name} sets {lengths[0]}, but its length is given by --match {match}: use --match free")
        found.append(Variant(name, (*common, *resolve(name, own, common))))
        checked(name, found[-1].flags)
    return found


def _words(name: str, text: str) -> list[str]:
    try:
        words = expand(shlex.split(text))
    except ValueError as e:
        raise UserError(f"{name}: {e} in {text!r}") from None
    if taken := [w for w in words if w.split("=")[0] in OWN]:
        raise UserError(f"{name}: {taken[0]} is set by the lab: leave it out")
    return words


def checked(name: str, flags):
    try:
        return config_of(flags)
    except UserError as e:
        raise UserError(f"{name}: {e}") from None


def horizon_of(config):
    """Steps, batch and rates of a run with this Config, on one rank, with the vocabulary it asks for."""
    return config.plan(config.model.shape(config.data.vocab_size))


def resolve(variant: str, flags: list[str], baseline: list[str]) -> list[str]:
    """`flags` with those relative to the baseline's flags (`--name=xNUMBER`) replaced by values.

    A batch is rounded to what divides into micro-batches, which shrink for it; its learning rate and weight decay follow by
    the transfer laws (nanochat/recipe/horizon.py). A data ratio carries along a number of steps that was given.
    """
    if not any(re.fullmatch(RELATIVE, flag.partition("=")[2]) for flag in flags):
        return flags
    config, found = checked("baseline", baseline), []
    values = config.flat()
    for flag in flags:
        name, _, text = flag.partition("=")
        if not re.fullmatch(RELATIVE, text):
            found.append(flag)
            continue
        factor, value = float(text[1:]), values.get(name.strip("-").replace("-", "_"))
        if name == "--total-batch-size":
            found += _batch(factor, config)
        elif not isinstance(value, (int, float)) or isinstance(value, bool):
            raise UserError(f"{variant}: {flag}: {name} has no value that could be multiplied")
        elif isinstance(value, int):
            found.append(f"{name}={max(1, round(value * factor))}")
        else:
            found.append(f"{name}={value * factor:.10g}")
            if name == "--target-param-data-ratio" and config.horizon.num_iterations > 0:
                found.append(f"--num-iterations={max(1, round(config.horizon.num_iterations * factor))}")
    return found


def about_batch(flags: list[str]) -> str:
    """A sentence on the batch that `--total-batch-size=x...` multiplies, and on the one that the transfer law predicts."""
    batch, law = (horizon_of(checked("baseline", [*flags, *more])).total_batch_size for more in ([], ["--total-batch-size=-1"]))
    return f"batch: x1 is the baseline's {batch:,} tokens" + (
        "" if batch == law else f"; the law predicts {law:,} (leave out --total-batch-size to start from there)")


def _batch(factor: float, config) -> list[str]:
    """Flags of a batch `factor` times the baseline's, in rows that a micro-batch of at most its size divides."""
    most, length = config.horizon.device_batch_size, config.model.max_seq_len
    unit = max(1, most // 4)  # rows; finer micro-batches would slow the step down for a reason of their own
    rows = max(1, round(horizon_of(config).total_batch_size * factor / length / unit)) * unit
    micro = max(n for n in range(1, most + 1) if rows % n == 0)
    return [f"--total-batch-size={rows * length}", f"--device-batch-size={micro}"]


def shorter(variant: Variant, share: float, name: str) -> Variant:
    """The variant with `share` of its steps, annealed to their end."""
    steps = horizon_of(config_of(variant.flags)).num_iterations
    return Variant(name, (*variant.flags, *steps_of(max(1, round(steps * share)))))


def pilot(variant: Variant, share: float) -> Variant:
    """A shorter one to measure a rate by. The full steps at the start of dynamic suffix training are fewer alike, or it would
    be slower than what it stands for."""
    found, suffix = shorter(variant, share, f"pilot-{variant.name}"), config_of(variant.flags).features["suffix"]
    if suffix.block_update_schedule != "dynamic_suffix":
        return found
    return Variant(found.name, (*found.flags, f"--dyn-warmup-steps={round(suffix.dyn_warmup_steps * share)}"))


def matched(variant: Variant, baseline_row: dict, pilot_row: dict | None, match: str) -> Variant:
    """The variant trained for as many FLOPs as the baseline's run, or, by its pilot's rate, for as many seconds. Rates and
    weight decay follow its own length (nanochat/recipe/horizon.py)."""
    if match == "flops":
        flops = baseline_row["flops_per_token"] * baseline_row["tokens_seen"]
        length = ["--num-iterations=-1", f"--target-flops={flops:.17g}"]
    else:
        assert pilot_row is not None, "equal time needs the rate of a pilot"
        seconds = pilot_row["train_time_sec"] / pilot_row["steps_done"]
        length = steps_of(max(1, math.floor(baseline_row["train_time_sec"] / seconds)))
    return Variant(variant.name, (*variant.flags, *length))


def steps_of(number: int) -> list[str]:
    """Flags that give a run so many steps, whatever else has set its length."""
    return [f"--num-iterations={number}", "--target-flops=-1"]


def interleaved(variants: list, index: int) -> list:
    """The order in which the `index`-th seed runs its variants: A B, then B A, so that drift falls on both alike."""
    return variants[::-1] if index % 2 else list(variants)
