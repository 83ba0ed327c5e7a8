"""Containers A and B: every script on a tiny model, the schema of the results, flags checked first."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.benchmarks import trained_model
from nanochat.benchmarks.flags import AttemptFlags
from nanochat.benchmarks.interleaved_training import Training, train_interleaved
from nanochat.benchmarks.result_file import save
from nanochat.common import UserError
from nanochat.runtime import timing

ROOT = Path(__file__).resolve().parents[2]
A, B = ROOT / "attempts" / "container_a_required_flops", ROOT / "attempts" / "container_b_effective_flops"
sys.path[:0] = [str(A), str(B)]  # as for scripts that are run

import attention_backend_bench as attention
import data_aware_low_rank_plus_diag as data_aware
import loss_aware_low_rank_recovery as recovery
import matrix_approx_bench as matrix
import structured_sparsity_mlp_bench as sparse

SCHEMA = json.loads((ROOT / "attempts" / "schema.json").read_text())
CPU = "--device=cpu --dtype=float32 --no-plot".split()
SEEN = "--batches=2 --val-tokens=256".split()
FEW = [*SEEN, "--repeats=2"]
SCRIPTS = {matrix: [*FEW, "--shares", "0.25", "0.5"],
           data_aware: [*FEW, "--shares", "0.25", "--rounds=1", "--optimizer-steps=500"],
           recovery: [*SEEN, "--shares", "0.25", "--init", "svd", "random", "--steps=4"],
           sparse: [*FEW, "--keep", "0.5", "--block=8", "--steps=3"],
           attention: "--seq-lens 32 --head-dims 16 --windows -1 8 --groups 2 --heads=2 --tokens=64 --repeats=2".split()}
by_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)


@pytest.fixture(scope="module")
def trained(base):
    """A tiny trained model, known as `tiny` in the base directory."""
    from nanochat.features import FEATURES
    from nanochat.training.build import build_run
    from nanochat.training.config import parse_config
    from nanochat.training.loop import fit
    run = build_run(parse_config(FEATURES, (
        "--depth=2 --aspect-ratio=16 --head-dim=16 --max-seq-len=32 --window-pattern=L --vocab-size=300 --device-batch-size=4 "
        "--total-batch-size=128 --num-iterations=60 --warmup-steps=5 --lr-multiplier=4 --eval-every=-1 --core-metric-every=-1 "
        "--sample-every=-1 --no-compile "
        f"--dtype=float32 --device-type=cpu --model-tag=tiny --data={base / 'text'}").split()))
    assert fit(run) == 0
    return run.plan.run_dir


@pytest.fixture(scope="module")
def results(trained, tmp_path_factory):
    """Each script's JSON, which must be strict."""
    folder, found = tmp_path_factory.mktemp("results"), {}
    for script, flags in SCRIPTS.items():
        path = folder / f"{script.__name__}.json"
        assert script.main([*CPU, *flags, "--checkpoint=tiny", f"--json-out={path}"]) == 0
        found[script] = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    return found


# --- what comes out ---------------------------------------------------------------------------------------------------

@by_script
def test_the_json_follows_the_schema(results, script):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(SCHEMA).validate(results[script])


def test_the_schema_can_fail(results):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for script, spoil in ((matrix, lambda row: row.pop("speedup_training")), (recovery, lambda row: row["step_ms"].pop("n")),
                          (attention, lambda row: row["backends"]["masked"].update(error="none"))):
        spoiled = json.loads(json.dumps(results[script]))
        spoil(next(iter(spoiled["results"].values())))
        assert not validator.is_valid(spoiled), script.__name__


def test_stored_results_follow_the_schema_and_say_how_they_were_made():
    stored = sorted((ROOT / "attempts" / "results").rglob("*.json"))
    if not stored:
        pytest.skip("nothing is stored yet")
    for path in stored:
        content = json.loads(path.read_text())
        assert (ROOT / content["script"]).is_file() and f"--json-out={path.relative_to(ROOT)}" in content["argv"]
    jsonschema = pytest.importorskip("jsonschema")
    for path in stored:
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(path.read_text()))


def test_low_rank_by_kind_and_rank(results):
    result = results[matrix]
    rows, model = result["results"], result["config"]
    assert model["model"]["run"] == "tiny" and set(rows) == {
        *(f"{kind} rank {rank}" for kind in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
          for rank in (8, 16)), "model share 0.25", "model share 0.5"}
    for name, row in rows.items():
        assert row["speedup_training"]["n"] == 2
        if not name.startswith("model"):
            assert row["weight_error"] == pytest.approx(row["eckart_young"], rel=1e-4), "theory and matrix differ"
            assert row["flops_ratio"] == pytest.approx(row["rank"] * (row["out"] + row["in"]) / (row["out"] * row["in"]))
    assert rows["mlp.c_fc rank 16"]["output_error"] < rows["mlp.c_fc rank 8"]["output_error"]
    assert result["traces"]["break_even_rank"]["mlp.c_fc"]["by_counting"] == pytest.approx(32 * 128 / 160)


def test_full_rank_leaves_the_model_as_it_was(trained, tmp_path):
    path = tmp_path / "full.json"
    assert matrix.main([*CPU, *FEW, "--checkpoint", str(trained), "--ranks", "32", "--json-out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["results"]["model rank 32"]["bpb"] == pytest.approx(result["config"]["bpb_dense"], rel=1e-4)
    assert result["config"]["bpb_without_block_matrices"] != pytest.approx(result["config"]["bpb_dense"], rel=1e-4)


def test_random_matrices_have_no_quality(trained, tmp_path):
    path = tmp_path / "random.json"
    matrix.main([*CPU, *FEW, "--checkpoint=tiny", "--shares", "0.5", "--random", f"--json-out={path}"])
    result = json.loads(path.read_text())
    assert result["results"]["model share 0.5"]["bpb"] is None and result["config"]["bpb_dense"] is None


def test_the_data_aware_fit_is_the_best_on_its_training_text(results):
    result = results[data_aware]
    svd, aware, diagonal = (result["results"][f"{method} share 0.25"] for method in data_aware.METHODS)
    assert diagonal["output_error_fit"] <= aware["output_error_fit"] + 1e-9 <= svd["output_error_fit"] + 2e-9
    assert svd["weight_error"] <= aware["weight_error"]
    checked = result["config"]["closed_form_check"]
    assert checked["closed_form"] * (1 - 1e-6) <= checked["optimizer"] <= checked["closed_form"] * 1.02


def test_recovery_is_compared_with_a_dense_copy_that_trains_too(results):
    rows, traces = results[recovery]["results"], results[recovery]["traces"]
    assert list(rows) == ["dense", "svd share 0.25", "random share 0.25"]
    dense = rows["dense"]
    assert dense["rise_before_pct"] == dense["rise_vs_dense_pct"] == 0 and dense["speedup_step"]["median"] == 1
    assert rows["dense"]["bpb_after"] != rows["dense"]["bpb_before"]
    for name, row in rows.items():
        assert [step for step, _ in traces[name]["bpb"]] == [0, 1, 2, 3, 4] and len(traces[name]["train_loss"]) == 4
        assert (row["bpb_before"], row["bpb_after"]) == (traces[name]["bpb"][0][1], traces[name]["bpb"][-1][1])
        assert row["step_ms"]["n"] == 4
    assert rows["random share 0.25"]["bpb_after"] < rows["random share 0.25"]["bpb_before"]


def test_every_pattern_has_its_quality_and_its_speed_or_a_reason(results):
    rows = results[sparse]["results"]
    assert set(rows) == {"neurons_by_weight keep 0.5", "neurons keep 0.5", "neurons refit keep 0.5", "groups keep 0.5",
                         "groups refit keep 0.5", "weights_bsr keep 0.5", "weights_2_4", "hidden_2_4"}
    for name, row in rows.items():
        assert 0 < row["mlp_error"] < 1.5 and (row["speedup_forward"] is None) == (row["why_not_timed"] is not None), name
        assert row["kept"] == (0.75 if name == "hidden_2_4" else 0.5), name
        assert (row["rise_vs_dense_pct"] is not None) == ("refit" in name or "2_4" in name), name
    if not torch.cuda.is_available():
        assert "NVIDIA" in rows["weights_2_4"]["why_not_timed"]
    assert 0 < results[sparse]["config"]["hidden_zero_share"] < 1


# --- attention --------------------------------------------------------------------------------------------------------

def test_every_backend_has_a_row_and_the_fastest_is_the_fastest(results):
    from nanochat.flash_attention import BACKENDS
    assert set(attention.LIBRARY) == set(BACKENDS)
    rows = results[attention]["results"]
    assert list(rows) == ["T 32, D 16, full, 2 to a key head", "T 32, D 16, window 8, 2 to a key head"]
    for row in rows.values():
        for what in ("forward", "training"):
            times = {name: b[f"{what}_ms"]["median"] for name, b in row["backends"].items() if f"{what}_ms" in b}
            assert {"masked", "chunked", "sdpa_math"} <= set(times) and row[f"fastest_{what}"] == min(times, key=times.get)
            assert row[f"chosen_{what}_slower"] is not None
        for name, backend in row["backends"].items():
            assert ("forward_ms" in backend) != (backend["why_not"] is not None), (name, backend)
            assert backend["error"] is None or backend["error"] < 1e-4, name
    full, windowed = rows.values()
    assert full["backends"]["blocks"]["why_not"] and windowed["backends"]["sdpa"]["why_not"]


def test_flops_count_visible_keys():
    flags = attention.BenchFlags(tokens=64, heads=2)
    for window in (-1, 0, 5):
        seen = sum(1 for q in range(32) for k in range(32) if 0 <= q - k and (window < 0 or q - k <= window))
        assert attention.flops(attention.Shape(32, 16, window, 1), flags) == 4 * 2 * 2 * 16 * seen


def test_a_backend_that_is_wrong_is_not_timed(monkeypatch):
    from nanochat import flash_attention
    masked = flash_attention.BACKENDS["masked"][0]()
    monkeypatch.setitem(flash_attention.BACKENDS, "chunked", (lambda: lambda *inputs: 1.1 * masked(*inputs), True, True))
    flags = attention.BenchFlags(backends=["masked", "chunked"], tokens=64, heads=2, repeats=2)
    row = attention.measure(attention.Shape(32, 16, 8, 1), None, flags, torch.device("cpu"), torch.float32)
    assert "wrong" in row["backends"]["chunked"]["why_not"] and row["fastest_training"] == "masked"


def test_a_backend_without_a_backward_is_compared_by_its_forward():
    def forward_only(q, k, v, window):
        if q.requires_grad:
            raise NotImplementedError("no gradients here\nand more")
        return q + window
    *tensors, dy = (torch.full((1, 4, 2, 8), float(i)) for i in range(4))
    found, reason = attention.output_and_gradients(forward_only, tensors, dy, 2)
    assert len(found) == 1 and torch.equal(found[0], tensors[0] + 2) and reason == "no backward: no gradients here"


def test_the_verdict_counts_shapes_where_another_backend_was_faster():
    rows = {str(q1): {"chosen_training_slower": {"median": q1 + 0.5, "q1": q1}} for q1 in (0.9, 1.0, 1.25)}
    rows["untimed"] = {"chosen_training_slower": None}
    assert attention.verdict(rows).endswith("in 1 of 3 shapes: 1.75 times as fast at most")
    assert attention.verdict({}).endswith("in 0 of 0 shapes")


def test_queries_are_the_models_own(trained):
    flags = attention.BenchFlags(tokens=96, heads=4)
    model_on_text = trained_model.ModelFlags(checkpoint="tiny").open("smoke", torch.device("cpu"), torch.float32)
    q, k, v = attention.model_features(model_on_text, 96)
    assert q.shape == k.shape == v.shape == (96, 2 * 32)
    shaped, *_ = attention.inputs([q, k, v], attention.Shape(48, 32, -1, 2), flags, torch.device("cpu"), torch.float32)
    assert shaped.shape == (2, 48, 4, 32)
    assert torch.equal(shaped[1, 0, 0], q[48, :32]) and torch.equal(shaped[0, 5, 3], q[5, 32:])
    assert q.view(96, 4, 16).square().mean(-1).allclose(torch.tensor(1.2**2), rtol=1e-2), "q is normed and scaled"


# --- the model and what it sees ---------------------------------------------------------------------------------------

def test_second_moments_are_those_of_a_layers_inputs(trained):
    model_on_text = trained_model.ModelFlags(checkpoint="tiny").open("smoke", torch.device("cpu"), torch.float32)
    named = trained_model.block_matrices(model_on_text.model)
    assert len(named) == 12 and {trained_model.kind_of(name) for name in named} == {
        "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    batches = model_on_text.train_batches(2, seed=1)
    moments = trained_model.second_moments(model_on_text.model, named, batches)
    xs = [trained_model.inputs_of(model_on_text.model, named, x) for x, _ in batches]
    for name in named:
        x = torch.cat([seen[name] for seen in xs]).double()
        torch.testing.assert_close(moments[name], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert not named[next(iter(named))]._forward_pre_hooks


def test_a_variant_leaves_the_model_alone(trained):
    model_on_text = trained_model.ModelFlags(checkpoint="tiny").open("smoke", torch.device("cpu"), torch.float32)
    val = model_on_text.val_batches(256)
    before = model_on_text.bpb(val)
    model = model_on_text.variant(lambda name, layer: torch.nn.Linear(*layer.weight.shape[::-1]) if "c_fc" in name else None)
    assert model_on_text.bpb(val, model) != before == model_on_text.bpb(val)
    assert model.transformer.h[0].attn.c_q is not model_on_text.model.transformer.h[0].attn.c_q


def test_interleaved_training_changes_only_its_parameters(trained):
    model_on_text = trained_model.ModelFlags(checkpoint="tiny").open("smoke", torch.device("cpu"), torch.float32)
    runs = {}
    for name in ("one", "other"):
        model = model_on_text.variant(lambda *_: None)
        runs[name] = Training(model, [model.transformer.h[1].mlp.c_fc.weight], lr=1e-3)
    train_interleaved(model_on_text, runs, steps=3, seed=5, val=model_on_text.val_batches(256))
    one, other = (run.model.state_dict() for run in runs.values())
    assert all(torch.equal(one[name], other[name]) for name in one), "they get the same batches"
    moved = {name for name, before in model_on_text.model.state_dict().items() if not torch.equal(before, one[name])}
    assert moved == {"transformer.h.1.mlp.c_fc.weight"}


def test_a_diverging_run_ends_the_attempt(trained):
    model_on_text = trained_model.ModelFlags(checkpoint="tiny").open("smoke", torch.device("cpu"), torch.float32)
    model = model_on_text.variant(lambda *_: None)
    runs = {"wild": Training(model, list(model.transformer.h[1].mlp.parameters()), lr=1e30)}
    with pytest.raises(UserError, match="wild"):
        train_interleaved(model_on_text, runs, steps=2, seed=5, val=model_on_text.val_batches(256), evaluations=1)


def test_the_small_models_shape_is_known_before_it_is_trained():
    for preset in trained_model.SMALL:
        shape = trained_model.ModelFlags().shape(preset)
        assert shape.n_embd % shape.n_head == 0 and shape.n_embd % 64 == 0
    assert set(trained_model.SMALL) == set(matrix.PRESETS) == set(attention.PRESETS)


def test_short_calls_are_timed_together():
    count = [0]

    def call():
        count[0] += 1
    times = timing.time_in_turn({"short": call}, torch.device("cpu"), repeats=3, warmup=2, at_least=0.001)
    assert len(times["short"]) == 3 and count[0] > 100


def test_a_speedup_is_taken_pair_by_pair():
    assert timing.speedup([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == {"median": 2, "q1": 2, "q3": 2, "n": 3}


# --- flags ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, wrong, names", [
    (matrix, "--ranks 33", "--ranks"),
    (matrix, "--ranks 4 --shares 0.5", "--shares"),
    (matrix, "--ranks 0", "--ranks"),
    (matrix, "--shares 1.5", "--shares"),
    (matrix, "--checkpoint nothing", "--checkpoint"),
    (matrix, "--step 7", "step 7"),
    (matrix, "--json-out .", "--json-out"),
    (data_aware, "--shares 0", "--shares"),
    (data_aware, "--json-out {file}/x.json", "--json-out"),
    (recovery, "--init svdd", "--init"),
    (recovery, "--steps 1", "--steps"),
    (sparse, "--block 12", "--block"),
    (sparse, "--keep 2", "--keep"),
    (attention, "--groups 3 --heads 4", "--groups"),
    (attention, "--seq-lens 64 --tokens 32", "--tokens"),
    (attention, "--seq-lens 8 --windows 100", "--seq-lens"),
    (attention, "--backends fa5", "--backends"),
])
def test_wrong_flags_are_refused_before_anything_is_done(script, wrong, names, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(AttemptFlags, "open_device", lambda self: pytest.fail("it went on"))
    (tmp_path / "file").write_text("kept")
    argv = ["--checkpoint=tiny", f"--json-out={tmp_path / 'new' / 'x.json'}", *wrong.format(file=tmp_path / "file").split()]
    with pytest.raises(UserError, match=names):
        script.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@by_script
def test_wrong_flags_are_reported_from_any_folder_before_torch_is_loaded(script, tmp_path):
    code = f"""import sys, runpy
sys.argv, sys.path[0] = ["x", "--no-such-flag", "--dtype=bf16"], {str(Path(script.__file__).parent)!r}
try: runpy.run_path({str(script.__file__)!r}, run_name="__main__")
except SystemExit as e: sys.exit(9 if "torch" in sys.modules else e.code)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "--no-such-flag" in done.stderr and "--dtype" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_picture_is_saved_beside_it(results, tmp_path):
    pytest.importorskip("matplotlib")
    for script, result in results.items():
        save(str(tmp_path / "x.json"), result, script.draw)
        assert (tmp_path / "x.png").stat().st_size > 10_000, script.__name__
        (tmp_path / "x.png").unlink()


@pytest.mark.parametrize("folder", [A, B], ids=lambda p: p.name)
def test_every_flag_in_the_readmes_exists(folder):
    groups = [module.BenchFlags for module in SCRIPTS] + [trained_model.ModelFlags]
    known = {f"--{name.replace('_', '-')}" for group in groups for name in group.__dataclass_fields__} | {"--help"}
    text = (folder / "README.md").read_text() + (ROOT / "attempts" / "README.md").read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) <= known | {"--record", "--metric", "--plot"}


def test_the_scripts_own_names_are_their_paths():
    for script in SCRIPTS:
        assert (ROOT / script.SCRIPT).samefile(script.__file__)
        assert runpy.run_path(script.__file__, run_name="other")["SCRIPT"] == script.SCRIPT
