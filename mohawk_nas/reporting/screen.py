"""What each command prints: results on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mohawk_nas.audit import AuditReport
from mohawk_nas.config import FIGURES, StudyConfig
from mohawk_nas.distill.logits import LogitsResult
from mohawk_nas.errors import RegistryError
from mohawk_nas.evaluate import Evaluation
from mohawk_nas.files import RowFile
from mohawk_nas.forecast import Forecast
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import Figure
from mohawk_nas.mixer import MIXERS
from mohawk_nas.plan import Plan
from mohawk_nas.recall import RecallProbe
from mohawk_nas.reporting.console import print_placement, print_result
from mohawk_nas.reporting.progress import ConsoleReporter
from mohawk_nas.reporting.text import (
    COST_NOTES,
    OBJECTIVE_NOTES,
    RIVAL_COLUMNS,
    audit_verdict,
    difference,
    flips,
    left_out,
    mean_of_all,
    regret_total,
    rival_rows,
    rivals_reading,
)
from mohawk_nas.search.result import Placement, StudyResult
from mohawk_nas.search.scoring import Score, compare_blocks
from mohawk_nas.search.space import space_names
from mohawk_nas.search.strategy import SHORT_NAMES, STRATEGIES, strategy_names

__all__ = [
    "reporter",
    "show_comparison",
    "show_distillation",
    "show_evaluation",
    "show_export",
    "show_forecast",
    "show_names",
    "show_placement",
    "show_plan",
    "show_result",
]

# A file or pipe has no width of its own; the tables want this much.
_OUT = Console(width=None if sys.stdout.isatty() else 100)


def reporter() -> ConsoleReporter:
    """Progress for a person who watches."""
    return ConsoleReporter()


def show_result(
    result: StudyResult, config: StudyConfig, *, files: Sequence[Path], next_command: str
) -> None:
    """A finished search."""
    notes = left_out(result, config)
    print_result(result, console=_OUT, next_command=next_command, notes=notes)
    _say("Wrote  " + "  ".join(str(file) for file in files))


def show_placement(layout: Layout, score: Score, placement: Placement, result: StudyResult) -> None:
    """One layout among a study's trials."""
    print_placement(placement, layout, score.value(result.weights), result, console=_OUT)
    if result.budget.counts_only and not result.budget.meets(layout):
        kept, wanted = len(layout.attention_layers), result.budget.attention_layers
        _say(
            f"It keeps {kept} attention layers where the study keeps {wanted}: the rank compares "
            "unequal things."
        )
    elif (excess := result.budget.excess(layout)) is not None:
        _say(f"It is off the budget ({excess}): the rank compares unequal things.")


def show_plan(config: StudyConfig, plan: Plan, *, rung_memory: Mapping[str, int]) -> None:
    """What a search would do; ``rung_memory`` is what one student of a rung holds, part by part."""
    table = _table(f"Plan of {config.name}: nothing has been run")
    table.add_column("what", no_wrap=True)
    table.add_column("how much")
    table.add_row("teacher", f"{plan.teacher_params:,} parameters, {plan.num_layers} layers")
    for name, params in plan.candidate_params.items():
        table.add_row(f"candidate {name}", f"{params:,} parameters a layer")
    table.add_row("bank", f"{plan.num_entries} entries, fewer if some are there already")
    for stage, tokens in plan.bank_tokens.items():
        if tokens:
            table.add_row(
                f"  stage {stage}", f"{tokens:,} tokens, {plan.bank_steps[stage]:,} steps"
            )
    search = plan.search
    how = "every one is scored" if search.exhaustive else f"{search.trials:,} are scored"
    if search.solved:
        how = "the best follows from the single layers' losses; it and the baselines are scored"
    if config.budget.decode.milliseconds is not None:
        how += "; the decode time, which is not measured yet, may leave fewer"
    table.add_row("layouts", f"{search.possible:,} meet the budget, {how}")
    if search.probes:
        probes = ", ".join(f"{name} {count:,}" for name, count in search.probes.items())
        table.add_row("  looked at besides", f"at most {sum(search.probes.values()):,} ({probes})")
    for name, tokens in search.learning.items():
        table.add_row("  learnt from", f"{tokens:,} tokens ({name})")
    table.add_row("  tokens a layout", f"{plan.score_tokens:,}")
    for tokens, count in search.rungs.items():
        table.add_row(
            f"  rung of {tokens:,} tokens",
            f"at most {count:,} layouts are distilled, {count * tokens:,} tokens of stage 3",
        )
    if search.run_off:
        tokens = search.run_off * max(search.rungs)
        table.add_row(
            "  again, if tied",
            f"at most {search.run_off:,} further distillations, {tokens:,} tokens of stage 3",
        )
    for stage, tokens in plan.distill_tokens.items():
        if tokens:
            table.add_row(f"distillation, {stage}", f"{tokens:,} tokens")
    _OUT.print(table)

    memory = _table("Memory while the bank is trained, counted (working memory comes on top)")
    memory.add_column("part", no_wrap=True)
    memory.add_column("size", justify="right")
    for part, size in plan.memory_bytes.items():
        memory.add_row(part, _bytes(size))
    disk = f"{_bytes(plan.disk_bytes)}, up to four times that while it is trained"
    memory.add_row("bank on disk", disk)
    _OUT.print(memory)
    if rung_memory:
        memory = _table("Memory while a rung distils one layout; a GPU with room takes up to four")
        memory.add_column("part", no_wrap=True)
        memory.add_column("size", justify="right")
        for part, size in rung_memory.items():
            memory.add_row(part, _bytes(size))
        memory.add_row("all", _bytes(sum(rung_memory.values())), style="bold")
        _OUT.print(memory)

    times = _table(
        f"Least time on this machine ({plan.device}), counted operations at the "
        f"{plan.flops_per_second / 1e9:,.0f} GFLOP/s of a matrix product just measured"
    )
    times.add_column("phase", no_wrap=True)
    times.add_column("operations", justify="right")
    times.add_column("at least", justify="right")
    for phase, seconds in plan.seconds.items():
        times.add_row(phase, f"{plan.flops[phase]:.2e}", _duration(seconds))
    _OUT.print(times)
    _say("A real run takes a few times as long: no phase is a matrix product alone.")


def show_forecast(config: StudyConfig, forecast: Forecast) -> None:
    """What a full distillation would take."""
    table = _table(f"Distillation of {config.name}: nothing has been run")
    table.add_column("what", no_wrap=True)
    table.add_column("how much")
    table.add_row("layout", forecast.strip)
    table.add_row("teacher", f"{forecast.teacher_params:,} parameters, {forecast.dtype}")
    table.add_row(
        "student",
        f"{forecast.student_params:,} parameters, {forecast.mixer_params:,} of them in the mixers "
        f"of {forecast.replaced} layers; stage 3 trains {forecast.trained_params:,}",
    )
    for name, stage in forecast.stages.items():
        table.add_row(
            f"stage {name}",
            f"{stage.tokens:,} tokens, {stage.steps:,} steps of {stage.tokens_a_step:,}",
        )
    _OUT.print(table)

    memory = _table("Memory a GPU, counted (working memory comes on top)")
    memory.add_column("stage, part")
    memory.add_column("size", justify="right", no_wrap=True)
    for name, stage in forecast.stages.items():
        memory.add_row(f"stage {name}", _bytes(sum(stage.memory.values())), style="bold")
        for part, size in stage.memory.items():
            memory.add_row(f"  {part}", _bytes(size))
        for part, size in stage.options.items():
            memory.add_row(f"  instead: {part}", _bytes(size))
    _OUT.print(memory)
    _say(
        "What backward passes need is what autograd keeps of a forward pass on the meta device, by "
        "the mixers' plain paths; kernels keep less."
    )
    if config.distill.logits.batch_size % forecast.gpus:
        _say(
            f"distill.logits.batch_size must be a multiple of {forecast.gpus} for that many "
            f"processes, but is {config.distill.logits.batch_size}: multiply it, and divide "
            "distill.logits.accumulate by as much."
        )

    times = _table(
        f"Least time on {forecast.gpus} GPU{'s' if forecast.gpus > 1 else ''}, assuming "
        f"{forecast.utilisation:.0%} of {forecast.peak / 1e12:,g} TFLOP/s"
    )
    times.add_column("stage", no_wrap=True, min_width=44)
    times.add_column("operations", justify="right")
    times.add_column("time", justify="right")
    for name, stage in forecast.stages.items():
        times.add_row(name, f"{stage.flops:.2e}", _long_duration(stage.seconds))
    total = sum(stage.seconds for stage in forecast.stages.values())
    times.add_row("all", "", _long_duration(total), style="bold")
    _OUT.print(times)

    disk = _table("Disk")
    disk.add_column("what")
    disk.add_column("size", justify="right", no_wrap=True)
    for what, size in forecast.disk.items():
        disk.add_row(what, _bytes(size))
    disk.add_row("all", _bytes(sum(forecast.disk.values())), style="bold")
    _OUT.print(disk)


def show_audit(report: AuditReport, *, files: Sequence[Path]) -> None:
    """How far a study's score can be trusted."""
    table = _table(
        f"{report.layouts} layouts distilled on {report.tokens:,} tokens, seeds: {report.seeds}"
    )
    table.add_column("how well the score foretells", no_wrap=True)
    for trust in report.trusts:
        table.add_column(f"distilled {trust.figure}", no_wrap=True)

    def row(what: str, figures: Iterable[object]) -> None:
        table.add_row(what, *("-" if figure is None else str(figure) for figure in figures))

    def share(value: float | None) -> str | None:
        return None if value is None else f"{value:.2f}"

    trusts = report.trusts
    row("Spearman [95 %]", (t.spearman for t in trusts))
    row("Kendall [95 %]", (t.kendall for t in trusts))
    row("pairs of layouts in another order", (t.kendall and flips(t.kendall) for t in trusts))
    row("Spearman in the best quarter", (t.best_quarter for t in trusts))
    row("a perfect score's Spearman", (share(t.ceiling) for t in trusts))
    row("reliability (ICC) of one distillation", (share(t.reliability) for t in trusts))
    if 0 < report.repeated < report.layouts:
        row("  by layouts with several seeds", (report.repeated for _ in trusts))
    row("R² of single layers", (t.fit and share(t.fit.additive) for t in trusts))
    row("R² with pairs of layers", (t.fit and share(t.fit.pairwise) for t in trusts))
    regrets = [t.regret for t in trusts]
    row("regret [95 %]", (r and regret_total(r) for r in regrets))
    row("  of the objective", (r and f"{r.objective:.1%}" for r in regrets))
    row("  of the strategy", (r and f"{r.strategy:.1%}" for r in regrets))
    _OUT.print(table)
    for line in audit_verdict(report)[1:]:
        _say(line)
    _say(
        "Regret is what the study's best costs beyond the best distilled one, as a share of "
        f"({mean_of_all(report)} - best)."
    )
    if report.rivals:
        rivals = _table("What baselines name, distilled, against the study's best")
        for column in RIVAL_COLUMNS:
            rivals.add_column(column, no_wrap=column == RIVAL_COLUMNS[-1])
        for cells in rival_rows(report):
            rivals.add_row(*cells)
        _OUT.print(rivals)
        _say(rivals_reading(report))
    for path in files:
        _say(f"Wrote  {path}")


def show_distillation(result: LogitsResult, folder: Path, *, next_command: str) -> None:
    """A finished distillation in its folder."""
    versus = compare_blocks(result.after.kl, result.before.kl)
    change = versus.difference / result.before.mean_kl
    table = _table("Validation split, nats a token (lower is better)")
    for column in ("", "KL to the teacher", "cross-entropy"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, figures in (("undistilled", result.before), ("distilled", result.after)):
        table.add_row(name, f"{figures.mean_kl:.4f}", f"{figures.mean_cross_entropy:.4f}")
    _OUT.print(table)
    _say(
        f"KL changed by {change:+.1%} ({difference(versus)}, "
        f"paired over {len(result.after.kl)} blocks) with {result.tokens:,} tokens of stage 3."
    )
    if result.best_step == 0:
        looks = sum("validation_kl" in row for row in RowFile(folder / "log.jsonl").rows)
        _say(
            f"Stage 3 was looked at {looks} time{'' if looks == 1 else 's'} on the validation "
            "split, and never was it better than its start, which is kept: lower "
            "distill.logits.lr, give it more tokens, or look more often (validate_steps)."
        )
    _next(next_command)


def show_export(folder: Path, found: Mapping[str, float], *, next_command: str) -> None:
    """A checked export."""
    _say(f"Wrote {folder}; loaded again in a fresh process:")
    for name, largest in found.items():
        _say(f"  {name}: largest relative difference {largest:.1e}")
    _say("  generate(): the same tokens with and without cache, left padding included")
    _next(next_command)


def show_evaluation(rows: Sequence[Evaluation], probe: RecallProbe | None) -> None:
    """Models beside each other, the teacher first."""
    table = _table("Test split")
    table.add_column("model", no_wrap=True)
    for column in ("perplexity", "KL to the teacher", "± standard error", "recall"):
        table.add_column(column, justify="right", no_wrap=True)
    zeros = tuple(0.0 for _ in rows[0].figures.kl)
    for row in rows:
        error = compare_blocks(row.figures.kl, zeros).standard_error
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            f"{row.figures.mean_kl:.4f}",
            f"{error:.4f}",
            "-" if row.recall is None else f"{row.recall:.1%}",
        )
    _OUT.print(table)
    asked = (
        "the teacher solves no probe, so there is none to keep"
        if probe is None
        else f"share of right answers to {probe}, errors over {probe.parts_are}; the teacher's is "
        "what there is to keep"
    )
    _say(f"KL in nats a token. Recall: {asked}.")


def show_comparison(rows: Sequence[Evaluation], *, block_size: int, file: Path) -> None:
    """The model beside its teacher, figure by figure."""
    teacher, student = rows[0], rows[-1]
    table = _table(f"The {student.name} beside the teacher, ± one standard error")
    table.add_column("figure", no_wrap=True)
    for column in ("teacher", student.name, "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    its = {figure.name: figure for figure in student.compared}
    for figure in teacher.compared:
        if (other := its.get(figure.name)) is not None:
            cells = (_figure(figure), _figure(other), _figure(other.minus(figure), sign="+"))
            table.add_row(figure.name, *cells)
    _OUT.print(table)
    _say(
        "Differences are taken block by block and question by question where both answered the "
        "same ones. Cross-entropy and perplexity: lower is better; all else: higher is better."
    )
    if teacher.lengths:
        _say(f"The student was distilled on blocks of {block_size:,} tokens.")
    _say(f"Wrote  {file}")


def _figure(figure: Figure, *, sign: str = "") -> str:
    digits = ".4f" if abs(figure.value) < 100 else ",.1f"
    error = "" if figure.standard_error is None else f" ± {figure.standard_error:{digits}}"
    return f"{figure.value:{sign}{digits}}{error}"


def show_names(what: str) -> None:
    """What ``ls`` lists."""
    if what == "mixers":
        _names({name: _mixer_note(name) for name in MIXERS.names()})
    elif what == "spaces":
        _names(dict.fromkeys(space_names(), ""))
    elif what == "strategies":
        _names({name: _strategy_note(name) for name in strategy_names()})
    else:
        _names({name: {**OBJECTIVE_NOTES, **COST_NOTES}[name] for name in FIGURES})


def _names(notes: Mapping[str, str]) -> None:
    for name, note in notes.items():
        _say(f"{name:<16} {note}".rstrip())


def _mixer_note(name: str) -> str:
    try:
        item = MIXERS.get(name)
    except RegistryError as e:
        # One that another package names wrongly hides none of the rest.
        return str(e)
    return f"{getattr(item, 'symbol', '?')}  {_first_line(item)}"


def _strategy_note(name: str) -> str:
    def listed(options: Mapping[str, object]) -> str:
        return ", ".join(f"{option}: {value}" for option, value in options.items())

    if name in SHORT_NAMES:
        return f"Short for {{{listed(SHORT_NAMES[name])}}}."
    try:
        item = STRATEGIES.get(name)
    except RegistryError as e:
        return str(e)
    options = listed({f.name: f.default for f in dataclasses.fields(item)})
    return _first_line(item) + (f" Options: {options}." if options else "")


def _first_line(item: type) -> str:
    return (item.__doc__ or "").strip().splitlines()[0] if item.__doc__ else ""


def _next(command: str) -> None:
    _OUT.print()
    _OUT.print(Text.assemble("Next:  ", (command, "bold")), soft_wrap=True)


def _say(text: str) -> None:
    _OUT.print(text, highlight=False, soft_wrap=True)


def _bytes(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


def _long_duration(seconds: float) -> str:
    if seconds < 2 * 3600:
        return _duration(seconds)
    return f"{seconds / 3600:,.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
