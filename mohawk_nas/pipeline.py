"""What the commands do, as functions: each takes a study and leaves its results in a folder.

A run's folder holds ``config.yaml`` (the resolved study), ``provenance.json``, ``study.db`` (or
``study.journal``, if several workers share the study), ``best.yaml`` and ``report.html``, and
``decode.json`` if the budget limits the time of a decode step; ``distill/`` and ``export/`` follow.
With ``search.pareto`` each layout of the set has a folder in ``pareto/`` that holds its
``best.yaml`` and is then used like the run's own.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mohawk_nas.bank import Bank
from mohawk_nas.config import (
    BankConfig,
    DistillConfig,
    StudyConfig,
    load_study,
    plain,
    recipe_of,
    study_from_dict,
)
from mohawk_nas.data import TrainingText
from mohawk_nas.distill.logits import LogitsResult, distill_logits
from mohawk_nas.distill.logits_trainer import student_to_train
from mohawk_nas.distill.parallel import parallel_mode
from mohawk_nas.errors import ConfigError, LayoutError, RunError, TeacherError, TrainingError
from mohawk_nas.export.hf import describe_candidates, save_hybrid
from mohawk_nas.files import DamagedFile, atomic_folder, atomic_write, load_tensors, write_json
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import MIXERS
from mohawk_nas.plan import check_searchable, find_problems
from mohawk_nas.ranks import first_is_ready, my_share, num_ranks, rank, told_once, wait_for_all
from mohawk_nas.registry import is_users, text_digest
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.reporting.board import missing_package
from mohawk_nas.runs import (
    DISTILL_RECORD,
    check_distill_dir,
    check_identity,
    check_run_dir,
    claim_identity,
    claim_run_dir,
    no_search,
    only_one,
    provenance,
    set_aside,
)
from mohawk_nas.search.decode import (
    UntrainedMixers,
    measure_step,
)
from mohawk_nas.search.leases import Worker
from mohawk_nas.search.result import Placement, StudyResult, Trial
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.space import SearchSpace, load_space
from mohawk_nas.search.storages import holds_study, locate_study
from mohawk_nas.search.study import check_search, run_study
from mohawk_nas.search.workers import environments, run_crew
from mohawk_nas.stream import TextStream
from mohawk_nas.student import MixerSource, assemble
from mohawk_nas.teacher import Teacher, check_vocabularies, load_teacher
from mohawk_nas.workbench import Workbench

__all__ = [
    "BestLayout",
    "choose_layout",
    "distill",
    "help_distill",
    "help_search",
    "load_best",
    "mixer_files",
    "score",
    "search",
    "write_given",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class BestLayout:
    """What ``best.yaml`` holds: all that distillation needs."""

    path: Path
    study: StudyConfig
    layout: Layout
    candidates: dict[str, dict[str, Any]]
    teacher_fingerprint: str | None
    """None where the layout was given, for whatever teacher the study names."""
    scores: dict[str, Any]
    is_written: bool = True
    """Whether ``best.yaml`` is there."""


def search(
    config: StudyConfig, *, reporter: Reporter = SILENT, force: bool = False, workers: int = 1
) -> tuple[StudyResult, Path]:
    """Train the bank, run the study, write ``best.yaml`` and what ``search.pareto`` asks for.

    Args:
        config: The study.
        reporter: Told what happens.
        force: Set an earlier run of this name aside and start anew. The bank is kept.
        workers: Processes that score layouts, besides this one if they are more than one.

    Returns:
        The result, and the path of ``best.yaml``.

    Raises:
        ConfigError: Every problem of the study, before anything is run.
        RunError: The run's folder holds something else, or the storage is not for several workers.
        TrainingError: The storage cannot be used, or all workers have stopped.
    """
    check_searchable(config)
    if problems := find_problems(config):
        raise ConfigError(problems)
    with only_one(config.run_dir):
        if force and (url := config.search.storage) is not None and holds_study(url, config.name):
            raise RunError(
                f"search.storage: holds a study {config.name!r}, which --force does not set aside, "
                "since others may be at it; give the study another name"
            )
        # With --force what is there is set aside.
        kept_in = config.run_dir if not force else None
        locate_study(config.search.storage, run_dir=kept_in, workers=workers)
        claim_run_dir(config, force=force)
        return _search(Workbench(config, reporter), workers=workers)


def _search(bench: Workbench, *, workers: int) -> tuple[StudyResult, Path]:
    config, reporter = bench.config, bench.reporter
    claim_identity(config.run_dir, bench.study_identity)
    # With what was measured the budget, or a baseline's layout, may be impossible; told before the
    # bank is trained.
    if problems := check_search(config.search, space=bench.space, budget=bench.budget):
        raise ConfigError(problems)
    # What this teacher cannot be scored by is told before the bank is trained.
    study = bench.study
    _train_bank(bench)
    if workers == 1:
        result = _score(bench, worker=None)
    else:
        # This process scores nothing, so what it holds of a GPU is its workers'.
        bench.release()
        url = locate_study(config.search.storage, run_dir=config.run_dir, workers=workers)
        shared = dataclasses.replace(study, search=dataclasses.replace(study.search, storage=url))
        result = run_crew(
            shared,
            bench.space,
            bench.budget,
            run_dir=config.run_dir,
            target=_score_as_worker,
            arguments=(shared,),
            environments=environments(workers, config.teacher.device),
            identity=bench.study_identity,
            reporter=reporter,
        )
    path = config.run_dir / "best.yaml"
    of_best = {
        **({"rungs": _rung_figures(result)} if result.rungs else {}),
        "tied_with": [trial.layout.strip(bench.space.symbols) for trial in result.ties],
        **_check_decode(bench, result),
    }
    _write_best(path, bench, result, result.best, of_best)
    _write_pareto_set(config.run_dir / "pareto", bench, result, of_best)
    return result, path


def _check_decode(bench: Workbench, result: StudyResult) -> dict[str, Any]:
    """Measure a decode step of the best layout as a whole, beside the sum over its layers."""
    times, step, layout = bench.decode_times, bench.decode_step, result.best.layout
    if times is None or step is None:
        return {}
    summed = times.of(layout) / 1e6
    found: dict[str, Any] = {"summed_ms": summed, "context": step.context, "batch": step.batch}
    try:
        bank: MixerSource = bench.bank
        if bench.config.search.evaluation != "bank":
            bank = UntrainedMixers(bench.teacher, bench.space)
        measured = measure_step(bench.teacher, layout, bank, step) * 1e3
    except TrainingError as e:
        bench.reporter.say(f"the best layout's decode step was not checked: {e}")
        return {"decode": found}
    error = summed / measured - 1
    limit = bench.config.budget.decode.milliseconds
    assert limit is not None
    over = f"; this is above the limit of {limit:g} ms" if measured > limit else ""
    bench.reporter.say(
        f"decode step of the best layout: {measured:.3g} ms measured, {summed:.3g} ms as the sum "
        f"over its layers (error {error:+.1%}){over}"
    )
    return {"decode": found | {"measured_ms": measured, "error": error}}


def _score_as_worker(number: int, config: StudyConfig) -> None:
    """What a worker's process runs, after the bank is there."""
    _score(Workbench(config), worker=Worker(number=number))


def _score(bench: Workbench, *, worker: Worker | None) -> StudyResult:
    def provenance(layout: Layout) -> Mapping[str, Any]:
        return {"bank": {str(i): bench.bank.key(i, layout[i]) for i in layout.replaced_layers}}

    scorer = bench.scorer()
    return run_study(
        bench.study,
        bench.space,
        bench.budget,
        scorer,
        run_dir=bench.config.run_dir,
        distiller=bench.distiller(scorer),
        provenance=provenance,
        reporter=bench.reporter,
        identity=bench.study_identity,
        worker=worker,
        stage1_losses=bench.stage1_losses,
        learn_gates=bench.learn_gates,
    )


def help_search(config: StudyConfig) -> None:
    """What the other ranks do while rank 0 searches: their share of the bank."""
    if first_is_ready() and config.search.evaluation == "bank":
        _train_share(Workbench(config))


def _train_bank(bench: Workbench) -> None:
    # The text is tokenised by now; the others find it in the cache.
    first_is_ready()
    if bench.config.search.evaluation == "bank":
        _train_share(bench)


def _train_share(bench: Workbench) -> None:
    # Sorted by candidate first, so that each rank has its part of a slow one.
    pairs = sorted(bench.space.replaceable, key=lambda pair: (pair[1], pair[0]))
    _share_out(bench.bank, pairs, bench.reporter)


def _share_out(bank: Bank, pairs: Sequence[tuple[int, str]], reporter: Reporter) -> None:
    """Have all ranks together train what a bank lacks of some (layer, candidate) pairs."""
    bank.train(my_share(pairs), reporter=reporter)
    if num_ranks() > 1:
        reporter.say(f"waiting for {num_ranks() - 1} other processes")
    # What they have trained is read from the bank's folder.
    wait_for_all()


def score(
    config: StudyConfig, text: str, *, reporter: Reporter = SILENT
) -> tuple[Layout, Score, Placement, StudyResult]:
    """Score a layout of the user's own and place it among a study's trials.

    Args:
        config: A study that has been searched.
        text: The layout, as :meth:`SearchSpace.parse` reads it.
        reporter: Told what happens.

    Raises:
        LayoutError: The text is no layout of the space.
        RunError: The study has no trials yet.
    """
    if problems := find_problems(config):
        raise ConfigError(problems)
    if not (config.run_dir / "config.yaml").is_file():
        raise no_search(config)
    check_run_dir(config)
    bench = Workbench(config, reporter)
    check_identity(config.run_dir, bench.identity)
    try:
        layout = bench.space.parse(text)
    except LayoutError as e:
        raise LayoutError(f"layout {text!r}: {e}") from e
    result = bench.result()
    if layout in result.by_layout:
        scored = result.by_layout[layout].score
    else:
        scored = bench.scorer().score(layout)
    return layout, scored, result.place(layout, scored), result


def load_best(path: str | Path, overrides: Sequence[str] = ()) -> BestLayout:
    """Read ``best.yaml``.

    Args:
        path: The file, or the run's folder.
        overrides: Changes to the study, e.g. ``distill.logits.tokens=1000000``.

    Raises:
        RunError: It is not there, or is not one.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.yaml"
    if not path.is_file():
        raise RunError(f"{path}: no such file; `mohawk-nas search` writes it")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        study, layout = raw["study"], Layout(tuple(raw["layout"]))
        candidates, fingerprint = raw["candidates"], raw["teacher"]["fingerprint"]
        layout.check([ATTENTION, *candidates], num_layers=len(layout))
    except (ValueError, yaml.YAMLError, KeyError, TypeError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise RunError(f"{path}: must be what `search` wrote, but is not ({reason})") from e
    except LayoutError as e:
        raise LayoutError(f"{path}: {e}") from e
    return BestLayout(
        path=path,
        study=study_from_dict(study, overrides=overrides, source=str(path)),
        layout=layout,
        candidates=candidates,
        teacher_fingerprint=fingerprint,
        scores=raw.get("scores", {}),
    )


def choose_layout(path: str | Path, overrides: Sequence[str] = ()) -> BestLayout:
    """What to distil: a search's ``best.yaml``, or the layout that a study gives.

    Args:
        path: ``best.yaml``, the run's folder, or a study.
        overrides: Changes to the study.

    Raises:
        ConfigError: It is a study, with every problem of it.
        RunError: It is neither.
    """
    path = Path(path)
    if not _is_study(path):
        return load_best(path, overrides)
    config = load_study(path, overrides)
    if config.layout is None:
        raise ConfigError(
            "layout: must be given where a study is distilled as it is; or find one: `mohawk-nas "
            f"search {path}`",
            source=str(path),
        )
    if problems := find_problems(config):
        raise ConfigError(problems, source=str(path))
    teacher = load_teacher(config.teacher, meta=True)
    space = load_space(config.space, num_layers=teacher.num_layers)
    layout = space.parse(config.layout)
    if not layout.replaced_layers:
        raise ConfigError(
            "layout: keeps attention in every layer, so there is nothing to distil; leave some out",
            source=str(path),
        )
    return BestLayout(
        path=config.run_dir / "best.yaml",
        study=config,
        layout=layout,
        candidates=_candidates_of(layout, space),
        teacher_fingerprint=None,
        scores={},
        is_written=False,
    )


def _is_study(path: Path) -> bool:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, yaml.YAMLError):
        return False
    # What a search wrote holds its study whole.
    return isinstance(raw, dict) and "teacher" in raw and "study" not in raw


def write_given(best: BestLayout, *, force: bool = False) -> None:
    """Make the run's folder of a layout that a study gives, as a search would have left it.

    Args:
        best: What :func:`choose_layout` has found.
        force: Set the folder aside if it holds something else.

    Raises:
        RunError: The folder holds something else, or a distillation is at work in it.
    """
    if best.is_written or rank():
        return
    config, folder = best.study, best.path.parent / "distill"
    if not force:
        check_distill_dir(folder, _settings(best))
    space = load_space(config.space, num_layers=len(best.layout))
    with only_one(config.run_dir):
        if force and _is_of_another(config):
            with only_one(folder):
                set_aside(config.run_dir)
        claim_run_dir(config, force=False)
        content = {
            "strip": best.layout.strip(space.symbols),
            "attention_layers": list(best.layout.attention_layers),
            "layout": list(best.layout.candidates),
            "candidates": best.candidates,
            "scores": {},
            "teacher": {"source": config.teacher.source, "fingerprint": None},
            "bank": {},
            "provenance": provenance(),
            "study": plain(_anchored(config)),
        }
        _write_yaml(best.path, "# The layout that the study gives.\n", content)


def _is_of_another(config: StudyConfig) -> bool:
    """Whether the run's folder holds something that this study cannot go on with."""
    try:
        check_run_dir(config)
    except RunError:
        return True
    return False


def distill(
    best: BestLayout, *, reporter: Reporter = SILENT, force: bool = False
) -> tuple[LogitsResult, Path]:
    """Distil a layout in full, into ``distill/`` beside its ``best.yaml``.

    A run that was interrupted goes on. The result in ``distill/model`` is a Hugging Face folder.
    With several processes this is for the first one; the others call :func:`help_distill`.

    Raises:
        RunError: The folder holds another distillation, or the teacher is another one.
        ConfigError: The batch cannot be divided over the processes, or TensorBoard is not here.
        Stopped: A signal asked for it during stage 3, which then goes on from there.
    """
    folder = best.path.parent / "distill"
    _check_distill(best.study.distill)
    with only_one(folder):
        return _distill(best, folder, reporter=reporter, force=force)


def help_distill(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """What the other ranks do while rank 0 distils: their share of all three stages."""
    if first_is_ready():
        best = choose_layout(path, overrides)
        bench = Workbench(best.study)
        _train_all_stages(bench, best, best.path.parent / "distill", _distill_text(bench))


def _check_distill(config: DistillConfig) -> None:
    problems = []
    if config.logits.batch_size % num_ranks():
        problems.append(
            "distill.logits.batch_size: blocks of a step over all processes, so it must be a "
            f"multiple of their number ({num_ranks()}), but got {config.logits.batch_size}"
        )
    if config.tensorboard and (problem := missing_package()):
        problems.append(problem)
    if problems:
        raise ConfigError(problems)


def _distill(
    best: BestLayout, folder: Path, *, reporter: Reporter, force: bool
) -> tuple[LogitsResult, Path]:
    config = best.study.distill
    if not best.layout.replaced_layers:
        raise RunError(
            f"{best.path}: its layout keeps attention in every layer, so there is nothing to "
            "distil; lower the study's budget and search again"
        )
    settings = _settings(best)
    if not force:
        check_distill_dir(folder, settings)
    bench = Workbench(best.study, reporter)
    if best.teacher_fingerprint not in (None, bench.teacher.fingerprint):
        raise RunError(
            f"{best.path}: was made for another teacher (fingerprint {best.teacher_fingerprint}, "
            f"but {best.study.teacher.source} has {bench.teacher.fingerprint}); run `search` again"
        )
    try:
        bench.space.check(best.layout)
    except LayoutError as e:
        raise LayoutError(f"{best.path}: {e}") from e
    if force and folder.exists():
        set_aside(folder)
    train = _distill_text(bench)
    identity = {**bench.identity, **mixer_files(best.candidates), "seed": best.study.seed}
    if best.study.data.streaming:
        # What is cached follows from text of the bank split.
        identity["streamed text"] = train.fingerprint
    claim_identity(folder, identity)
    write_json(folder / DISTILL_RECORD, settings)
    # The text is tokenised by now; the others find it in the cache.
    first_is_ready()
    result, student, bank = _train_all_stages(bench, best, folder, train)
    with atomic_folder(folder / "model") as beside:
        save_hybrid(
            student,
            beside,
            layout=best.layout,
            candidates=best.candidates,
            tokenizer=bench.teacher.tokenizer,
        )
    pairs = [(i, best.layout[i]) for i in best.layout.replaced_layers]
    write_json(
        folder / "result.json",
        {
            "layout": list(best.layout.candidates),
            "scores": best.scores,
            "validation_kl": {"before": result.before.mean_kl, "after": result.after.mean_kl},
            "best_step": result.best_step,
            "tokens": {"hidden": config.hidden.tokens, "logits": result.tokens},
            "bank": {str(i): bank.key(i, name) for i, name in pairs},
            "teacher": bench.teacher.fingerprint,
            "provenance": provenance() | {"processes": num_ranks()},
        },
    )
    return result, folder


def mixer_files(candidates: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What a student's weights depend on of its mixers' files: those of the user's own.

    Args:
        candidates: As :func:`describe_candidates` gives them.
    """
    found = {}
    for name in sorted({str(choices["mixer"]) for choices in candidates.values()}):
        mixer = MIXERS.get(name)
        if is_users(mixer):
            found[f"file of mixer {name}"] = text_digest(mixer)
    return found


def _settings(best: BestLayout) -> dict[str, Any]:
    """What a distillation that goes on must agree with: all that decides more than rounding."""
    config = best.study.distill
    found: dict[str, Any] = plain(config) | {"logits": recipe_of(config.logits)}
    del found["tensorboard"]
    if config.teacher.source:
        # Where it runs says nothing of what it is.
        del found["teacher"]["device"]
    else:
        del found["teacher"]
    return {"layout": list(best.layout.candidates), "distill": found}


def _train_all_stages(
    bench: Workbench, best: BestLayout, folder: Path, train: TrainingText
) -> tuple[LogitsResult, Any, Bank]:
    """Stages 1 to 3 with all processes of this run; the student is whole on the first one."""
    config = best.study.distill
    bank = _layer_bank(bench, best, folder / "bank", train)
    guide = _guide(bench)
    mode = parallel_mode(config.logits, guide)

    def undistilled() -> Any:
        whole = assemble(bench.teacher, best.layout, bench.bank)
        bench.bank.release()
        return whole

    if mode == "fsdp":
        # Its parts go to the GPU one by one.
        student = assemble(bench.teacher, best.layout, bank, share=False).cpu().float()
    else:
        student = student_to_train(
            bench.teacher,
            best.layout,
            bank,
            config.logits.trainable,
            taught_in=guide.model.dtype,
        )
    # The student has its own by now.
    bank.release()
    if mode != "one":
        how = "DDP" if mode == "ddp" else "FSDP2"
        bench.reporter.say(f"stage 3 is shared by {num_ranks()} processes ({how})")
    try:
        result = distill_logits(
            guide,
            student,
            undistilled=(
                undistilled if bank is not bench.bank and config.start == "bank" else None
            ),
            train=train,
            validation=bench.blocks["validation"],
            config=config.logits,
            folder=folder,
            seed=best.study.seed,
            reporter=bench.reporter,
            mode=mode,
            tensorboard=config.tensorboard,
        )
    except DamagedFile as e:
        raise told_once(RunError(f"{e}; use --force to set {folder} aside and start anew")) from e
    if mode == "fsdp" and rank() == 0:
        # Of a large teacher only parts are here, too.
        del guide
        bench.release()
        bank.teacher = bench.teacher
        student = assemble(bench.teacher, best.layout, bank, share=False).cpu().float()
        student.load_state_dict(load_tensors(folder / "best.safetensors"), strict=False)
    return result, student, bank


def _guide(bench: Workbench) -> Teacher:
    """The teacher of stage 3."""
    config = bench.config.distill.teacher
    if not config.source:
        return bench.teacher
    bench.reporter.say(f"stage 3 is taught by {config.source}; KL is to that model")
    try:
        guide = load_teacher(config, seed=bench.config.seed)
    except TeacherError as e:
        raise TeacherError(str(e).replace("teacher.", "distill.teacher.", 1)) from e
    check_vocabularies(guide, bench.teacher)
    return guide


def _distill_text(bench: Workbench) -> TrainingText:
    """The bank split once more: as much of it as the distillation reads, or all as a stream."""
    config, data = bench.config.distill, bench.config.data
    if data.streaming:
        return TextStream(data, bench.teacher.tokenizer)
    return bench.training_text(
        max(config.matrix.tokens, config.hidden.tokens, config.logits.tokens)
    )


def _layer_bank(bench: Workbench, best: BestLayout, path: Path, train: TrainingText) -> Bank:
    """The bank that the student is assembled from, trained for its layers alone."""
    config = best.study.distill
    scratch = config.start == "scratch"
    pairs = [(i, best.layout[i]) for i in best.layout.replaced_layers]
    if not scratch:
        # Usually all there; a bank that was deleted is made again.
        if missing := bench.bank.missing(pairs):
            bench.reporter.say(
                f"{len(missing)} of {len(pairs)} bank entries are not in {bench.bank.path}; they "
                "are trained again"
            )
        _share_out(bench.bank, pairs, bench.reporter)
        if not config.hidden.tokens:
            return bench.bank
    bank = Bank(
        path,
        teacher=bench.teacher,
        candidates=bench.space.candidates,
        recipe=BankConfig(
            path=str(path),
            matrix=config.matrix if scratch else dataclasses.replace(config.matrix, tokens=0),
            hidden=config.hidden,
            checkpoint_steps=best.study.bank.checkpoint_steps,
        ),
        blocks=train,
        seed=best.study.seed + 1,
        start=None if scratch else bench.bank,
    )
    _share_out(bank, pairs, bench.reporter)
    return bank


def _write_pareto_set(
    folder: Path, bench: Workbench, result: StudyResult, of_best: Mapping[str, Any]
) -> None:
    """A folder for each member, named by its layout, so that it stays when the set changes."""
    symbols = bench.space.symbols
    members = {"".join(t.layout.strip(symbols).split()): t for t in result.pareto_set}
    for name, trial in members.items():
        more = of_best if trial is result.best else {}
        _write_best(folder / name / "best.yaml", bench, result, trial, more)
    for former in sorted(set(folder.glob("*/best.yaml"))):
        # What has been distilled stays; a lock that nobody holds does not.
        inside = [path for path in former.parent.iterdir() if not path.name.startswith(".")]
        if former.parent.name not in members and inside == [former]:
            shutil.rmtree(former.parent)


def _write_best(
    path: Path, bench: Workbench, result: StudyResult, best: Trial, more: Mapping[str, Any]
) -> None:
    symbols = bench.space.symbols
    content = {
        "strip": best.layout.strip(symbols),
        "attention_layers": list(best.layout.attention_layers),
        "layout": list(best.layout.candidates),
        "candidates": _candidates_of(best.layout, bench.space),
        "scores": {
            "value": best.value,
            "objectives": {name: best.score.mean(name) for name in best.score.per_block},
            "tokens": best.score.tokens,
            "layouts_scored": len(result.trials),
            "layouts_possible": result.num_possible,
            **more,
        },
        "teacher": {
            "source": bench.config.teacher.source,
            "fingerprint": bench.identity["teacher"],
        },
        "bank": best.provenance.get("bank", {}),
        "provenance": provenance(),
        "study": plain(_anchored(bench.config)),
    }
    text = "# Written by `mohawk-nas search`; `mohawk-nas distill` takes it from here.\n"
    _write_yaml(path, text, content)


def _write_yaml(path: Path, comment: str, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as beside:
        beside.write_text(comment + yaml.safe_dump(content, sort_keys=False, width=100), "utf-8")


def _candidates_of(layout: Layout, space: SearchSpace) -> dict[str, dict[str, Any]]:
    return describe_candidates(
        {name: space.candidates[name] for name in sorted(set(layout.candidates))}
    )


def _rung_figures(result: StudyResult) -> list[dict[str, Any]]:
    """What the best layout scores at each rung, distilled, on the validation split."""
    figures = []
    for rung in result.rungs:
        if score := rung.scores.get(result.best.layout):
            figures.append(
                {
                    "tokens": rung.tokens,
                    "value": rung.value(result.best.layout),
                    "objectives": {name: score.mean(name) for name in score.per_block},
                    "layouts_distilled": len(rung.scores),
                    "seeds": rung.num_seeds(result.best.layout),
                }
            )
    return figures


def _anchored(config: StudyConfig) -> StudyConfig:
    """The study with its folders made absolute, so that it means the same from any folder."""
    return dataclasses.replace(
        config,
        output=str(Path(config.output).resolve()),
        bank=dataclasses.replace(config.bank, path=str(Path(config.bank.path).resolve())),
        data=dataclasses.replace(config.data, cache=str(Path(config.data.cache).resolve())),
    )
