"""The live view of a run: its lines, and whole runs on a pseudo-terminal, whose screen pyte shows."""

import codecs
import fcntl
import io
import logging
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from types import SimpleNamespace

import pytest

pyte = pytest.importorskip("pyte")

from nanochat.cli.paths import list_steps
from nanochat.common import Progress, UserError, format_duration
from nanochat.features import FEATURES
from nanochat.runtime.signals import Interrupted, Signals
from nanochat.training.config import parse_config
from nanochat.training.console import Console
from nanochat.training.live_view import LiveConsole, open_console, printed_above
from nanochat.training.run_view import ASCII, BLOCKS, Curve, RunView, glyphs_for, layer_map, sparkline, stop_hint
from processes import _train, started, tiny_flags

HIDE, SHOW = "\033[?25l", "\033[?25h"


def step_row(step: int, **columns) -> dict:
    return {"step": step, "smooth_loss": 3 + 8 / (step + 1), "dt_ms": 40.0, "lr_multiplier": 1.0, "train_time_sec": 0.04 * step,
            "step_kind": "full", "active_start": 0, "active_layers": 12, "peak_mem_mib": 1000.0} | columns


def view_of(steps: int = 300, **columns) -> RunView:
    view = RunView("a run", num_iterations=1000, tokens_per_step=4000, n_layer=12, max_train_seconds=-1, memory_mib=8000.0)
    for step in range(steps):
        view.add(step_row(step, **columns))
        if step % 50 == 0:
            view.add({"step": step, "val_bpb": 1 + 1 / (step + 1)})
    return view


def text_of(lines) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


@pytest.mark.parametrize("columns", [1, 12, 40, 80, 200])
@pytest.mark.parametrize("rows", [1, 5, 12, 24, 60])
def test_the_view_fits_into_any_terminal(columns, rows):
    view = view_of(step_kind="suffix", active_start=7, active_layers=5, mfu=0.4)
    view.doing = "evaluating " * 20
    for hint in (stop_hint(0, False), stop_hint(0, True), stop_hint(signal.SIGTERM, False)):
        text = text_of(view.lines(columns, rows, BLOCKS, hint))
        assert max(map(len, text)) <= max(columns - 1, 1) and len(text) <= max(rows - 3, 1) and text[-1] == ""


def test_what_a_wide_view_says():
    view = view_of(step_kind="suffix", active_start=7, active_layers=5, mfu=0.41, dt_ms=50.0)
    text = text_of(view.lines(80, 24, BLOCKS, stop_hint(0, False)))
    said = "\n".join(text)
    for part in ("300/1,000 | 30.0 %", "12s of training | eta 35s", "3.0267 | -0.0133 in 100 steps", "bpb ",
                 "1.0040 | best 1.0040 at step 250", "·······█████", "5 of 12 trained | suffix", "1,000 of 8,000 MiB | 12.5 %",
                 "80,000 tok/s | mean 80,000 | 50.0 ms per step | MFU 41.0 %",
                 "Ctrl-C: save and end after this step | twice: end at once, without saving"):
        assert part in said, said
    assert len(text) <= 11


def test_what_matters_least_is_left_out_of_a_short_view():
    text = "\n".join(text_of(view_of().lines(40, 12, BLOCKS, stop_hint(0, False))))
    assert "step " in text and "loss " in text and "bpb " in text and "\ntwice: end at once, without saving\n" in text
    assert "memory" in text and "── a run" not in text
    text = "\n".join(text_of(view_of(step_kind="suffix").lines(40, 12, BLOCKS, stop_hint(0, False))))
    assert "layers" in text and "memory" not in text


def test_a_view_before_the_first_step_and_the_last_state():
    view = RunView("r", num_iterations=0, tokens_per_step=1, n_layer=1, max_train_seconds=1.0, memory_mib=1.0)
    text = text_of(view.lines(80, 24, BLOCKS, []))
    assert "no step yet | started" in text[2] and len(text) == 4
    last = text_of(view_of().lines(80, 24, BLOCKS, [], changing=False))
    assert last[-1].startswith("speed") and not any("Ctrl-C" in line for line in last)


def test_a_run_that_goes_back_forgets_the_evaluations_it_will_repeat():
    view = view_of(120)
    assert list(view.evaluations) == [0, 50, 100]
    view.add(step_row(60))
    assert list(view.evaluations) == [0, 50] and view.steps == 61
    assert "+0.0000 in 0 steps" in "\n".join(text_of(view.lines(80, 24, BLOCKS, [])))


def test_the_time_left_ends_at_the_limit_of_the_training_time():
    view = view_of()
    view.max_train_seconds = 0.04 * 299 + 3
    assert "eta 3s" in text_of(view.lines(80, 24, BLOCKS, []))[2]


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, "01234567") == "01234567"
    assert sparkline([7, 0], 8, "01234567") == "70" and sparkline([1, 1], 8, "01") == "00" and sparkline([], 8, "01") == ""
    assert sparkline([5.0] * 100 + [1.0] * 100, 4, BLOCKS.levels) == "██▁▁"  # averages of groups
    assert sparkline([1e9] + [float(i) for i in range(19, 0, -1)], 20, "0123456789")[:3] == "999"  # the rest is not pressed flat
    assert sparkline([2.0, float("nan"), 1.0, float("inf")], 9, "01") == "10"
    assert sparkline([4, 3, 2, 1], 8, ASCII.levels).isascii()


def test_a_curve_stays_short():
    curve = Curve()
    for i in range(100_000):
        curve.add(float(i))
    assert len(curve.points) < Curve.MOST and curve.points == sorted(curve.points)
    assert curve.points[0] == (curve.stride - 1) / 2


def test_the_time_left_follows_what_steps_cost():
    """Of 1000 steps, those from 500 on cost four times as much: 300 are taken, in 0.01 s each."""
    view = view_of(step_kind="shallow", active_layers=2)
    shallow = "\n".join(text_of(view.lines(80, 24, BLOCKS, [])))
    view.cost_between = lambda start, end: end - start + 3 * max(0, end - max(start, 500))
    growing = "\n".join(text_of(view.lines(80, 24, BLOCKS, [])))
    assert "##.........." in "\n".join(text_of(view.lines(80, 24, ASCII, []))) and "2 of 12 trained | shallow" in growing
    seconds = view.recent[-1]
    assert f"eta {format_duration(700 * seconds)}" in shallow and f"eta {format_duration(2200 * seconds)}" in growing


def test_layer_map():
    assert layer_map(9, 3, 12, 40, ASCII) == ".........###"
    assert layer_map(0, 12, 12, 40, ASCII) == "#" * 12
    assert layer_map(95, 5, 100, 10, ASCII) == ".........#"
    assert layer_map(0, 2, 6, 40, ASCII) == "##...." and layer_map(0, 5, 100, 10, ASCII) == "#........."


@pytest.mark.parametrize("encoding, glyphs", [("utf-8", BLOCKS), ("ascii", ASCII), ("latin-1", ASCII), ("no such", ASCII)])
def test_glyphs(encoding, glyphs):
    assert glyphs_for(encoding) is glyphs


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes standard output a pseudo-terminal, in this process."""
    opened = []

    def make(**environment):
        for name, value in ({"TERM": "xterm"} | environment).items():
            monkeypatch.setenv(name, value)
        opened.extend(pty.openpty())
        monkeypatch.setattr(sys, "stdout", open(opened[-1], "w", closefd=False))
    yield make
    for fd in opened:
        os.close(fd)


def console_for(*flags):
    plan = SimpleNamespace(config=parse_config(FEATURES, list(flags)))  # all that is read of the plan before the training
    return open_console(plan, None, Signals())


def test_only_a_terminal_that_can_move_its_cursor_gets_a_view(terminal, monkeypatch, capsys):
    assert type(console_for()) is Console and capsys.readouterr().out == ""
    assert type(console_for("--ui=rich")) is Console
    assert capsys.readouterr().out == "note: --ui rich needs a terminal, so plain lines follow\n"
    terminal()
    assert type(console_for("--ui=rich")) is type(console_for()) is LiveConsole
    assert type(console_for("--ui=plain")) is Console
    monkeypatch.setenv("RANK", "1")
    assert type(console_for()) is Console
    monkeypatch.delenv("RANK")
    terminal(TERM="dumb")
    assert type(console_for()) is Console


def _without_rich(terminal, folder):
    """In a process that has not loaded rich: what the flag does where rich is broken, and where it is missing."""
    os.dup2(os.open(terminal, os.O_WRONLY), 1)
    os.environ["TERM"] = "xterm"
    (folder / "rich.py").write_text("raise ImportError('this rich is broken')")
    sys.path.insert(0, str(folder))
    for how in ("broken", "missing"):
        if how == "missing":
            sys.modules["rich"] = None
        assert type(console_for()) is type(console_for("--ui=plain")) is Console
        try:
            console_for("--ui=rich")
        except UserError as e:
            (folder / how).write_text(str(e))


def test_without_rich(tmp_path):
    master, slave = pty.openpty()
    process = started(_without_rich, os.ttyname(slave), tmp_path)
    process.join(60)
    assert process.exitcode == 0
    os.close(master)
    os.close(slave)
    assert (tmp_path / "broken").read_text().startswith("--ui rich: this rich is broken. Reinstall it")
    assert (tmp_path / "missing").read_text().startswith("--ui rich needs the package rich: pip install rich")


def test_flags_are_parsed_without_rich_and_a_resume_may_change_this_one():
    program = ("import sys; from nanochat.features import FEATURES; from nanochat.training.config import parse_config\n"
               "config = parse_config(FEATURES, ['--ui=rich'])\n"
               "assert not config.changed_since(config.flat() | {'ui': 'plain'})\n"
               "assert not {name for name in sys.modules if name.startswith('rich')}")
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_hint_is_what_signals_do():
    signals = Signals()
    with signals.install_handlers():
        assert stop_hint(signals.received, signals.raising)[0] == "Ctrl-C: save and end after this step"
        with pytest.raises(Interrupted), signals.raise_immediately():
            assert stop_hint(signals.received, signals.raising)[0] == "Ctrl-C: end now, nothing is lost"
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert stop_hint(signals.received, signals.raising) == ["SIGINT: this step, a checkpoint, the end",
                                                                "Ctrl-C: end at once, without saving"]


@pytest.fixture
def console():
    """A live console whose view is there, on a terminal of 80 columns that keeps what it gets."""
    from rich.console import Console as RichConsole  # not above: a process of a test imports this module and must not have it
    made = LiveConsole(RichConsole(file=io.StringIO(), force_terminal=True, width=80), None, None, Signals())
    made.view = view_of()
    return made


def test_what_is_printed_goes_above_as_it_is(console, capsys):
    long, output = "a path /" + "folder/" * 30, console.console.file
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("of the test").addHandler(handler)
    try:
        with printed_above(console):
            print(f"[bold]{long} 'text' 1.5\r\nsecond \033[31mred\033[0m")
            logging.getLogger("of the test").warning("from a logger")
            print("an unfinished line", end="", file=sys.stderr)
        logging.getLogger("of the test").warning("later")
    finally:
        logging.getLogger("of the test").removeHandler(handler)
    assert output.getvalue() == f"[bold]{long} 'text' 1.5\nsecond \033[31mred\033[0m\nfrom a logger\nan unfinished line\n"
    assert capsys.readouterr() == ("", "later\n")


def test_a_progress_bar_is_shown_in_the_view(console, capsys):
    with printed_above(console):
        progress = Progress("  arc", total=10, unit=" questions", plain_every=0.0)
        progress.tty, progress.interval = True, 0.0  # as on a terminal
        progress.update(4)
        assert console.view.doing.startswith("arc: 4 questions of 10 questions (40%)") and not console.console.file.getvalue()
        assert any(line.startswith("now    arc: 4 questions") for line in text_of(console.view.lines(80, 24, BLOCKS, [])))
        progress.update(6)
        progress.close()
        assert console.view.doing == ""
    assert re.fullmatch(r"  arc: 10 questions of 10 questions \(100%\).*\n", console.console.file.getvalue())


def _on_terminal(environment, terminal, argv, base):
    os.environ.update(environment)
    _train(argv, base, terminal, None, None)


class Terminal:
    """A run whose output and errors are a pseudo-terminal. raw: all that it got so far."""

    def __init__(self, argv, base, columns, rows, **environment):
        self.master, self.slave = pty.openpty()
        self.raw = ""
        self.resize(columns, rows)
        self.process = started(_on_terminal, {"TERM": "xterm-256color"} | environment, os.ttyname(self.slave), argv, base)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def resize(self, columns, rows):
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.columns, self.rows = columns, rows

    def _read(self):
        decoder = codecs.getincrementaldecoder("utf-8")()
        while not self.raw.endswith("\0"):
            self.raw += decoder.decode(os.read(self.master, 2**16))

    def wait_for(self, text, seconds=60):
        until = time.monotonic() + seconds
        while text not in self.raw:
            assert time.monotonic() < until and self.process.is_alive(), self.raw[-3000:]
            time.sleep(0.02)

    def end(self) -> list[str]:
        """Wait for the end; the lines of the screen, with those that have scrolled off."""
        self.process.join(120)
        os.write(self.slave, b"\0")  # the last byte: all before it has been read
        self.reader.join(20)
        for fd in (self.master, self.slave):
            os.close(fd)
        screen = pyte.HistoryScreen(self.columns, self.rows, history=1000, ratio=1)
        pyte.Stream(screen).feed(self.raw)
        assert not screen.cursor.hidden
        above = ["".join(line[x].data for x in range(self.columns)) for line in screen.history.top]
        return [line.rstrip() for line in [*above, *screen.display]]


@pytest.mark.slow
def test_a_run_on_a_terminal(base):
    run = Terminal(tiny_flags(base, "seen", "--num-iterations=40", "--save-every=10", "--sample-every=20",
                              "--block-update-schedule=dynamic_suffix"), base, 80, 24)
    lines = run.end()
    assert run.process.exitcode == 0, "\n".join(lines)
    said = "\n".join(lines)
    view = lines[next(i for i, line in enumerate(lines) if line.startswith("── seen ──")):]
    assert view[1].startswith("step   ━━━━") and "40/40 | 100.0 %" in view[1]
    assert [line.split()[0] for line in view[2:8]] == ["time", "loss", "bpb", "layers", "memory", "speed"], said
    assert said.count("── seen ──") == said.count("\nstep   ") == 1 and "Ctrl-C" not in said  # nothing is left of drawings
    assert run.raw.count(HIDE) == 1 and HIDE + SHOW in run.raw  # a kill cannot leave a terminal without a cursor
    for step in range(0, 40, 3):
        assert len(re.findall(rf"^step {step} \| validation \d\.\d{{6}} bits per byte", said, re.MULTILINE)) == 1
    assert said.index("step 40 | validation") < said.index("── seen ──") < said.index("dynamic_suffix: ")
    assert list_steps(base / "base_checkpoints" / "seen") == [10, 20, 30, 40]


@pytest.mark.slow
def test_ctrl_c_in_the_view_saves_and_leaves_the_terminal_in_order(base):
    run = Terminal(tiny_flags(base, "stopped", "--num-iterations=100000", "--eval-every=-1"), base, 80, 24)
    run.wait_for("Ctrl-C: save and end after this step | twice: end at once, without saving")
    run.wait_for(" tok/s")
    os.kill(run.process.pid, signal.SIGINT)
    lines = run.end()
    step, = list_steps(base / "base_checkpoints" / "stopped")
    assert run.process.exitcode == 130 and step > 0
    assert "SIGINT: this step, a checkpoint, the end | Ctrl-C: end at once, without saving" in lines
    assert any(line.startswith("interrupted: stopped by SIGINT. The last checkpoint is") for line in lines)


@pytest.mark.slow
def test_a_terminal_without_colours_that_becomes_small(base):
    # docker exec -e COLUMNS=120 would otherwise decide about the width, whatever the terminal has
    run = Terminal(tiny_flags(base, "small", "--num-iterations=100000", "--eval-every=-1", "--max-train-seconds=1.5"), base,
                   120, 30, NO_COLOR="1", COLUMNS="120")
    run.wait_for(" tok/s")
    run.resize(40, 12)
    lines = run.end()
    assert run.process.exitcode == 0, "\n".join(lines)
    assert not re.search(r"\033\[[0-9;]*3[0-7]m", run.raw) and "\033[1m" in run.raw
    last = lines[max(i for i, line in enumerate(lines) if line.startswith("step   ")):]
    assert [line.split()[0] for line in last[:5]] == ["step", "time", "loss", "memory", "speed"]
    assert len(last[0]) < 40 and re.search(r"eta \d+", last[1])
