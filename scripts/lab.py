"""The lab: is a change to training real? It runs base_train many times, compares like with like, and says what it found.

    python -m scripts.lab compare --profile cpu --candidate "--warmdown-shape=cosine" --seeds 1 2 --max-seeds 6
    python -m scripts.lab gate    --profile gpu --candidate "--fp8"        # the same, and kills and resumes a run
    python -m scripts.lab sweep B --profile cpu                            # a template by its letter, or a file of yours
    python -m scripts.lab noise   --profile cpu --seeds 1 2 3 4            # A against A: what can this machine tell?
    python -m scripts.lab miniseries --profile gpu --depths 6 8 12 --candidate "--warmdown-shape=cosine"
    python -m scripts.lab run     --profile cpu --candidate "--lr-multiplier=x1.1"   # no comparison, rows and a table
    python -m scripts.lab run     --profile cpu --variant d4= d6="--depth=6" --columns "variant num_params val_bpb:.4f"
    python -m scripts.lab report DIR                                       # its CSV and HTML anew
    python -m scripts.lab cycle {start,phase,rollback,status}              # the book-keeping of a cycle

The same command goes on where it was stopped, and may be started by several workers that share --out. The last line is the
verdict. Exit status: 1 where a run failed (the others are kept), 2 for a wrong command line, 130 after Ctrl-C.
"""

import csv
import hashlib
import io
import json
import re
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nanochat.cli.flags import LARGEST_SEED, flag, parse, raise_problems
from nanochat.cli.paths import output_problem, writable_base_dir
from nanochat.cli.program import cli
from nanochat.common import UserError, format_table, get_base_dir, print0, resolve
from nanochat.lab import cycle as cycles, plan, stats
from nanochat.runtime.files import write_atomic


@dataclass
class LabFlags:
    """The experiment"""
    profile: str = flag("cpu-smoke", f"flags of every run: {', '.join(plan.profiles())}, or a file of flags; '' has none")
    baseline: str = flag("", "further flags of base_train for every run, the baseline's too", metavar='"FLAGS"')
    candidate: str = flag("", "what the candidate has on top of them", metavar='"FLAGS"')
    seeds: list[int] = flag([1, 2], "the same for baseline and candidate", low=0, high=LARGEST_SEED)
    max_seeds: int = flag(-1, "take more, one at a time, while the verdict is inconclusive; -1 takes no more")
    match: str | None = flag(None, "what is to be equal; free: each has the length its flags give. By default steps; of "
                                   "`lab run` free", choices=plan.MATCHES)
    out: str | None = flag(None, "folder of the experiment; by default one under $NANOCHAT_BASE_DIR/lab/", metavar="DIR")
    nproc_per_node: int = flag(1, "processes of a run, one per GPU, started by torchrun", low=1)
    retry_failed: bool = flag(False, "run cells again that failed")
    keep_checkpoints: bool = flag(False, "keep the checkpoints of runs that ended well")


@dataclass
class TableFlags:
    """What is run, and shown"""
    variant: list[str] = flag([], "a run by this name, with flags on top of the baseline's; several after one another",
                              metavar='NAME="FLAGS"')
    columns: str = flag("", 'of the table, which then has a row per run: "variant name=field name:format ..."; fields of '
                            "result.json, of runs.csv, and flags", metavar='"COLUMNS"')
    show_output: bool = flag(False, "show what the runs print, instead of keeping it in log.txt")

    def validate(self):
        names = [text.partition("=")[0] for text in self.variant]
        problems = [f"--variant takes NAME=\"FLAGS\", a name of letters, digits, '.', '_', '+' and '-', got {text!r}"
                    for text, name in zip(self.variant, names, strict=True)
                    if "=" not in text or not re.fullmatch(plan.NAME, name)]
        return problems + [f"--variant {name} is there twice" for name in set(names) if names.count(name) > 1]


@dataclass
class JudgeFlags:
    """The verdict"""
    calibrate: bool = flag(True, "run the baseline at 97 and 94 % of the horizon too: what is a step worth?")
    control: bool = flag(False, "a hidden candidate that trains 5 % less; where it would be promoted, nothing is")
    horizons: list[float] = flag([], "shares of the steps to train all at too, such as 0.25 0.5 0.71, to extrapolate the time "
                                 "to a target that is not reached", low=0.05, high=0.99)
    depths: list[int] = flag([], "of the miniseries", low=1)
    change: str | None = flag(None, "the change's name in the log; by default the candidate's flags", metavar="TEXT")
    log: str | None = flag(None, "add the verdict to this log (Markdown), such as dev/LOG.md", metavar="PATH")
    cycle: str | None = flag(None, "take the target from this file of cycles, and record the decision there", metavar="PATH")

    def validate(self):
        return ["--horizons takes three or more different shares: fewer say nothing about where the curve goes"] \
            if self.horizons and len(set(self.horizons)) < 3 else []


@dataclass
class CycleFlags:
    """The cycle"""
    file: str | None = flag(None, "the file of cycles; by default $NANOCHAT_BASE_DIR/lab/cycles.json", metavar="PATH")
    name: str | None = flag(None, "start: the cycle's name")
    target_metric_name: str = flag("val_bpb", "start: the metric of the cycle", choices=("val_bpb", "smooth_loss"))
    target_metric_threshold: float | None = flag(None, "start: its threshold")
    phase: str | None = flag(None, f"phase: {', '.join(cycles.PHASES)}", choices=tuple(cycles.PHASES))
    state: str = flag("done", "phase: what it is now", choices=cycles.STATES)
    change: str | None = flag(None, "rollback: the promoted change that goes off by default", metavar="TEXT")
    reason: str | None = flag(None, "rollback: why", choices=cycles.ROLLBACK)
    log: str = flag("dev/LOG.md", "rollback: the change log", metavar="PATH")


COMMANDS = ("run", "compare", "gate", "sweep", "noise", "miniseries", "report", "cycle")
NOT_FOR = {  # flags that a command has no use for
    "run": "max_seeds calibrate control horizons depths change log", "compare": "depths", "gate": "depths",
    "sweep": "candidate match depths", "noise": "candidate match max_seeds control horizons depths change log"}
POSITIONAL = {"sweep": "TEMPLATE", "report": "DIR", "cycle": "ACTION"}


def main() -> int:
    argv = sys.argv[1:]
    if argv[:1] in (["-h"], ["--help"], []):
        print(__doc__)
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        raise UserError(f"{command} is not a command of the lab: choose one of {', '.join(COMMANDS)}, or --help")
    what = None
    if command in POSITIONAL and not {"-h", "--help"} & set(rest):
        if not rest or rest[0].startswith("-"):
            raise UserError(f"lab {command} {POSITIONAL[command]}: say which; templates are {', '.join(plan.templates())}")
        what, rest = rest[0], rest[1:]
    groups = {"cycle": [CycleFlags], "report": [], "run": [LabFlags, JudgeFlags, TableFlags]}.get(
        command, [LabFlags, JudgeFlags])
    flags = parse(groups, rest, prog=f"python -m scripts.lab {command}")
    if command == "report":
        return remake_report(resolve(what))
    if command == "cycle":
        return keep_cycle(what, *flags)
    return Experiment(command, what, *flags).carry_out()


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


class Experiment:
    """A command that runs cells: everything wrong with it is found before the first one starts."""

    def __init__(self, command: str, template: str | None, flags: LabFlags, judging: JudgeFlags,
                 shown: TableFlags | None = None):
        self.command, self.flags, self.judging, self.shown = command, flags, judging, shown or TableFlags()
        self.check()
        self.cycles = resolve(judging.cycle) if judging.cycle else None
        profile = plan.read_profile(flags.profile)
        if self.cycles:
            now = cycles.current(cycles.read_cycles(self.cycles))
            profile += [f"--target-metric-name={now['target_metric_name']}",
                        f"--target-metric-threshold={now['target_metric_threshold']}"]
        where = f" on {flags.profile}" if flags.profile else ""
        self.about = (flags.candidate or "baseline") + where
        match, candidates = flags.match or "steps", {"candidate": flags.candidate}
        if command == "sweep":
            read = plan.read_template(template)
            self.about, match, candidates = read.about + where, read.match, read.variants
            if read.missing:
                print0(f"left out, as base_train has no such flag: {', '.join(read.missing)}")
        if command == "run":
            match, candidates = flags.match or "free", {"run": flags.candidate}
            if shown.variant:
                candidates = dict(text.split("=", 1) for text in shown.variant)
                self.about = ", ".join(candidates) + where
        if command == "noise":
            self.about, candidates = f"A against A{where}", {}
        self.profile, self.match, self.texts = profile, match, candidates
        self.depths = judging.depths if command == "miniseries" else [None]
        self.plans = {depth: self.variants(depth) for depth in self.depths}
        if any("--total-batch-size=x" in text for text in candidates.values()):
            print0(plan.about_batch([*profile, *shlex.split(flags.baseline)]))
        given = [template, self.texts, profile, match, flags.baseline, self.depths]
        given += [flags.nproc_per_node] if flags.nproc_per_node > 1 else []
        self.path = resolve(flags.out) if flags.out else get_base_dir() / "lab" / f"{command}-{digest(given)}"

    def check(self) -> None:
        command, flags = self.command, self.flags
        given, usual = (vars(lab) | vars(judge) for lab, judge in ((flags, self.judging), (LabFlags(), JudgeFlags())))
        problems = [f"--{name.replace('_', '-')} is not for lab {command}" for name in NOT_FOR.get(command, "").split()
                    if given[name] != usual[name]]
        if command in ("compare", "gate", "miniseries") and not flags.candidate:
            problems.append(f"lab {command} needs --candidate")
        if len(set(flags.seeds)) < len(flags.seeds):
            problems.append("--seeds names a seed twice: that would count as two")
        if flags.candidate and self.shown.variant:
            problems.append("give --candidate or --variant, not both")
        if command in ("compare", "gate", "sweep", "noise") and len(flags.seeds) < 2:
            problems.append("--seeds takes two or more: one pair has no spread")
        if command == "miniseries" and len(set(self.judging.depths)) < 2:
            problems.append("--depths takes two or more different ones")
        if flags.max_seeds != -1 and flags.max_seeds < len(flags.seeds):
            problems.append(f"--max-seeds is at least the number of --seeds, {len(flags.seeds)}")
        if self.judging.log and (trouble := output_problem(self.judging.log)):
            problems.append(f"--log {trouble}")
        raise_problems(problems)
        if not flags.out:
            writable_base_dir()

    def variants(self, depth: int | None):
        baseline = " ".join(filter(None, [self.flags.baseline, f"--depth={depth}" if depth else ""]))
        if self.command == "run":
            first, *others = plan.named_variants(self.profile, baseline, self.texts, self.match)
            return first, others
        found = plan.make_variants(self.profile, baseline, self.texts, self.match)
        if not found[1] and self.command != "noise":
            raise UserError("there is nothing to compare: with these flags no candidate differs from the baseline "
                            "(`lab noise` compares A with A)")
        return found

    def home(self) -> Path:
        """The base directory of the runs. A profile that names its vocabulary has text and tokenizer of its own."""
        if not any(word.startswith("--vocab-size") for word in self.profile):
            return get_base_dir()
        data = plan.checked("baseline", list(next(iter(self.plans.values()))[0].flags)).data
        text = [vars(data)[f.name] for f in fields(data)]
        return get_base_dir() / "lab" / f"text-{digest(text)}"

    def contest(self, depth=None, **changes):
        from nanochat.lab.cells import Folder
        from nanochat.lab.experiments import Contest
        base, candidates = self.plans[depth]
        folder = Folder(self.path / f"d{depth}" if depth else self.path, self.path.name, self.home(), self.flags.retry_failed,
                        self.flags.keep_checkpoints, self.flags.nproc_per_node, self.shown.show_output)
        return Contest(folder, base, tuple(candidates), self.match, self.judging.calibrate,
                       self.judging.control or self.command == "gate", tuple(self.judging.horizons), **changes)

    def carry_out(self) -> int:
        from nanochat.lab import experiments
        if self.command != "run":
            stats.t_quantile(0.95, 1)  # that scipy is missing is said before hours of training, not behind them
        self.seeds, self.most = self.flags.seeds, max(self.flags.max_seeds, len(self.flags.seeds))
        print0(f"{self.about}; folder: {self.path}")
        return getattr(self, self.command)(experiments)

    def run(self, experiments) -> int:
        from nanochat.lab.rows import known_of, table_of
        contest = replace(self.contest(), calibrate=False, control=False, horizons=())
        by_name, folder = contest.run(self.seeds), contest.folder.path
        rows = [row for found in by_name.values() for row in found]
        if self.shown.columns:
            print0("\n" + table_of(self.shown.columns, [known_of(folder, row) for row in rows]))
        else:
            print0("\n" + experiments.table(by_name))
        experiments.write_report(folder)
        for row in rows:
            if not experiments.good(row) and not self.shown.show_output:
                print0(f"{row['variant']} seed {row['seed']} {row['status']}: {folder / 'cells' / row['cell'] / 'log.txt'}")
        print0(f"rows: {folder / 'runs.csv'}\nreport: {folder / 'report.html'}")
        return int(any(not experiments.good(row) for row in rows))

    def compare(self, experiments) -> int:
        contest = self.contest()
        verdict, rows = experiments.compare(contest, self.seeds, self.most, always_resume=self.command == "gate")
        status = experiments.leave(contest.folder, verdict, rows, self.about)
        self.keep(verdict)
        return status

    gate = compare

    def sweep(self, experiments) -> int:
        contest = self.contest()
        verdict, rows, ranking = experiments.sweep(contest, self.seeds, self.most)
        print0("\n" + format_table(ranking))
        status = experiments.leave(contest.folder, verdict, rows, self.about, {"ranking": ranking})
        self.keep(verdict)
        return status

    def noise(self, experiments) -> int:
        contest = self.contest()
        again = plan.Variant("again", contest.baseline.flags)
        contest = replace(contest, candidates=(again,), control=True)
        card, rows = experiments.noise(contest, self.seeds)
        if "error" in card:
            raise UserError(f"no noise card: {card['error']}; see {contest.folder.path}/cells/*/log.txt")
        write_atomic(contest.folder.path / "noise.json", json.dumps(card, indent=1) + "\n")
        promoted = [name for name in ("a_against_a", "control", "control_as_candidate") if card[name]["decision"] == "promote"]
        seen = card["detectable_gain"] and ", ".join(f"{n} seeds {gain:.1%}" for n, gain in card["detectable_gain"].items())
        verdict = experiments.Verdict("keep optional", "A against A, no difference; a gain is seen in 4 of 5 cases from: "
                                      f"{seen or 'unknown, give more seeds'}")
        if promoted:
            verdict = experiments.Verdict("inconclusive", f"promoted without a difference: {', '.join(promoted)}")
        status = experiments.leave(contest.folder, verdict, rows, self.about, {"card": card})
        for name in ("a_against_a", "control", "control_as_candidate"):
            print0(f"{name}: {card[name]['decision']} ({card[name]['why']})")
        return 1 if promoted else status

    def miniseries(self, experiments) -> int:
        contests = {depth: self.contest(depth) for depth in self.depths}
        verdict, by_depth, table = experiments.series(contests, self.seeds, self.most)
        text = io.StringIO()
        writer = csv.DictWriter(text, experiments.SERIES_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_atomic(self.path / "results.csv", text.getvalue())
        record = verdict.as_dict() | {"about": self.about, "line": str(verdict), "variants": {}, "series": table,
                                      "by_depth": {d: v.as_dict() for d, v in by_depth.items()}}
        write_atomic(self.path / "verdict.json", json.dumps(record, indent=1) + "\n")
        for contest in contests.values():
            experiments.write_report(contest.folder.path)
        experiments.write_report(self.path)
        print0("\n" + format_table(table, list(experiments.SERIES_COLUMNS)))
        self.keep(verdict, robust=True)
        print0(f"report: {self.path / 'report.html'}\n{verdict}")
        return int(any(row["status"] != "ok" for row in table))

    def keep(self, verdict, robust: bool = False) -> None:
        """The decision in the change log and the cycle, where they were named. Only a miniseries promotes a default."""
        change = self.judging.change or self.about
        gain = verdict.gain.mean if verdict.gain else None
        if self.judging.log:
            command = f"`python -m scripts.lab {' '.join(sys.argv[1:])}`"
            entry = cycles.log_entry(change, verdict.decision, verdict.why, gain, command)
            cycles.write_log(resolve(self.judging.log), entry)
        if self.cycles:
            decision = verdict.decision if robust or verdict.decision != "promote" else "passed the local gate"
            known = cycles.read_cycles(self.cycles)
            cycles.write_cycles(self.cycles, [*known[:-1], cycles.record(cycles.current(known), change, decision, gain)])


def remake_report(folder: Path) -> int:
    from nanochat.lab.report import write_report
    from nanochat.lab.rows import write_csv
    if (folder / "cells").is_dir():
        write_csv(folder)
    print0(write_report(folder))
    return 0


def keep_cycle(action: str, flags: CycleFlags) -> int:
    path = resolve(flags.file) if flags.file else get_base_dir() / "lab" / "cycles.json"
    known = cycles.read_cycles(path)
    if action == "start":
        if not flags.name or flags.target_metric_threshold is None:
            raise UserError("lab cycle start needs --name and --target-metric-threshold: a cycle declares its target first")
        known = [*known, cycles.new_cycle(flags.name, flags.target_metric_name, flags.target_metric_threshold)]
    elif action == "phase":
        if not flags.phase:
            raise UserError("lab cycle phase needs --phase")
        now = cycles.current(known)
        known = [*known[:-1], now | {"phases": now["phases"] | {flags.phase: flags.state}}]
    elif action == "rollback":
        if not flags.change or not flags.reason:
            raise UserError("lab cycle rollback needs --change and --reason")
        known = [*known[:-1], cycles.roll_back(cycles.current(known), flags.change, flags.reason)]
        cycles.write_log(resolve(flags.log), cycles.log_entry(flags.change, "rolled back", flags.reason, None))
    elif action != "status":
        raise UserError(f"lab cycle {action}: choose start, phase, rollback or status")
    now = cycles.current(known)
    if action != "status":
        cycles.write_cycles(path, known)
    print0(f"cycle {now['name']!r}: {now['target_metric_name']} of {now['target_metric_threshold']}, "
           f"robust gain {now['robust_gain']:+.1%}")
    print0(format_table([{"phase": p, "about": about, "state": now["phases"][p]} for p, about in cycles.PHASES.items()]))
    print0(f"promoted: {', '.join(now['promoted']) or 'nothing'}; plateau: {cycles.plateau(known)[1]}")
    return 0


if __name__ == "__main__":
    cli(main)
