"""The command line: one short function a command.

Torch, transformers and the rest of the package are imported inside the commands, so that ``--help``
answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mohawk_nas.errors import InputError, MohawkError

if TYPE_CHECKING:
    from mohawk_nas.config import StudyConfig

__all__ = ["app", "main"]

INTERRUPTED = 130

app = typer.Typer(
    name="mohawk-nas",
    help="Find out which layers of a Transformer should stay attention, distil that hybrid, and "
    "export it.",
    epilog="Any command takes --traceback, to show where an error came from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Study = Annotated[Path, typer.Argument(help="The study, a YAML file.", metavar="STUDY")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to it, such as search.trials=50.", metavar="[KEY=VALUE]..."),
]
Run = Annotated[
    Path, typer.Argument(help="A run's folder, or an exported Hugging Face folder.", metavar="RUN")
]
Force = Annotated[bool, typer.Option(help="Set what is already there aside and start anew.")]


class Listed(StrEnum):
    """What ``ls`` can list."""

    mixers = "mixers"
    spaces = "spaces"
    strategies = "strategies"
    objectives = "objectives"


class Exported(StrEnum):
    """What ``export`` can write."""

    hf = "hf"
    layout = "layout"


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"mohawk-nas {version('mohawk-nas')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Show it.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Take what goes with no command."""


@app.command()
def search(
    study: Study,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option(help="Print what would be done, and stop.")] = False,
    force: Force = False,
    workers: Annotated[
        int, typer.Option(help="Processes that score layouts; each takes the next GPU.", min=1)
    ] = 1,
) -> None:
    """Train the mixer bank, score layouts, and write the best one to best.yaml.

    Run it again after a stop, and it goes on where it was. Other hosts join if they name the same
    search.storage and another output. On several GPUs, torchrun shares the bank's layers out:
    torchrun --nproc-per-node 4 -m mohawk_nas search study.yaml --workers 4
    """
    config = _load(study, overrides)
    from mohawk_nas import ranks
    from mohawk_nas.reporting import screen

    if dry_run:
        from mohawk_nas.config import short_recipe
        from mohawk_nas.forecast import count_student_memory
        from mohawk_nas.plan import make_plan

        if ranks.rank() == 0:
            plan, rung = make_plan(config), {}
            if rungs := plan.search.rungs:
                rung = count_student_memory(config, short_recipe(config, max(rungs)))
            screen.show_plan(config, plan, rung_memory=rung)
        return
    from mohawk_nas import pipeline
    from mohawk_nas.reporting.html import write_report

    # What torchrun starts again is to go on, not to set aside what it had done.
    force = force and not ranks.started_again()
    with ranks.joined():
        if ranks.rank():
            pipeline.help_search(config)
            return
        result, best = pipeline.search(
            config, reporter=screen.reporter(), force=force, workers=workers
        )
    report = write_report(config.run_dir / "report.html", result, config)
    files = [best, report, *([config.run_dir / "pareto"] if result.pareto else [])]
    screen.show_result(result, config, next_command=f"mohawk-nas distill {best}", files=files)


@app.command()
def score(
    study: Study,
    layout: Annotated[
        str, typer.Option(help="Attention layers such as 1,5 or a strip such as 'M A M M M A M M'.")
    ],
    overrides: Overrides = None,
) -> None:
    """Place a layout of your own among those of a finished search."""
    config = _load(study, overrides)
    from mohawk_nas import pipeline
    from mohawk_nas.reporting import screen

    placed = pipeline.score(config, layout, reporter=screen.reporter())
    screen.show_placement(*placed)


@app.command()
def audit(
    study: Study,
    overrides: Overrides = None,
    hours: Annotated[
        float, typer.Option(help="Begin no distillation after so long.", min=0.0)
    ] = 1.0,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Of stage 3 a layout; if not given, the highest rung's or distill.logits'.",
            min=1,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Distillations of each layout.", min=1)] = 2,
    layouts: Annotated[
        int | None,
        typer.Option(
            help="So many in all, 12 at least; what the search names and 10 at random are always "
            "among them, however few are asked for. All there is time for if not given.",
            min=1,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that distil, on the GPUs in turn; 1 distils here.", min=1)
    ] = 1,
) -> None:
    """Measure how well a finished search's score foretells distilled layouts."""
    config = _load(study, overrides)
    from mohawk_nas.audit import audit as measure
    from mohawk_nas.reporting import screen

    _quiet()
    from mohawk_nas.reporting.audit_html import write_audit

    report, path = measure(
        config,
        hours=hours,
        tokens=tokens or max(config.search.rungs.tokens, default=config.distill.logits.tokens),
        seeds=seeds,
        layouts=layouts,
        workers=workers,
        reporter=screen.reporter(),
    )
    page = write_audit(path.with_suffix(".html"), report, name=config.name)
    screen.show_audit(report, files=[path, page])


@app.command()
def distill(
    best: Annotated[
        Path,
        typer.Argument(
            help="best.yaml, the run's folder, or a study that gives its layout (layout=1,5).",
            metavar="BEST",
        ),
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print memory, time and disk that it would take, and stop.")
    ] = False,
    gpus: Annotated[int, typer.Option(help="Dry run: GPUs that share the work.", min=1)] = 1,
    tflops: Annotated[
        float, typer.Option(help="Dry run: peak TFLOP/s of one GPU; an H100's in bf16.", min=0.001)
    ] = 989.0,
    utilisation: Annotated[
        float, typer.Option(help="Dry run: share of the peak that is reached.", min=0.001, max=1)
    ] = 0.4,
    force: Force = False,
) -> None:
    """Distil the chosen layout in full; run again after a stop, and it goes on.

    It writes to distill/ beside the best.yaml that it is given; of a study, to the run's folder.
    SIGTERM or Ctrl-C during stage 3 saves and exits with 75. On several GPUs, or hosts that share
    the run's folder: torchrun --nproc-per-node 4 -m mohawk_nas distill best.yaml
    """
    from mohawk_nas import pipeline, ranks
    from mohawk_nas.reporting import screen

    _quiet()
    if dry_run:
        from mohawk_nas.forecast import make_forecast

        if ranks.rank() == 0:
            chosen = pipeline.choose_layout(best, overrides or ())
            forecast = make_forecast(
                chosen.study, chosen.layout, gpus=gpus, peak=tflops * 1e12, utilisation=utilisation
            )
            screen.show_forecast(chosen.study, forecast)
        return
    # What torchrun starts again is to go on, not to set aside what it had done.
    force = force and not ranks.started_again()
    with ranks.joined(tensors=True):
        if ranks.rank():
            pipeline.help_distill(best, overrides or ())
            return
        chosen = pipeline.choose_layout(best, overrides or ())
        pipeline.write_given(chosen, force=force)
        result, folder = pipeline.distill(chosen, reporter=screen.reporter(), force=force)
    screen.show_distillation(result, folder, next_command=f"mohawk-nas export {folder}")


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="A distilled run, or its distill folder.", metavar="RUN")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to; RUN/export or RUN/layout.yaml if not given.")
    ] = None,
    format: Annotated[
        Exported, typer.Option(help="A Hugging Face folder, or the layout's names elsewhere.")
    ] = Exported.hf,
    standalone: Annotated[
        bool,
        typer.Option("--standalone", help="Loads without mohawk-nas; holds the code it needs."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    shard_size: Annotated[
        str | None, typer.Option(help="Largest file of weights, e.g. 5GB.")
    ] = None,
    force: Force = False,
) -> None:
    """Write a Hugging Face folder and check it in a fresh process.

    --format layout writes no weights: a YAML file with the layout as other stacks name it. For that
    RUN need only be searched.
    """
    if shard_size is not None and not re.fullmatch(r"[1-9]\d*[KMG]B", shard_size):
        raise InputError(f"--shard-size: must be like 500MB or 5GB, but got {shard_size!r}")
    if format is Exported.layout:
        if standalone or shard_size is not None:
            raise InputError("--format layout: writes no model; leave --standalone and such out")
        from mohawk_nas.export.stacks import export_layout

        _quiet()
        typer.echo(f"Wrote  {export_layout(source, out, force=force)}")
        return
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"--dtype: must be float32, bfloat16 or float16, but got {dtype!r}")
    from mohawk_nas.export.folder import export_folder
    from mohawk_nas.reporting import screen

    _quiet()
    folder, found = export_folder(
        source, out, dtype=dtype, standalone=standalone, shard_size=shard_size, force=force
    )
    screen.show_export(folder, found, next_command=f"mohawk-nas evaluate {folder}")


@app.command()
def evaluate(
    target: Run,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, such as lambada_openai,arc_easy,piqa.")
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(help="Folder with their rows, TASK/SPLIT.jsonl or .parquet; else the hub."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task; all.", min=1)] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="Examples before a question; as the task says.", min=0)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences of a task run at once.", min=1)
    ] = None,
    recall_lengths: Annotated[
        str | None, typer.Option(help="Tokens at which recall is asked, such as 512,1024,2048.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="File for all of it; evaluation.json in RUN if not given.")
    ] = None,
) -> None:
    """Perplexity, KL divergence to the teacher, recall and tasks, beside the teacher's."""
    lengths = _lengths(recall_lengths)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names and (task_data, limit, fewshot, batch_size) != (None,) * 4:
        raise InputError("--task-data, --limit, --fewshot and --batch-size go with --tasks")
    _quiet()
    from mohawk_nas.evaluate import evaluate as measure
    from mohawk_nas.evaluate import find_target
    from mohawk_nas.reporting import screen
    from mohawk_nas.tasks import TaskSuite

    found = find_target(target)
    options = {"limit": limit, "fewshot": fewshot, "batch_size": batch_size}
    suite = TaskSuite(names, data=task_data, **options) if names else None
    path = json or found.record
    rows, probe = measure(
        found, lengths=lengths, tasks=suite, write_to=path, reporter=screen.reporter()
    )
    screen.show_evaluation(rows, probe)
    screen.show_comparison(rows, block_size=found.study.data.block_size, file=path)


@app.command()
def generate(
    target: Run,
    prompt: Annotated[
        list[str], typer.Option(help="Text to continue; give several, and all are decoded at once.")
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0)] = 0,
) -> None:
    """Continue texts with a distilled or exported hybrid."""
    from mohawk_nas.evaluate import continue_text, find_target

    _quiet()
    texts = continue_text(
        find_target(target),
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    typer.echo("\n\n".join(texts))


@app.command()
def validate(study: Study, overrides: Overrides = None) -> None:
    """List every problem of a study; runs nothing.

    Settings that cannot be are listed first; only without such is the model looked at.
    """
    from mohawk_nas.errors import ConfigError
    from mohawk_nas.plan import find_problems

    try:
        config = _load(study, overrides)
    except ConfigError as e:
        # A file that cannot be read has a cause.
        if e.__cause__ is None:
            more = "The model and the text were not looked at: there may be more problems"
            e.args = (f"{e}\n{more}",)
        raise
    if problems := find_problems(config):
        raise ConfigError(problems, source=str(study))
    typer.echo(f"{study}: no problem found")


@app.command()
def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            help="scan, matrix, bank, trials, distill (all of these if none is named), search, "
            "inference.",
            metavar="[SUITE]...",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Shape: phi-24m, smollm2-135m, llama-3.2-1b or phi-1.5.")
    ] = "phi-24m",
    out: Annotated[Path, typer.Option(help="Results: a .json file, or a folder for it.")] = Path(
        "runs/bench"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes, for a first look.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Blocks a batch.", min=1)] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens a block.", min=8)] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.", min=2)] = None,
    keep: Annotated[int | None, typer.Option(help="Attention layers of a layout.", min=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:N].")] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights, tokens and layouts.", min=0)] = 0,
    search_tokens: Annotated[
        int | None, typer.Option(help="trials, search: tokens a layout is scored on.", min=8)
    ] = None,
    parallel: Annotated[
        str, typer.Option(help="distill under torchrun: auto, ddp or fsdp.")
    ] = "auto",
    layouts: Annotated[
        int | None, typer.Option(help="trials: layouts scored in each case.", min=1)
    ] = None,
    trials: Annotated[int | None, typer.Option(help="search: layouts; 500.", min=1)] = None,
    stage1_tokens: Annotated[int | None, typer.Option(help="search: 5242880.", min=0)] = None,
    stage2_tokens: Annotated[int | None, typer.Option(help="search: 10485760.", min=0)] = None,
    checkpoint_steps: Annotated[
        int | None, typer.Option(help="search: steps between two savings of the bank; 50.", min=1)
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="search: its folder; the same command goes on where it was stopped."),
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(help="inference: tokens a sequence; 512,2048,8192,32768.")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(help="inference: sequences; 1,8,32,128,256.")
    ] = None,
    cell_seconds: Annotated[
        float, typer.Option(help="inference: time for one context and batch.", min=0.0)
    ] = 20.0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the results file.")] = False,
) -> None:
    """Measure this machine: random weights of a model's shape, random tokens.

    Stage 3 on several GPUs: torchrun --nproc-per-node 4 -m mohawk_nas bench distill
    """
    from mohawk_nas.bench.options import DEFAULT_SUITES, Options

    options = Options(
        suites=tuple(dict.fromkeys(suites or DEFAULT_SUITES)),
        model=model,
        quick=quick,
        batch_size=batch_size,
        block_size=block_size,
        layers=layers,
        keep=keep,
        device=device,
        seed=seed,
        parallel=parallel,  # type: ignore[arg-type]
        layouts=layouts,
        search_tokens=search_tokens,
        trials=trials,
        stage1_tokens=stage1_tokens,
        stage2_tokens=stage2_tokens,
        checkpoint_steps=checkpoint_steps,
        work=work,
        contexts=_numbers("--contexts", contexts),
        batches=_numbers("--batches", batches),
        cell_seconds=cell_seconds,
    )
    _quiet()
    from mohawk_nas import ranks
    from mohawk_nas.bench.runner import results_path, run_benchmarks
    from mohawk_nas.reporting.benchmarks import show_end, show_suite
    from mohawk_nas.reporting.progress import ConsoleReporter

    with ranks.joined(tensors=True):
        if ranks.rank():
            if ranks.first_is_ready():
                run_benchmarks(options, out)
            return
        path = results_path(out, options, force=force)
        ranks.first_is_ready()
        results = run_benchmarks(options, path, reporter=ConsoleReporter(), show=show_suite)
    show_end(results.path, results.failed)
    if results.failed:
        raise typer.Exit(1)


@app.command("ls")
def list_names(what: Annotated[Listed, typer.Argument(help="What to list.")]) -> None:
    """List what a study can name."""
    from mohawk_nas.reporting import screen

    screen.show_names(what.value)


def _load(study: Path, overrides: Sequence[str] | None) -> StudyConfig:
    from mohawk_nas.config import load_study

    config = load_study(study, overrides or ())
    _quiet()
    return config


def _numbers(where: str, text: str | None) -> tuple[int, ...] | None:
    """Numbers with commas between them."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{where}: must be numbers with commas between them, such as 512,8192, but got {text!r}"
        ) from None


def _quiet() -> None:
    """Leave the screen to this program: no libraries' progress bars, no advice."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging as transformers_logging

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)


def _lengths(text: str | None) -> list[int]:
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal() or int(part) == 0]:
        raise InputError(
            f"--recall-lengths: must be numbers such as 512,1024, but got {wrong[0]!r}"
        )
    return [int(part) for part in parts]


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit.

    0 done, 1 failed midway, 2 bad input, 75 stopped by a signal with all work saved, 130 stopped by
    the user.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in arguments
    arguments = [a for a in arguments if a != "--traceback"]
    try:
        # Usage errors print themselves and exit with 2.
        app(args=arguments, prog_name="mohawk-nas")
    except MohawkError as e:
        if with_traceback:
            raise
        _fail(str(e), e.exit_code)
    except SystemExit as e:
        # So typer ends a command after Ctrl-C.
        if e.code == INTERRUPTED:
            _fail("stopped; the same command goes on from here", INTERRUPTED)
        raise
    except OSError as e:
        if with_traceback:
            raise
        code = 1 if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else 2
        _fail(f"{e.filename or 'file system'}: {e.strerror or e}", code)
    except Exception as e:
        if with_traceback:
            raise
        text = " ".join(str(e).split())
        _fail(f"{type(e).__name__}: {text}; --traceback shows where", 1)


def _fail(text: str, code: int) -> None:
    print(f"mohawk-nas: {text}", file=sys.stderr)
    sys.exit(code)
