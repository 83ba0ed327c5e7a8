"""The lab: is a change to training real? It runs base_train many times, compares both sides, and ends with a verdict.

    python -m scripts.lab compare --profile lab-cpu --candidate "--warmdown-shape=cosine" --seeds 1 2 --max-seeds 6
    python -m scripts.lab gate    --profile lab-gpu --candidate "--fp8"    # the same, and kills and resumes a run
    python -m scripts.lab sweep B --profile lab-cpu                        # a template by its letter, or a file of yours
    python -m scripts.lab noise   --profile lab-cpu --seeds 1 2 3 4        # A against A: what can this machine detect?
    python -m scripts.lab miniseries --profile lab-gpu --depths 6 8 12 --candidate "--warmdown-shape=cosine"
    python -m scripts.lab run     --profile lab-cpu --candidate "--lr-multiplier=x1.1"   # no comparison: rows and a table
    python -m scripts.lab run     --profile lab-cpu --variant d4= d6="--depth=6" --columns "variant num_params val_bpb:.4f"
    python -m scripts.lab report DIR                                       # write its CSV and HTML again
    python -m scripts.lab cycle {start,phase,rollback,status}              # the state of an optimization cycle

The same command continues where it was stopped. --gpus 0 1 2 3 runs cells side by side, one on each GPU; on several machines the
command is started on each, with the same --out. The last line is the verdict. Exit status: 1 where a run failed (the others are
kept), 2 for a wrong command line, 130 after Ctrl-C. docs/lab.md explains verdicts and gates.
"""

import hashlib
import json
import re
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nanochat.cli.flag_files import profiles
from nanochat.cli.flags import LARGEST_SEED, flag, flag_name, parse, raise_problems
from nanochat.cli.paths import output_problem, writable_base_dir
from nanochat.common import UserError, format_table, get_base_dir, print0, resolve
from nanochat.lab import cycle as cycles, experiments, plan, stats, timing
from nanochat.lab.cells import Folder
from nanochat.lab.decide import Verdict
from nanochat.lab.gain import succeeded
from nanochat.lab.outputs import table, write_outputs, write_verdict
from nanochat.lab.report import write_report
from nanochat.lab.rows import csv_text, read_rows, run_fields, table_of, write_csv
from nanochat.lab.workers import WorkerFlags, assistants, is_assistant, is_worker, submit
from nanochat.runtime.files import write_atomic


@dataclass
class LabFlags:
    """The experiment"""
    profile: str = flag("cpu-smoke", f"flags of every run: {', '.join(profiles())}, or a file of flags; '' has none")
    baseline: str = flag("", "more flags of base_train for every run, the baseline's too", metavar='"FLAGS"')
    candidate: str = flag("", "flags of the candidate, on top of the baseline's", metavar='"FLAGS"')
    seeds: list[int] = flag([1, 2], "seeds of the runs, the same for baseline and candidate", low=0, high=LARGEST_SEED)
    max_seeds: int = flag(-1, "add seeds, one at a time and up to this many, while the verdict is inconclusive; -1 adds none")
    match: str | None = flag(None, "what all runs have in common; free: each has the length that its flags give. By default "
                                   "steps; for `lab run` free", choices=plan.MATCHES)
    out: str | None = flag(None, "folder of the experiment; by default one under $NANOCHAT_BASE_DIR/lab/", metavar="DIR")
    nproc_per_node: int = flag(1, "processes of a run, one per GPU, started by torchrun", low=1)
    retry_failed: bool = flag(False, "run cells again that failed")
    keep_checkpoints: bool = flag(False, "keep the checkpoints of runs that succeeded")


@dataclass
class TableFlags:
    """Variants and table"""
    variant: list[str] = flag([], "a run with this name and these flags on top of the baseline's; takes several",
                              metavar='NAME="FLAGS"')
    columns: str = flag("", 'print a row per run with these columns: "variant name=field name:format ..."; fields are those of '
                            "result.json and runs.csv, and flags", metavar='"COLUMNS"')
    show_output: bool = flag(False, "print the output of the runs instead of writing it to log.txt")

    def validate(self):
        names = [text.partition("=")[0] for text in self.variant]
        problems = [f"--variant takes NAME=\"FLAGS\", a name of letters, digits, '.', '_', '+' and '-', got {text!r}"
                    for text, name in zip(self.variant, names, strict=True)
                    if "=" not in text or not re.fullmatch(plan.NAME, name)]
        return problems + [f"--variant {name} is given twice" for name in set(names) if names.count(name) > 1]


@dataclass
class JudgeFlags:
    """The verdict"""
    calibrate: bool = flag(True, "run the baseline for fewer steps too, to measure the worth of a step")
    control: bool = flag(False, "add a hidden candidate that trains 5 % less; if it would be promoted, nothing is")
    horizons: list[float] = flag([], "train all at these shares of the steps too, such as 0.25 0.5 0.71, to extrapolate the time "
                                 "to a target that is not reached", low=0.05, high=0.99)
    clock: bool = flag(True, "measure the seconds of a step of both sides in turn, which other load disturbs little; else take "
                             "the time of the whole runs")
    accept_load: bool = flag(False, "believe the time of steps beside other programs too", requires={"clock": True})
    judge_time: bool = flag(False, "judge the time of a candidate that ends with the same bits as the baseline, too")
    depths: list[int] = flag([], "depths of the miniseries", low=1)
    change: str | None = flag(None, "the change's name in the log; by default the candidate's flags", metavar="TEXT")
    log: str | None = flag(None, "add the verdict to this log (Markdown), such as dev/LOG.md", metavar="PATH")
    cycle: str | None = flag(None, "take the target from this cycle file, and record the decision there", metavar="PATH")

    def validate(self):
        if len(set(self.horizons)) < len(self.horizons):
            return ["--horizons has a share twice: it would count as two"]
        if self.horizons and len(self.horizons) < 3:
            return ["--horizons takes three or more shares: fewer do not determine the curve"]
        return []


@dataclass
class CycleFlags:
    """The cycle"""
    file: str | None = flag(None, "the cycle file; by default $NANOCHAT_BASE_DIR/lab/cycles.json", metavar="PATH")
    name: str | None = flag(None, "start: the cycle's name")
    target_metric_name: str = flag("val_bpb", "start: the metric of the cycle", choices=("val_bpb", "smooth_loss"))
    target_metric_threshold: float | None = flag(None, "start: its threshold")
    abandon: bool = flag(False, "start: give up the present cycle, which is not over; it stays in the file")
    phase: str | None = flag(None, f"phase: {', '.join(cycles.PHASES)}", choices=tuple(cycles.PHASES))
    state: str = flag("done", "phase: its new state", choices=cycles.STATES)
    change: str | None = flag(None, "rollback: the promoted change that becomes optional again", metavar="TEXT")
    reason: str | None = flag(None, "rollback: why", choices=cycles.ROLLBACK_REASONS)
    log: str = flag("dev/LOG.md", "rollback: the change log", metavar="PATH")


COMMANDS = ("run", "compare", "gate", "sweep", "noise", "miniseries", "report", "cycle")
UNUSED = {  # by a command: it refuses these flags
    "run": "max_seeds calibrate control horizons clock accept_load judge_time depths change log", "compare": "depths",
    "gate": "depths", "sweep": "candidate match depths",
    "noise": "candidate match max_seeds control horizons judge_time depths change log"}
POSITIONAL = {"sweep": "TEMPLATE", "report": "DIR", "cycle": "ACTION"}


def main(argv: list[str] | None = None) -> int:
    """Run a command of the lab; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"], []):
        print(__doc__)
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        raise UserError(f"{command} is not a command of the lab: choose one of {', '.join(COMMANDS)}, or --help")
    operand = ""  # of sweep, report and cycle
    if command in POSITIONAL and not {"-h", "--help"} & set(rest):
        if not rest or rest[0].startswith("-"):
            raise UserError(f"lab {command} {POSITIONAL[command]}: the {POSITIONAL[command]} is missing"
                            + (f"; templates are {', '.join(plan.templates())}" if command == "sweep" else ""))
        operand, rest = rest[0], rest[1:]
    own_groups: dict[str, list[type]] = {"cycle": [CycleFlags], "report": [], "run": [LabFlags, JudgeFlags, TableFlags]}
    groups = own_groups.get(command, [LabFlags, JudgeFlags])
    trains = command not in own_groups or command == "run"
    flags = parse([*groups, *[WorkerFlags] * trains], rest, prog=f"python -m scripts.lab {command}")
    if command == "report":
        return report_command(resolve(operand))
    if command == "cycle":
        return cycle_command(operand, *flags)
    *flags, workers = flags
    experiment = Experiment(command, operand or None, *flags)
    if workers.submit and not is_worker():
        return submit(workers, argv, experiment.path)
    with assistants(workers, argv, experiment.path, flags[0].nproc_per_node):
        return experiment.execute(f"python -m scripts.lab {shlex.join(argv)}")


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


class Experiment:
    """A command that runs cells. Every problem with it is found before the first cell starts.

    Raises: UserError.
    """

    def __init__(self, command: str, template: str | None, flags: LabFlags, judging: JudgeFlags,
                 shown: TableFlags | None = None):
        self.command, self.flags, self.judging, self.shown = command, flags, judging, shown or TableFlags()
        self.check()
        self.cycle_file = resolve(judging.cycle) if judging.cycle else None
        profile = plan.read_profile(flags.profile)
        cycle = cycles.current(cycles.read_cycles(self.cycle_file)) if self.cycle_file else None
        if cycle:
            profile += [f"--target-metric-name={cycle['target_metric_name']}",
                        f"--target-metric-threshold={cycle['target_metric_threshold']}"]
        on_profile = f" on {flags.profile}" if flags.profile else ""
        self.about = (flags.candidate or "baseline") + on_profile
        match, candidates = flags.match or "steps", {"candidate": flags.candidate}
        if command == "sweep":
            assert template is not None
            read = plan.read_template(template)
            self.about, match, candidates = read.about + on_profile, read.match, read.variants
            if read.missing:
                print0(f"left out, as base_train has no such flag: {', '.join(read.missing)}")
        if command == "run":
            match, candidates = flags.match or "free", {"run": flags.candidate}
            if self.shown.variant:
                candidates = dict(text.split("=", 1) for text in self.shown.variant)
                self.about = ", ".join(candidates) + on_profile
        if command == "noise":
            self.about, candidates = f"A against A{on_profile}", {}
        self.profile, self.match, self.texts = profile, match, candidates
        self.depths: list = judging.depths if command == "miniseries" else [None]
        self.plans = {depth: self.variants(depth) for depth in self.depths}
        if cycle:
            flags_of_all = [v.flags for base, others in self.plans.values() for v in (base, *others)]
            raise_problems(list(dict.fromkeys(p for flags in flags_of_all if (p := cycles.locked(cycle, flags)))))
        if any("--total-batch-size=x" in text for text in candidates.values()):
            print0(plan.about_batch([*profile, *shlex.split(flags.baseline)]))
        given: list = [template, self.texts, profile, match, flags.baseline, self.depths]
        given += [flags.nproc_per_node] if flags.nproc_per_node > 1 else []
        self.path = resolve(flags.out) if flags.out else get_base_dir() / "lab" / f"{command}-{digest(given)}"
        self.best: str | None = None  # the variant that a sweep's verdict is about
        self.seeds, self.max_seeds = flags.seeds, max(flags.max_seeds, len(flags.seeds))

    def check(self) -> None:
        command, flags = self.command, self.flags
        given, default = (vars(lab) | vars(judge) for lab, judge in ((flags, self.judging), (LabFlags(), JudgeFlags())))
        problems = [f"{flag_name(name)} is not for lab {command}" for name in UNUSED.get(command, "").split()
                    if given[name] != default[name]]
        if command in ("compare", "gate", "miniseries") and not flags.candidate:
            problems.append(f"lab {command} needs --candidate")
        if len(set(flags.seeds)) < len(flags.seeds):
            problems.append("--seeds has a seed twice: it would count as two")
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
        """The baseline, or the first of `lab run`'s variants, and the others."""
        baseline = " ".join(filter(None, [self.flags.baseline, f"--depth={depth}" if depth else ""]))
        if self.command == "run":
            first, *others = plan.named_variants(self.profile, baseline, self.texts, self.match)
            return first, others
        found = plan.make_variants(self.profile, baseline, self.texts, self.match)
        if not found[1] and self.command != "noise":
            raise UserError("there is nothing to compare: with these flags no candidate differs from the baseline "
                            "(`lab noise` compares A with A)")
        return found

    def base_dir(self) -> Path:
        """The base directory of the runs. A profile that sets a vocabulary size has its own text and tokenizer."""
        if not any(word.startswith("--vocab-size") for word in self.profile):
            return get_base_dir()
        data = plan.checked("baseline", list(next(iter(self.plans.values()))[0].flags)).data
        text = [vars(data)[f.name] for f in fields(data)]
        return get_base_dir() / "lab" / f"text-{digest(text)}"

    def comparison(self, depth: int | None = None) -> experiments.Comparison:
        base, candidates = self.plans[depth]
        folder = Folder(self.path / f"d{depth}" if depth else self.path, self.path.name, self.base_dir(),
                        self.flags.retry_failed, self.flags.keep_checkpoints, self.flags.nproc_per_node, self.shown.show_output,
                        judged=self.command != "run")
        judging = self.judging
        return experiments.Comparison(
            folder, base, tuple(candidates), self.match, judging.calibrate, judging.control or self.command == "gate",
            tuple(judging.horizons), judging.clock, judging.accept_load, judging.judge_time, self.flags.profile)

    def execute(self, command_line: str) -> int:
        """Run it; the exit status."""
        if self.command != "run":
            stats.t_quantile(0.95, 1)  # a missing scipy is reported before hours of training, not after them
        print0(f"{self.about}; folder: {self.path}")
        if self.cycle_file:
            change, base = self.judging.change or self.flags.candidate, self.plans[self.depths[0]][0]
            why = cycles.obstacle(cycles.read_cycles(self.cycle_file), change, self.command == "miniseries", base.flags)
            if why:
                print0(f"note: this cannot count as a gain in the cycle: {why}")
        verdict, status = getattr(self, self.command)()
        if verdict and not is_assistant():
            self.record(verdict, command_line, self.best)
        if self.command == "miniseries":
            print0(f"report: {self.path / 'report.html'}\n{verdict}")
        return status

    # each command returns its verdict, where it has one that a log or a cycle can record, and the exit status

    def run(self) -> tuple[None, int]:
        comparison = replace(self.comparison(), calibrate=False, control=False, horizons=())
        by_name, folder = comparison.run(self.seeds), comparison.folder.path
        rows = [row for found in by_name.values() for row in found]
        fields_of_runs = [run_fields(folder, row) for row in rows] if self.shown.columns else []
        print0("\n" + (table_of(self.shown.columns, fields_of_runs) if self.shown.columns else table(by_name)))
        write_report(folder)
        failed = [row for row in rows if not succeeded(row)]
        for row in failed if not self.shown.show_output else []:
            print0(f"{row['variant']} seed {row['seed']} {row['status']}: {folder / 'cells' / row['cell'] / 'log.txt'}")
        print0(f"rows: {folder / 'runs.csv'}\nreport: {folder / 'report.html'}")
        return None, int(bool(failed))

    def compare(self) -> tuple[Verdict, int]:
        verdict, rows = experiments.compare(self.comparison(), self.seeds, self.max_seeds, always_resume=self.command == "gate")
        return verdict, write_outputs(self.path, verdict, rows, self.about, cost=cost_of([self.path]))

    gate = compare

    def sweep(self) -> tuple[Verdict, int]:
        verdict, rows, ranking = experiments.sweep(self.comparison(), self.seeds, self.max_seeds)
        self.best = next((r["variant"] for r in ranking if r["screening"] == experiments.CONFIRMED), None)
        print0("\n" + format_table(ranking))
        return verdict, write_outputs(self.path, verdict, rows, self.about, ranking=ranking, cost=cost_of([self.path]))

    def noise(self) -> tuple[None, int]:
        comparison = self.comparison()
        again = plan.Variant("again", comparison.baseline.flags)
        card, rows = experiments.noise(replace(comparison, candidates=(again,), control=True), self.seeds)
        if "error" in card:
            raise UserError(f"no noise card: {card['error']}; see {self.path}/cells/*/log.txt")
        write_atomic(self.path / "noise.json", json.dumps(card, indent=1) + "\n")
        judged = ("a_against_a", "control", "control_as_candidate")
        promoted = [name for name in judged if card[name]["decision"] == "promote"]
        gains = card["detectable_gain"] and ", ".join(f"{n} seeds {gain:.1%}" for n, gain in card["detectable_gain"].items())
        verdict = Verdict("keep optional", f"A against A, no difference; gains detected with a power of {experiments.POWER:.0%}: "
                                           f"{gains or 'unknown, give more seeds'}")
        if promoted:
            verdict = Verdict("inconclusive", f"promoted without a difference: {', '.join(promoted)}")
        status = write_outputs(self.path, verdict, rows, self.about, card=card)
        for name in judged:
            print0(f"{name}: {card[name]['decision']} ({card[name]['why']})")
        return None, 1 if promoted else status

    def miniseries(self) -> tuple[Verdict, int]:
        comparisons = {depth: self.comparison(depth) for depth in self.depths}
        verdict, by_depth, rows = experiments.series(comparisons, self.seeds, self.max_seeds)
        write_atomic(self.path / "results.csv", csv_text(rows, experiments.SERIES_COLUMNS))
        folders = [comparison.folder.path for comparison in comparisons.values()]
        write_verdict(self.path, verdict, self.about, {}, series=rows, by_depth={d: v.as_dict() for d, v in by_depth.items()},
                      cost=cost_of(folders))
        for folder in (*folders, self.path):
            write_report(folder)
        print0("\n" + format_table(rows, list(experiments.SERIES_COLUMNS)))
        return verdict, int(any(not succeeded(row) for row in rows))

    def record(self, verdict: Verdict, command_line: str, best: str | None = None) -> None:
        """Record the decision in the change log and the cycle, where they are named. Only a miniseries promotes a default.

        best: the name of the variant that the verdict is about, of a sweep.
        """
        base, candidates = next(iter(self.plans.values()))
        decided = candidates[0] if len(candidates) == 1 else next((v for v in candidates if v.name == best), None)
        change = self.judging.change or (self.texts[decided.name] if decided else self.about)
        details = f"`{command_line}`"
        if self.cycle_file:
            flags = []
            if decided:  # as it was trained: at an equal budget, with its length and rates
                trained = (tuple(row["flags"]) for row in read_rows(self.path) if row["variant"] == decided.name)
                own = next((found for found in trained if found[:len(decided.flags)] == decided.flags), decided.flags)
                flags = [*plan.expand(shlex.split(self.flags.baseline)), *own[len(base.flags):]]
            with cycles.changing(self.cycle_file) as known:
                known[:], recorded = cycles.record(known, change, verdict, miniseries=self.command == "miniseries",
                                                   baseline=base.flags, flags=flags, candidates=len(candidates))
            print0(recorded)
            details += f"\n\n{recorded}"
        if self.judging.log:
            gain = verdict.gain.mean if verdict.gain else None
            cycles.write_log(resolve(self.judging.log), cycles.log_entry(change, verdict.decision, verdict.why, gain, details))


def cost_of(folders: list[Path]) -> dict:
    """Of experiments' folders: runs made and taken from others, and the seconds that runs and timing have taken."""
    cost = Folder.cost(row for folder in folders for row in read_rows(folder))
    return cost | {"seconds": cost["seconds"] + sum(timing.seconds_spent(folder) for folder in folders)}


def report_command(folder: Path) -> int:
    if (folder / "cells").is_dir():
        write_csv(folder)
    print0(write_report(folder))
    return 0


def cycle_command(action: str, flags: CycleFlags) -> int:
    path = resolve(flags.file) if flags.file else get_base_dir() / "lab" / "cycles.json"
    if action == "status":
        print0(cycles.status(cycles.read_cycles(path)))
        return 0
    with cycles.changing(path) as known:
        if action == "start":
            if not flags.name or flags.target_metric_threshold is None:
                raise UserError("lab cycle start needs --name and --target-metric-threshold: a cycle declares its target first")
            known[:] = cycles.start(known, flags.name, flags.target_metric_name, flags.target_metric_threshold, flags.abandon)
        elif action == "phase":
            if not flags.phase:
                raise UserError("lab cycle phase needs --phase")
            known[:] = [*known[:-1], cycles.set_phase(cycles.current(known), flags.phase, flags.state)]
        elif action == "rollback":
            if not flags.change or not flags.reason:
                raise UserError("lab cycle rollback needs --change and --reason")
            known[:] = cycles.roll_back(known, flags.change, flags.reason)
            cycles.write_log(resolve(flags.log), cycles.log_entry(flags.change, "rolled back", flags.reason, None))
        else:
            raise UserError(f"lab cycle {action}: choose start, phase, rollback or status")
        print0(cycles.status(known))
    return 0
