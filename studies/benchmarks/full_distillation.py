"""Distils several layouts of a study in full, with the same budget, and evaluates each.

    python studies/benchmarks/full_distillation.py STUDY.yaml --layouts searched,uniform,none \\
        --tokens 50M --tasks lambada_openai,piqa,arc_easy --task-data ROWS

`searched` is the study's best layout, `uniform` its best uniform phase by the study's objective,
and `none` keeps no attention; `4,10,16,22` or a strip such as MMAM is a layout of one's own. None
of them need be on the budget. The study is searched first if it has not been. Each layout has a
folder, `full/LAYOUT/TOKENS` in the run's, in which it is distilled and evaluated as `mohawk-nas
distill` and `evaluate` do it: KL to the teacher and perplexity on the test split, recall, tasks,
and recall over length (`--recall-lengths`), beside the teacher. The same command goes on where it
was stopped.

With `distill.logits.patience=3` each is distilled until validation stops improving, and `--tokens`
is the most that may take.

`--part 1/3` takes the first of every three layouts, for several GPUs; the study must then have
been searched. Whoever ends last finds all layouts there. The table is printed as Markdown; all of
it stands in `results/full_distillation_NAME.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mohawk_nas import pipeline
from mohawk_nas.bench.results import environment
from mohawk_nas.config import StudyConfig, load_study, plain, token_count
from mohawk_nas.errors import InputError, LayoutError, MohawkError
from mohawk_nas.evaluate import Evaluation, Examination, find_target, record, write_record
from mohawk_nas.export.hf import describe_candidates, load_hybrid
from mohawk_nas.files import RowFile, atomic_write, read_json, write_json
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import Figure
from mohawk_nas.plan import find_problems
from mohawk_nas.reporting import screen
from mohawk_nas.runs import check_identity, check_run_dir, provenance
from mohawk_nas.student import assemble
from mohawk_nas.tasks import TaskSuite
from mohawk_nas.workbench import Workbench

RESULTS = Path(__file__).parent / "results"
WORDS = ("searched", "uniform", "none")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        config = load_study(args.study, args.overrides)
        tokens = args.tokens or config.distill.logits.tokens
        logits = dataclasses.replace(config.distill.logits, tokens=tokens)
        distill = dataclasses.replace(config.distill, logits=logits)
        config = dataclasses.replace(config, distill=distill)
        if problems := find_problems(config):
            raise InputError("\n".join(problems))
        make(config, args)
    except MohawkError as error:
        print(f"full_distillation: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", type=Path)
    add("overrides", nargs="*", help="changes to the study, e.g. distill.logits.lr=3e-4")
    add("--layouts", nargs="+", default=["searched,uniform,none"], help="e.g. searched none 4,10")
    add("--tokens", type=token_count, help="of stage 3 a layout, e.g. 50M; distill.logits.tokens")
    add("--tasks", type=words, default=[], help="of lm-eval, e.g. lambada_openai,piqa")
    add("--task-data", type=Path, help="folder with their rows; else the hub")
    add("--limit", type=int, help="items of each task; all")
    add("--batch-size", type=int, help="sequences of a task run at once")
    add("--recall-lengths", type=words, default=[], help="e.g. 512,1024,2048")
    add("--part", type=part, default=(0, 1), help="1/2 and 2/2 share the layouts of two processes")
    add("--out", type=Path, default=RESULTS, help="folder of the results file")
    return parser.parse_intermixed_args(argv)


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def part(text: str) -> tuple[int, int]:
    mine, _, count = text.partition("/")
    if not 1 <= int(mine) <= int(count):
        raise ValueError(text)
    return int(mine) - 1, int(count)


@dataclasses.dataclass(frozen=True)
class Job:
    """One layout, and where everything that is made of it lies."""

    chosen_as: str
    layout: Layout
    strip: str
    candidates: Mapping[str, Any]
    run: Path

    @property
    def folder(self) -> Path:
        return self.run / "full" / "".join(self.strip.split())

    @property
    def row(self) -> Path:
        return self.folder / "row.json"


def make(config: StudyConfig, args: argparse.Namespace) -> None:
    """Everything that is not there yet, then the table."""
    reporter = screen.reporter()
    # What cannot be asked is told before anything is distilled.
    tasks = None
    if args.tasks:
        tasks = TaskSuite(
            args.tasks, data=args.task_data, limit=args.limit, batch_size=args.batch_size
        )
    if not (config.run_dir / "best.yaml").is_file():
        if args.part[1] > 1:
            raise InputError(f"--part: {config.run_dir} must hold a finished search; run it first")
        pipeline.search(config, reporter=reporter)
    check_run_dir(config)
    bench = Workbench(config, reporter)
    check_identity(config.run_dir, bench.identity)
    jobs = list(named(bench, args.layouts))
    wanted = {
        "distill": plain(config.distill),
        "tasks": args.tasks,
        "limit": args.limit,
        "recall_lengths": args.recall_lengths,
    }
    mine = [job for job in jobs[args.part[0] :: args.part[1]] if not finished(job, wanted)]
    # The distillations load what they need by themselves.
    bench.release()
    found = [(job, distil(config, job)) for job in mine]
    if mine:
        lengths = [int(length) for length in args.recall_lengths]
        examination = Examination(bench=bench, lengths=lengths, tasks=tasks)
        teacher = examination.of(bench.teacher.model, "teacher")
        for job, outcome in found:
            row = {"wanted": wanted, **outcome, **examine(examination, config, teacher, job)}
            write_json(job.row, row)
    report(jobs, wanted, config, args.out)


def finished(job: Job, wanted: Mapping[str, Any]) -> bool:
    return job.row.is_file() and read_json(job.row)["wanted"] == wanted


def named(bench: Workbench, texts: Sequence[str]) -> Iterator[Job]:
    """The layouts asked for, each once."""
    space, result = bench.space, bench.result()
    found: dict[Layout, list[str]] = {}
    if len(space.replacements) != 1:
        raise InputError("space.candidates: layouts are named by what they keep; take one mixer")
    for name in [w for text in texts for w in ([text] if text[:1].isdigit() else words(text))]:
        if name == "searched":
            layout = result.best.layout
        elif name == "uniform":
            phases = [x for label, x in result.baselines.items() if label.startswith("uniform/")]
            if not phases:
                raise InputError("--layouts: uniform must be one of search.baselines, but is not")
            layout = min(phases, key=lambda phase: result.by_layout[phase].value)
        else:
            try:
                layout = no_attention(bench) if name == "none" else space.parse(name)
            except LayoutError as e:
                raise InputError(f"--layouts: {name}: {e}; or name {', '.join(WORDS)}") from e
        found.setdefault(layout, []).append(name)
    for layout, names in found.items():
        used = {n: space.candidates[n] for n in sorted(set(layout.candidates))}
        strip, candidates = layout.strip(space.symbols), describe_candidates(used)
        # The best one may be uniform.
        name = " = ".join(dict.fromkeys(names))
        yield Job(name, layout, strip, candidates, bench.config.run_dir)


def no_attention(bench: Workbench) -> Layout:
    """Every layer replaced, those that are pinned to attention excepted."""
    free = dict.fromkeys(bench.space.free_layers, bench.space.replacements[0])
    return bench.space.fill(free)


def distil(config: StudyConfig, job: Job) -> dict[str, Any]:
    """Distil one layout; returns what that came to on the validation split."""
    folder = folder_of(config, job)
    write_best(config, job, folder)
    result, _ = pipeline.distill(pipeline.load_best(folder), reporter=screen.reporter())
    # A GPU's memory is the next one's.
    gc.collect()
    log = RowFile(folder / "distill" / "log.jsonl").rows
    return {
        "tokens": result.tokens,
        "best_step": result.best_step,
        "validation_kl_before": result.before.mean_kl,
        "validation_kl": result.after.mean_kl,
        "validation_curve": [
            [row["step"], row["validation_kl"]] for row in log if "validation_kl" in row
        ],
    }


def folder_of(config: StudyConfig, job: Job) -> Path:
    return job.folder / str(config.distill.logits.tokens)


def write_best(config: StudyConfig, job: Job, folder: Path) -> None:
    """A `best.yaml` that holds this layout instead of the run's best."""
    run = yaml.safe_load((config.run_dir / "best.yaml").read_text(encoding="utf-8"))
    study = {**run["study"], "distill": plain(config.distill)}
    study["teacher"]["device"] = config.teacher.device
    content = {
        "strip": job.strip,
        "attention_layers": list(job.layout.attention_layers),
        "layout": list(job.layout.candidates),
        "candidates": dict(job.candidates),
        "scores": {"chosen_as": job.chosen_as},
        "teacher": run["teacher"],
        "study": study,
    }
    with atomic_write(folder / "best.yaml") as beside:
        beside.write_text(yaml.safe_dump(content, sort_keys=False, width=100), "utf-8")


@torch.no_grad()
def examine(
    examination: Examination, config: StudyConfig, teacher: Evaluation, job: Job
) -> dict[str, Any]:
    """Evaluate a layout's distillation, into its folder; returns what the table needs."""
    bench = examination.bench
    target = find_target(folder_of(config, job))
    assert target.model is not None
    undistilled = examination.of(
        assemble(bench.teacher, job.layout, bench.bank), "undistilled student", further=False
    )
    model = load_hybrid(target.model, dtype=torch.float32).to(bench.teacher.device)
    student = examination.of(model, "distilled student")
    content = record(target, examination, [teacher, undistilled, student])
    write_record(target.record, content)
    return {
        "chosen_as": job.chosen_as,
        "attention_layers": list(job.layout.attention_layers),
        "asked": content["asked"],
        "models": content["models"],
        "made_with": {
            **environment(bench.teacher.device, command=command()),
            "git_commit": provenance()["git_commit"],
        },
    }


def command() -> str:
    """What was typed, without where it lies."""
    said = []
    for word in sys.argv:
        key, equals, value = word.rpartition("=")
        said.append(key + equals + (Path(value).name if Path(value).is_absolute() else value))
    return " ".join(["python", *said])


def report(jobs: Sequence[Job], wanted: Mapping[str, Any], config: StudyConfig, out: Path) -> None:
    """The results file and the table, of what is there."""
    # A row may have been made under another name.
    rows = [
        {**read_json(job.row), "chosen_as": job.chosen_as} for job in jobs if finished(job, wanted)
    ]
    if missing := [job.chosen_as for job in jobs if not finished(job, wanted)]:
        print(f"Not there yet: {', '.join(missing)}; other parts make them.")
    if not rows:
        return
    path = out / f"full_distillation_{config.name}.json"
    teacher, *_ = (told(model) for model in rows[0]["models"])
    layouts = [
        {
            **{key: value for key, value in row.items() if key != "wanted"},
            "more_kl_than_first": dataclasses.asdict(kl_of(row).minus(kl_of(rows[0]))),
            # Every row holds the same teacher.
            "models": [told(model) for model in row["models"][1:]],
        }
        for row in rows
    ]
    for row in layouts:
        del row["more_kl_than_first"]["items"]
    content = {"name": config.name, "wanted": wanted, "teacher": teacher, "layouts": layouts}
    write_json(path, content)
    print(markdown(table(teacher, layouts)))
    if wanted["recall_lengths"]:
        print(f"\nRecall over length:\n\n{markdown(table_of_lengths(teacher, layouts))}")
    print(f"\nWrote {path}")


def told(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's row without what only comparisons need."""
    return {name: value for name, value in model.items() if name != "kl_blocks"}


def kl_of(row: Mapping[str, Any]) -> Figure:
    return Figure.mean_of("KL", row["models"][-1]["kl_blocks"], higher_is_better=False)


def table(teacher: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What a layout keeps and what it is worth; ± is one standard error."""
    scores: dict[str, str] = {}
    for figure in teacher["tasks"]:
        # A task's first figure of which more is better.
        if figure["higher_is_better"]:
            scores.setdefault(figure["name"].split()[0], figure["name"])
    first = rows[0]["chosen_as"]
    columns = ["attention layers", "tokens", "KL undistilled", "KL", f"KL above {first}"]
    lines = [["", *columns, "perplexity", "recall", *scores]]

    def shares(model: Mapping[str, Any]) -> list[str]:
        found = {figure["name"]: figure for figure in (*model["text"], *model["tasks"])}
        names = ("recall", *scores.values())
        return [
            f"{model['perplexity']:.2f}",
            *(number_of(found.get(name), scale=100, digits=".1f") for name in names),
        ]

    lines.append(["teacher", "all", "", "", "", "", *shares(teacher)])
    for row in rows:
        undistilled, student = row["models"]
        above = row["more_kl_than_first"] if row is not rows[0] else None
        lines.append(
            [
                row["chosen_as"],
                ", ".join(map(str, row["attention_layers"])) or "none",
                f"{row['tokens']:,}",
                number_of(undistilled["text"][0], digits=".4f"),
                number_of(student["text"][0], digits=".4f"),
                number_of(above, digits="+.4f"),
                *shares(student),
            ]
        )
    return lines


def table_of_lengths(
    teacher: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Recall by length, that of needles as the mean over depths."""
    columns = sorted({(f["kind"], f["length"]) for f in teacher["recall_over_length"]})
    lines = [["", *(f"{kind}, {length:,}" for kind, length in columns)]]
    for name, model in [("teacher", teacher), *((r["chosen_as"], r["models"][-1]) for r in rows)]:
        shares: dict[tuple[str, int], list[float]] = {}
        for figure in model["recall_over_length"]:
            shares.setdefault((figure["kind"], figure["length"]), []).append(figure["value"])
        lines.append([name, *(f"{statistics.fmean(shares[column]):.1%}" for column in columns)])
    return lines


def number_of(figure: Mapping[str, Any] | None, *, digits: str, scale: float = 1) -> str:
    """A figure with its standard error, if there is one."""
    if figure is None:
        return ""
    error = figure["standard_error"]
    return f"{scale * figure['value']:{digits}}" + (
        "" if error is None else f" ± {scale * error:{digits.lstrip('+')}}"
    )


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    ruled = [head, ["---", *("---:" for _ in head[1:])], *rest]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


if __name__ == "__main__":
    sys.exit(main())
