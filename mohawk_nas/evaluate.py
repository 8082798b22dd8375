"""How good a hybrid is, beside its teacher, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mohawk_nas.config import StudyConfig, study_from_dict
from mohawk_nas.decoding import continue_tokens
from mohawk_nas.errors import BankError, RunError
from mohawk_nas.export.hf import load_hybrid
from mohawk_nas.files import DamagedFile, read_json
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import BlockFigures, evaluate_blocks
from mohawk_nas.pipeline import load_best
from mohawk_nas.recall import RecallProbe, recall
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.student import assemble
from mohawk_nas.teacher import pick_device
from mohawk_nas.workbench import Workbench

__all__ = ["Evaluation", "Target", "continue_text", "evaluate", "find_target"]

CARD = "mohawk_nas.json"
"""File in an exported folder that says which study it came from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One model's figures on the test split."""

    name: str
    figures: BlockFigures
    recall: float | None
    """Share of right answers to the test split's probe, 0 to 1; None if the teacher solves none."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.figures.mean_cross_entropy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a path given to ``evaluate`` or ``generate`` stands for."""

    study: StudyConfig
    model: Path | None
    """Folder of a hybrid, if there is one."""
    best: Path | None
    """``best.yaml`` of the run, if this is one."""


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
        return study_from_dict(read_json(card)["study"], source=str(card))
    except DamagedFile as e:
        raise RunError(f"{e}; export it again") from e
    except (KeyError, TypeError) as e:
        raise RunError(
            f"{card}: must be what `export` wrote, but is not ({type(e).__name__}: {e})"
        ) from e


def evaluate(
    target: Target, *, reporter: Reporter = SILENT
) -> tuple[list[Evaluation], RecallProbe | None]:
    """Figures of the teacher, of the undistilled student where its bank is there, and of the model.

    Returns:
        The figures, and what recall was asked by.

    Raises:
        DataError: The study's text cannot be read.
    """
    bench = Workbench(target.study, reporter)
    probe = bench.probe("test")
    rows = []
    for name, model in _models(target, bench):
        with reporter.stage(f"evaluating the {name}", total=None, unit="block"):
            figures = evaluate_blocks(
                bench.teacher,
                model,
                bench.blocks["test"],
                batch_size=target.study.search.batch_size,
            )
            share = None if probe is None else recall(model, probe)
        rows.append(Evaluation(name=name, figures=figures, recall=share))
    return rows, probe


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
        model = load_hybrid(target.model).to(pick_device(target.study.teacher.device))
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
        model = load_hybrid(target.model, dtype=torch.float32).to(bench.teacher.device)
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
