"""How good a hybrid is, beside its teacher, on held-out text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mohawk_nas.config import StudyConfig, study_from_dict
from mohawk_nas.decoding import continue_tokens
from mohawk_nas.errors import BankError, RunError
from mohawk_nas.export.hf import load_hybrid
from mohawk_nas.files import DamagedFile, read_json, write_json
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import BlockFigures, Figure, evaluate_blocks
from mohawk_nas.pipeline import load_best, mixer_files
from mohawk_nas.recall import (
    LengthProbe,
    RecallProbe,
    answers,
    make_length_probes,
    most_positions,
)
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.runs import check_identity, provenance, set_aside
from mohawk_nas.student import assemble
from mohawk_nas.tasks import TaskSuite
from mohawk_nas.teacher import pick_device
from mohawk_nas.workbench import Workbench

__all__ = [
    "Evaluation",
    "Examination",
    "Target",
    "continue_text",
    "evaluate",
    "find_target",
    "load_student",
    "record",
    "write_record",
]

CARD = "mohawk_nas.json"
"""File in an exported folder that says which study it came from."""
RECORD = "evaluation.json"
"""File beside a run's best.yaml, or in an exported folder, that says how good it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One model's figures on the test split."""

    name: str
    figures: BlockFigures
    recall: float | None
    """Share of right answers to the test split's probe, 0 to 1; None if the teacher solves none."""
    answers: tuple[float, ...] = ()
    """Of which it is the mean: see :meth:`~mohawk_nas.recall.RecallProbe.parts`."""
    lengths: tuple[Figure, ...] = ()
    """Recall over length, a figure each probe of the examination."""
    tasks: tuple[Figure, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(self.figures.mean_cross_entropy)

    @property
    def text(self) -> tuple[Figure, ...]:
        """Cross-entropy and, if the teacher solves the probe, recall on the test split."""
        losses = self.figures.cross_entropy
        found = [Figure.mean_of("cross-entropy", losses, higher_is_better=False)]
        if self.answers:
            found.append(Figure.mean_of("recall", self.answers, higher_is_better=True))
        return tuple(found)

    @property
    def compared(self) -> tuple[Figure, ...]:
        """Every figure that a student is held against its teacher by, in one order."""
        return (*self.text, *self.lengths, *self.tasks)


@dataclass(kw_only=True)
class Examination:
    """What models of one study are asked: the test split's text, recall, and tasks.

    Args:
        bench: Of the study.
        lengths: Tokens of a sequence, for recall over length. Those that the teacher has no
            positions for are left out.
        tasks: Of lm-eval.

    Raises:
        InputError: A length leaves no room for the questions.
    """

    bench: Workbench
    lengths: Sequence[int] = ()
    tasks: TaskSuite | None = None
    probe: RecallProbe | None = field(init=False)
    length_probes: list[LengthProbe] = field(init=False)
    left_out: dict[int, str] = field(init=False, default_factory=dict)
    """Length -> why no model is asked at it."""

    def __post_init__(self) -> None:
        bench = self.bench
        self.probe = bench.probe("test")
        most = most_positions(bench.teacher)
        for length in sorted(set(self.lengths)):
            if most is not None and length > most:
                self.left_out[length] = f"the teacher has learnt {most:,} positions, and no more"
                bench.reporter.say(f"length {length:,} is left out: {self.left_out[length]}")
            elif length > bench.teacher.context:
                bench.reporter.say(
                    f"length {length:,} is beyond the {bench.teacher.context:,} tokens that the "
                    "teacher was made for"
                )
        self.length_probes = make_length_probes(
            bench.teacher,
            bench.blocks["test"].tokens.flatten().long(),
            [length for length in self.lengths if length not in self.left_out],
            separator=bench.separator,
            template=None if self.probe is None else self.probe.asked[0][0],
            seed=bench.config.seed,
        )

    def of(self, model: Any, name: str, *, further: bool = True) -> Evaluation:
        """Examine one model.

        Args:
            model: The teacher, or a causal LM with its vocabulary.
            name: For tables.
            further: Ask for recall over length and tasks, too.
        """
        bench, reporter = self.bench, self.bench.reporter
        with reporter.stage(f"evaluating the {name}", total=None, unit="block"):
            figures = evaluate_blocks(
                bench.teacher,
                model,
                bench.blocks["test"],
                batch_size=bench.config.search.batch_size,
            )
            shares: tuple[float, ...] = ()
            if self.probe is not None:
                shares = tuple(self.probe.parts(answers(model, self.probe)).tolist())
        found, probes = [], self.length_probes if further else []
        with reporter.stage(f"recall, {name}", total=len(probes), unit="probe") as task:
            for probe in probes:
                right = answers(model, probe).tolist()
                found.append(Figure.mean_of(str(probe), right, higher_is_better=True))
                task.advance(1, tokens=probe.tokens.numel())
        scores: tuple[Figure, ...] = ()
        if self.tasks is not None and further:
            scores = self.tasks.run(model, bench.teacher.tokenizer, name=name, reporter=reporter)
        return Evaluation(
            name=name,
            figures=figures,
            recall=sum(shares) / len(shares) if shares else None,
            answers=shares,
            lengths=tuple(found),
            tasks=scores,
        )

    def describe(self) -> dict[str, Any]:
        """What was asked, for the record."""
        bench = self.bench
        test = bench.blocks["test"]
        made_for = bench.teacher.context
        return {
            "test_tokens": test.tokens.numel(),
            "test_text": test.fingerprint,
            "block_size": bench.config.data.block_size,
            "teacher_positions": made_for if made_for < 2**31 else None,
            "recall_probe": None if self.probe is None else str(self.probe),
            "recall_errors_over": None if self.probe is None else self.probe.parts_are,
            "lengths": sorted({probe.length for probe in self.length_probes}),
            "lengths_left_out": {str(length): why for length, why in self.left_out.items()},
            "tasks": None if self.tasks is None else self.tasks.settings,
            "seed": bench.config.seed,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a path given to ``evaluate`` or ``generate`` stands for."""

    study: StudyConfig
    model: Path | None
    """Folder of a hybrid, if there is one."""
    best: Path | None
    """``best.yaml`` of the run, if this is one."""

    @property
    def record(self) -> Path:
        """Where its evaluation is written."""
        folder = self.best.parent if self.best is not None else self.model
        assert folder is not None
        return folder / RECORD


def find_target(path: str | Path) -> Target:
    """Recognise an exported folder, a run's folder, its ``distill`` folder or its ``best.yaml``.

    Raises:
        RunError: It is none of these.
    """
    path = Path(path)
    if (path / CARD).is_file():
        return Target(study=_study_of(path / CARD), model=path, best=None)
    folder = path.parent if path.name == "best.yaml" or path.name == "distill" else path
    best = folder / "best.yaml"
    if not best.is_file():
        raise RunError(
            f"{path}: must be an exported folder or a run's folder with a best.yaml, but is neither"
        )
    model, result = folder / "distill" / "model", folder / "distill" / "result.json"
    return Target(
        study=load_best(best).study,
        model=model if (model / "config.json").is_file() and result.is_file() else None,
        best=best,
    )


def _study_of(card: Path) -> StudyConfig:
    try:
        study = study_from_dict(read_json(card)["study"], source=str(card))
        # Files of mixers lie in the folder; exports of earlier versions say where they lay.
        plugins = [str(card.parent.resolve() / plugin) for plugin in study.plugins]
        return dataclasses.replace(study, plugins=plugins)
    except DamagedFile as e:
        raise RunError(f"{e}; export it again") from e
    except (KeyError, TypeError) as e:
        raise RunError(
            f"{card}: must be what `export` wrote, but is not ({type(e).__name__}: {e})"
        ) from e


def load_student(target: Target, **options: Any) -> Any:
    """The hybrid of a target that has one; its plugins must have been loaded.

    Args:
        target: Of which.
        **options: As for :func:`load_hybrid`.

    Raises:
        RunError: It cannot be read, or the file of a mixer has changed since it was distilled.
    """
    assert target.model is not None
    model = load_hybrid(target.model, **options)
    if target.best is not None:
        check_identity(
            target.model.parent,
            mixer_files(model.config.candidates),
            instead="or distil again with `distill --force`",
        )
    return model


@torch.no_grad()
def evaluate(
    target: Target,
    *,
    lengths: Sequence[int] = (),
    tasks: TaskSuite | None = None,
    write_to: Path | None = None,
    reporter: Reporter = SILENT,
) -> tuple[list[Evaluation], RecallProbe | None]:
    """Figures of the teacher, of the undistilled student where its bank is there, and of the model.

    Args:
        target: What to evaluate.
        lengths: Tokens at which recall is asked as well.
        tasks: Asked of the teacher and of the model; of the undistilled student only where there is
            no other.
        write_to: File for all of it; one that is there is set aside.
        reporter: Told what happens.

    Returns:
        The figures, and what recall was asked by.

    Raises:
        DataError: The study's text cannot be read.
        InputError: A length or task does not fit the model.
    """
    bench = Workbench(target.study, reporter)
    examination = Examination(bench=bench, lengths=lengths, tasks=tasks)
    models = list(_models(target, bench))
    asked_further = (models[0][0], models[-1][0])
    rows = [examination.of(model, name, further=name in asked_further) for name, model in models]
    if write_to is not None:
        write_record(write_to, record(target, examination, rows))
    return rows, examination.probe


def record(target: Target, examination: Examination, rows: Sequence[Evaluation]) -> dict[str, Any]:
    """Everything that was found, as JSON values; the teacher's row comes first."""
    teacher = examination.bench.teacher
    if target.model is not None:
        # A later search may have found another layout than the one that was distilled.
        layout = read_json(target.model / "config.json")["layout"]
    else:
        assert target.best is not None
        layout = list(load_best(target.best).layout.candidates)
    return {
        "study": target.study.name,
        "teacher": {"source": teacher.source, "fingerprint": teacher.fingerprint},
        "layout": layout,
        "asked": examination.describe(),
        "models": [_row(row, rows[0], examination.length_probes) for row in rows],
        "provenance": provenance(),
    }


def _row(row: Evaluation, teacher: Evaluation, probes: Sequence[LengthProbe]) -> dict[str, Any]:
    its = {} if row is teacher else {figure.name: figure for figure in teacher.compared}

    def told(figure: Figure) -> dict[str, Any]:
        found: dict[str, Any] = {"name": figure.name, **_number(figure)}
        if figure.name in its:
            found["more_than_teacher"] = _number(figure.minus(its[figure.name]))
        return found

    kl = Figure.mean_of("KL to the teacher", row.figures.kl, higher_is_better=False)
    return {
        "name": row.name,
        "perplexity": row.perplexity,
        "text": [told(figure) for figure in (kl, *row.text)],
        "recall_over_length": [
            {"kind": probe.kind, "length": probe.length, "depth": probe.depth, **told(figure)}
            for probe, figure in zip(probes, row.lengths, strict=bool(row.lengths))
        ],
        "tasks": [
            {**told(figure), "higher_is_better": figure.higher_is_better} for figure in row.tasks
        ],
        "kl_blocks": list(row.figures.kl),
    }


def _number(figure: Figure) -> dict[str, Any]:
    return {"value": figure.value, "standard_error": figure.standard_error}


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record; what an earlier evaluation wrote there is set aside."""
    if path.exists():
        set_aside(path)
    write_json(path, content)


@torch.no_grad()
def continue_text(
    target: Target,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Each prompt with what the hybrid adds to it; all are decoded together.

    Args:
        target: A distilled run, an export, or a run that has been searched only; then the
            undistilled student speaks.
        prompts: Texts to continue, one at least.
        max_new_tokens: At most so many are added.
        temperature: Of the sampling; 0 takes the likeliest token.
        seed: Of the sampling.
    """
    bench = Workbench(target.study)
    if target.model is not None:
        model = load_student(target).to(pick_device(target.study.teacher.device))
        tokenizer = AutoTokenizer.from_pretrained(target.model)
    else:
        assert target.best is not None
        model = assemble(bench.teacher, load_best(target.best).layout, bench.bank)
        tokenizer = bench.teacher.tokenizer
    # An empty prompt starts where a document starts.
    rows = [tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id] for prompt in prompts]
    longest = max(map(len, rows))
    # Padding is hidden: any token will do.
    padding = tokenizer.eos_token_id or 0
    device = next(model.parameters()).device
    tokens = torch.tensor([[padding] * (longest - len(r)) + r for r in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    torch.manual_seed(seed)
    out = continue_tokens(
        model,
        tokens,
        mask=torch.arange(longest, device=device) >= longest - lengths[:, None],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        pad_token_id=padding,
    )
    return [
        tokenizer.decode(whole[longest - len(row) :], skip_special_tokens=True)
        for whole, row in zip(out, rows, strict=True)
    ]


def _models(target: Target, bench: Workbench) -> Iterator[tuple[str, Any]]:
    yield "teacher", bench.teacher.model
    model = None
    if target.model is not None:
        model = load_student(target, dtype=torch.float32).to(bench.teacher.device)
    if target.best is not None:
        # A later search may have found another layout than the one that was distilled.
        chosen = load_best(target.best).layout
        layout = chosen if model is None else Layout(tuple(model.config.layout))
        try:
            yield "undistilled student", assemble(bench.teacher, layout, bench.bank)
        except BankError as e:
            bench.reporter.say(f"the undistilled student is left out: {e}")
    if model is not None:
        yield ("export" if target.best is None else "distilled student"), model
