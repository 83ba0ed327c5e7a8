"""Every pair of flags: it is refused with advice, or it plans; and rows that hold all possible pairs of switches really run.

The values of a flag come from its type, choices and bounds, so a new feature's flags are tested without a line here. Pairs
are tried one by one for what refuses them; those that nothing refuses are packed into few command lines, each of which is
parsed and planned as `--explain` does. What fails only in threes is found if the packing happens to hold it.
"""

import random
from dataclasses import MISSING, fields
from itertools import combinations

import pytest

from nanochat.cli.flags import bounds, flag_name, flags_without_effect
from nanochat.common import UserError
from nanochat.features import FEATURES
from nanochat.training.build import build_run
from nanochat.training.config import Config, parse_config, validate
from nanochat.training.explain import explain_flags
from nanochat.training.loop import fit
from processes import anew

BASE = dict(depth=2, head_dim=16, aspect_ratio=16, max_seq_len=32, device_batch_size=2, num_iterations=20, device_type="cpu",
            compile=False, eval_tokens=256, eval_every=4, core_metric_every=-1, sample_every=-1, vocab_size=300)
VALUES = {  # where type and bounds say too little: sizes that stay small, and values that clash
    "depth": [2, 4], "aspect_ratio": [16, 48], "head_dim": [16, 32, 63], "max_seq_len": [32, 24],
    "device_batch_size": [2, 4, 3], "total_batch_size": [-1, 384, 100], "num_iterations": [20, -1, 4],
    "target_flops": [-1.0, 1e10], "vocab_size": [300, 400],
    "eval_every": [4, -1], "core_metric_every": [-1, 4], "sample_every": [-1, 4], "save_every": [-1, 4],
    "keep_last": [-1, 1, 0], "device_type": ["cpu", ""], "resume_from_step": ["-1", "latest", "soon"],
    "window_pattern": ["SSSL", "L", "SX"],
    "tracker": [[], ["none"], ["none", "wandb"]], "model_tag": [None, "a.b", "a/b"], "fp8_include_regex": [None, "mlp", "("],
    "fp8_exclude_regex": [None, "attn", "("], "target_metric_threshold": [None, 2.0],
}
# Some flags only mean something beside another: their pairs are tried with that one on.
CONTEXTS = {"": {}, "fp8": dict(fp8=True, fp8_emulate=True, fp8_min_dim=16),
            "dyn": dict(block_update_schedule="dynamic_suffix", dyn_warmup_steps=1, dyn_freeze_start_frac=0.0)}
PATHS = {"data", "val_data", "result_json", "compile_cache_dir"}
GROUPS = [f.type for f in fields(Config) if f.name != "features"] + [feature.Config for feature in FEATURES]
FLAGS = {f.name: f for group in GROUPS for f in fields(group)}


def values_of(name, base):
    f = FLAGS[name]
    default = BASE.get(name, f.default_factory() if f.default is MISSING else f.default)
    if name in PATHS:
        return [str(base / "text")] if name == "data" else [None, str(base / "text")]
    if name in VALUES:
        return VALUES[name]
    if f.metadata["choices"]:
        return [default, *(c for c in f.metadata["choices"] if c != default)][:3]
    if isinstance(default, bool):
        return [default, not default]
    if isinstance(default, (int, float)):
        low = -2 if bounds(f)[0] is None else bounds(f)[0]
        others = [type(default)(v) for v in (low, 0.5 if isinstance(default, float) else 3)]
        return [default, *(v for v in others if v != default)]
    return [default, "other"]


@pytest.fixture(scope="module")
def values(base):
    return {name: values_of(name, base) for name in FLAGS}


def problems_of(settings, profile=None, **given):
    """The problems of these values beside the base's, as the command line would say after parsing. profile: further values, of a
    file of flags."""
    typed = BASE | given | settings
    values = (profile or {}) | typed
    instances = [group(**{f.name: values[f.name] for f in fields(group) if f.name in values}) for group in GROUPS]
    core = [f.name for f in fields(Config) if f.name != "features"]
    features = {feature.name: instance for feature, instance in zip(FEATURES, instances[len(core):], strict=True)}
    config = Config(**dict(zip(core, instances[:len(core)], strict=True)), features=features)
    problems = flags_without_effect(instances, typed) + [p for i in instances if hasattr(i, "validate") for p in i.validate()]
    return problems + validate(config) + [p for feature in FEATURES for p in feature.validate(config)]


def argv_of(settings):
    argv = []
    for name, value in (BASE | settings).items():
        default = FLAGS[name].default
        if isinstance(value, bool):
            argv += [flag_name(name)] if value else ["--no-" + flag_name(name)[2:]] if default is True else []
        elif isinstance(value, list):
            argv += [flag_name(name), *value] if value else []
        elif value is not None:
            argv.append(f"{flag_name(name)}={value}")
    return argv


def covering_rows(values, pairs, allowed, seed=0):
    """Rows {name: value} that hold every one of `pairs`, ((name, index), (name, index)) with indices into `values`, each
    `allowed`. Every row begins with a pair that none held yet and takes, flag by flag in random order, the value that
    brings the most new pairs."""
    dice, left, rows = random.Random(seed), set(pairs), []
    while left:
        first, second = sorted(left, key=str)[dice.randrange(len(left))]
        row = dict([first, second])
        names = [name for name in values if name not in row]
        dice.shuffle(names)
        for name in names:
            gains = [(sum(tuple(sorted([(name, i), other])) in left for other in row.items()), -i)
                     for i in range(len(values[name]))]
            for gain, i in sorted(gains, reverse=True):
                if not gain or allowed(row | {name: -i}):
                    row |= {name: -i} if gain else {}
                    break
        left -= {tuple(sorted(pair)) for pair in combinations(row.items(), 2)}
        rows.append({name: values[name][i] for name, i in row.items()})
    return rows


def all_pairs(values):
    for a, b in combinations(sorted(values), 2):
        for i in range(len(values[a])):
            for j in range(len(values[b])):
                yield (a, i), (b, j)


def test_every_flag_has_values_to_pair(values):
    assert [name for name, choices in values.items() if len(choices) < 2] == ["data"]
    assert set(VALUES) | PATHS <= set(FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("context, enough", [("", 10_000), ("fp8", 2_000), ("dyn", 5_000)])
def test_every_pair_is_refused_with_advice_or_plans(values, context, enough):
    """Refused where the pair alone, beside the base, has a problem; all others are planned, many at a time."""
    possible, refused, beside = set(), 0, CONTEXTS[context]
    for (a, i), (b, j) in all_pairs(values):
        if not (a.startswith(context) or b.startswith(context)):
            continue
        problems = problems_of({a: values[a][i], b: values[b][j]}, **beside)
        refused += bool(problems)
        assert all(isinstance(p, str) and ("--" in p or "FP8" in p) and len(p) > 20 for p in problems), (a, b, problems)
        if not problems:
            possible.add(((a, i), (b, j)))
    assert refused > 100 and len(possible) > enough

    def allowed(row):
        return not problems_of({name: values[name][i] for name, i in row.items()}, **beside)
    for row in covering_rows(values, possible, allowed):
        try:
            config = parse_config(FEATURES, argv_of(beside | row))
        except UserError as e:
            pytest.fail(f"nothing refuses {argv_of(beside | row)}, but parsing says {e}")
        parsed = config.flat() | vars(config.data)  # a record names text in the base directory by where it lies there
        assert all(parsed[name] == value for name, value in row.items())
        assert "estimated memory" in explain_flags(config)


def test_what_is_refused_names_the_flag_and_exits_with_2(values):
    """Through the real parser, for each value that is wrong by itself."""
    wrong = [(name, value) for name in values for value in values[name] if problems_of({name: value})]
    assert len(wrong) >= 15
    for name, value in wrong:
        with pytest.raises(UserError) as e:
            parse_config(FEATURES, argv_of({name: value}))
        assert "--" in str(e.value), (name, value)


SWITCHES = ["bf16_momentum", "cast_once", "chunked_ce", "deferred_loss_logging", "fp8", "fp8_emulate",
            "fp8_skip_lm_head", "fp8_skip_attn_qk", "fp8_weight_grad_bf16", "fp8_no_allow_in_graph", "block_update_schedule",
            "suffix_detach_x0",
            "dyn_relevance_metric", "dyn_adapt_budget", "dyn_final_recovery_mode", "on_divergence", "auto_batch", "dtype",
            "window_pattern", "warmdown_shape", "save_every", "keep_last", "sample_every", "tracker"]
ALWAYS = dict(num_iterations=5, warmup_steps=2, total_batch_size=128)
PROFILE = dict(dyn_warmup_steps=1, dyn_freeze_start_frac=0.0, dyn_final_full_frac=0.2, static_active_layers=1,
               dyn_min_active_layers=1)  # a file may name flags that some rows give no effect


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
def test_pairs_of_switches_really_run(values, base, context, tmp_path):
    always, file = ALWAYS | CONTEXTS[context], tmp_path / "pairs.flags"
    file.write_text(" ".join(f"{flag_name(name)}={value}" for name, value in PROFILE.items()))
    values = {name: [v for v in values[name] if v != "latest"] for name in SWITCHES} | {"save_every": [-1, 2]}

    def allowed(row):
        return not problems_of(always | {name: values[name][i] for name, i in row.items()}, PROFILE)
    possible = {pair for pair in all_pairs(values) if any(name.startswith(context) for name, _ in pair) and allowed(dict(pair))}
    assert len(possible) > 100
    for row in covering_rows(values, possible, allowed):
        argv = argv_of(always | row | {"data": str(base / "text"), "model_tag": "pairs"})
        config = parse_config(FEATURES, anew([f"@{file}", *argv]))
        try:
            run = build_run(config)
        except UserError as e:
            assert "float16" in str(e) and row.get("dtype") == "float16", (row, e)
            continue
        assert fit(run) == 0, row
        assert run.state.step == 5
