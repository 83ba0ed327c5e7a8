"""The page of a run: its numbers are those of the records, its curves are drawn to scale, it loads nothing, and what is missing
or damaged is left out."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanochat.common import format_duration
from nanochat.features import FEATURES
from nanochat.training.build import build_run
from nanochat.training.config import parse_config
from nanochat.training.curves import MOST_POINTS, Curve, Plot, axis_ticks, below, block_map, chart, grouped, y_range
from nanochat.training.page import figure
from nanochat.training.report import report, report_run
from nanochat.training.run_index import StoredRun
from processes import tiny_flags, trained

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(base):
    """A run of which some steps train only the top blocks."""
    flags = tiny_flags(base, "suffix", "--depth=4", "--num-iterations=12", "--save-every=6", "--dyn-warmup-steps=2",
                       "--block-update-schedule=dynamic_suffix", "--target-metric-name=val_bpb", "--target-metric-threshold=100")
    return trained(build_run(parse_config(FEATURES, flags))).plan.run_dir


class Page(HTMLParser):
    """What a page holds. Fails where tags do not match."""
    VOID = {"meta", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.urls = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.urls += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        assert tag == "path"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_has_the_numbers_of_the_run_and_loads_nothing(folder):
    said = report_run(folder)
    assert said == f"report: {folder / 'report.html'}"
    text, result = (folder / "report.html").read_text(), json.loads((folder / "result.json").read_text())
    page = Page(text)
    assert page.urls == [] and not re.search(r"https?://|@import|url\(|<script|<link|<iframe", text)
    assert "default-src 'none'" in text and "width=device-width" in text and "prefers-color-scheme: dark" in text
    headline = (f"ok: 12 of 12 steps, {result['min_val_bpb']:.4f} bits per byte, "
                f"{format_duration(result['train_time_sec'])} of training")
    for known in (headline, figure(result["final_train_loss"]), figure(result["tokens_seen"]), figure(result["num_params"]),
                  f"{result['peak_mem_mib']:,.0f} MiB", format_duration(result["eval_time_sec"]), "--dyn-warmup-steps",
                  result["device"], result["git_commit"][:12], "300", "weight gradient", "best, last"):
        assert known in page.texts, known
    assert text.count("<svg") == 6 and "Steps by kind: warmup 2" in text
    order = [page.texts.index(title) for title in (
        "Results", "Time", "Memory", "Settings that differ from the defaults", "All settings", "Tokenizer and text", "Kernels",
        "Checkpoints", "Go on", "Machine and source")]
    assert order == sorted(order)


def test_every_command_of_the_page_is_accepted(base, folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "copied", ignore=shutil.ignore_patterns("*.safetensors"))
    result = json.loads((run / "result.json").read_text())
    for extra in (["--overwrite"], ["--resume-from-step", "latest", "--allow-change"]):
        (run / "result.json").write_text(json.dumps(result | {"argv": tiny_flags(base, "suffix", "--num-iterations=12", *extra)}))
        commands = re.findall(r"<pre>[^<]*-m scripts.base_train ([^<]*)</pre>", report(StoredRun(run)))
        longer, again = (parse_config(FEATURES, shlex.split(command)) for command in commands)
        assert (longer.run.resume_from_step, longer.horizon.num_iterations, longer.model_tag) == ("latest", 24, "copied")
        assert (again.run.resume_from_step, again.horizon.num_iterations, again.model_tag) == ("-1", 12, "copied-again")
        assert not again.run.overwrite and longer.run.allow_change


def test_neither_torch_nor_matplotlib_is_needed(folder):
    code = f"""import sys
from pathlib import Path
sys.modules["torch"] = sys.modules["matplotlib"] = None
from nanochat.training.report import report_run
print(report_run(Path({str(folder)!r})))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("report: "), done.stderr


def test_samples_are_shown_over_time_and_as_text(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "sampled")
    with open(run / "metrics.jsonl", "a") as f:
        for step in range(0, 1000, 100):
            f.write(json.dumps({"step": step, "samples": [f"<b>{step}\x1b[0m", "other"]}) + "\n")
    page = Page(report(StoredRun(run)))
    shown = [text for text in page.texts if text.startswith("<b>")]
    assert shown == ["<b>900\N{REPLACEMENT CHARACTER}[0m"] + [f"<b>{n}\N{REPLACEMENT CHARACTER}[0m" for n in (700, 500, 300, 100)]


def test_evaluations_of_checkpoints_are_shown(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "evaluated", ignore=shutil.ignore_patterns("*.safetensors"))
    (run / "eval_000012.json").write_text('{"step": 12, "bpb": {"train": 1.25, "val": 1.5}, "core": {"core_metric": 0.0625}}')
    (run / "eval_000006.json").write_text("cut off")
    assert {"Evaluations", "1.2500", "1.5000", "0.0625"} <= set(Page(report(StoredRun(run))).texts)


@pytest.mark.parametrize("missing", [["result.json"], ["metrics.jsonl"], ["config.json", "result.json", "metrics.jsonl"]])
@pytest.mark.parametrize("content", [None, b"", b"\0\xff[", b"[1]\n", b'{"step": "x"}\n'])
def test_records_that_are_missing_or_damaged_are_left_out(folder, tmp_path, missing, content):
    run = tmp_path / "r"
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in missing:
        (run / name).unlink()
        if content is not None:
            (run / name).write_bytes(content)
    text = report(StoredRun(run))
    Page(text)
    assert ("<svg" in text) == ("metrics.jsonl" not in missing)
    if "result.json" in missing:
        assert "unfinished: " in text and "Its process was killed" in text and "<h2>Time" not in text


def test_a_page_that_cannot_be_written_costs_a_line(tmp_path):
    assert report_run(tmp_path / "nowhere").startswith("no report: FileNotFoundError")


# ---- drawing

def test_a_curve_is_drawn_to_scale():
    svg = chart("title <1>", "x", "y", [Curve("a", [(0, 1.0), (5, 3.0), (10, 2.0)], "dots", 3)])
    x_ticks = {float(label): float(x) for x, label in re.findall(r'<text x="([\d.]+)" y="193">([\d.]+)<', svg)}
    y_ticks = {float(label): float(y) - 3.5 for y, label in re.findall(r'<text x="43" y="([\d.]+)">([\d.]+)<', svg)}
    points = [tuple(map(float, p)) for p in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert points[0] == points[1]  # the first point begins the line; it is also the end of the first group
    for (x, y), (px, py) in zip([(0, 1.0), (5, 3.0), (10, 2.0)], points[1:], strict=True):
        assert px == pytest.approx(x_ticks[0] + (x_ticks[10] - x_ticks[0]) * x / 10, abs=0.11)
        assert py == pytest.approx(y_ticks[1] + (y_ticks[3] - y_ticks[1]) * (y - 1) / 2, abs=0.11)
    assert "title &lt;1&gt;: a ends at 2.0000" in svg and "above the picture" not in svg
    assert chart("t", "x", "y", [Curve("a", [])]) == ""


def test_a_long_run_is_a_small_picture():
    svg = chart("t", "x", "y", [Curve("a", [(i, i % 7) for i in range(100_000)], kind) for kind in ("line", "band")])
    assert len(svg) < 15_000
    assert max(len(grouped(range(n))) for n in (1, 149, 150, 151, 301, 9999)) <= MOST_POINTS


def test_early_values_and_spikes_do_not_press_the_curve_flat():
    falling = [(i, 10.0 if i < 5 else 3.0 - i / 1000) for i in range(100)]
    low, high, highest = y_range([Curve("a", falling)])
    assert low < 2.901 and 2.99 < high < 3.1 and highest == 10.0
    spike = [(i, 9.0 if i == 700 else 3.0 - i / 1000) for i in range(1000)]
    assert y_range([Curve("a", spike)])[1] < 4
    assert "Values up to 9.0000 are above the picture." in chart("t", "x", "y", [Curve("a", spike)])
    alike = y_range([Curve("a", [(0, 2.0), (1, 2.0)])])
    assert alike[0] < 2.0 < alike[1]


def test_a_line_is_cut_where_it_crosses_the_edge():
    assert below([(0, 2.0), (1, 1.0), (2, 3.0), (3, 0.0)], 1.5) == [[(0.5, 1.5), (1, 1.0), (1.25, 1.5)], [(2.5, 1.5), (3, 0.0)]]
    assert below([(0, 1.0)], 1.5) == [[(0, 1.0)]] and below([(0, 2.0)], 1.5) == []


def test_the_map_shows_which_blocks_each_step_trained():
    svg = block_map("blocks", "step", [1, 2, 3, 4], [range(3), range(3), range(2, 3), range(2, 3)], blocks=3)
    plot, cells = Plot(4, 0.0, 3.0), {}
    for opacity, path in re.findall(r'class="cells" opacity="([\d.]+)" d="([^"]+)"', svg):
        for x, y, right in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)", path):
            cells[float(x), float(y), float(right)] = float(opacity)
    half, end = plot.x(2), plot.x(4)
    first_half = {(plot.x(0), plot.y(b + 1), half): 1.0 for b in (0, 1)}
    assert cells == first_half | {(half, plot.y(b + 1), end): 0.08 for b in (0, 1)} | {(plot.x(0), plot.y(3), end): 1.0}
    assert "2.0000 of 3 blocks were trained on average" in svg


@pytest.mark.parametrize("first, last, labels", [
    (0, 100, ["0", "20", "40", "60", "80", "100"]), (0, 17790, ["0", "5k", "10k", "15k"]),
    (2.31, 2.52, ["2.35", "2.40", "2.45", "2.50"]), (0, 3e6, ["0", "1M", "2M", "3M"])])
def test_ticks_are_round(first, last, labels):
    assert [label for _, label in axis_ticks(first, last, 5)] == labels


@pytest.mark.slow
def test_a_browser_reads_the_page(folder, tmp_path):
    browser = next((b for name in ("chromium", "chromium-browser", "google-chrome") if (b := shutil.which(name))), None)
    if not browser:
        pytest.skip("no Chromium here")
    report_run(folder)
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom",
                           (folder / "report.html").as_uri()], capture_output=True, text=True, timeout=60)
    assert re.search(r'id="status">ok: 12 of 12 steps', done.stdout)
