"""A study with everything it names loaded: teacher, space, budget, text, bank, scorer.

Commands and scripts that work with a study take what they need from here.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mohawk_nas import recall
from mohawk_nas.bank import Bank
from mohawk_nas.config import LogitsConfig, StudyConfig, short_recipe
from mohawk_nas.data import BlockOrder, TokenBlocks, find_separator, load_blocks
from mohawk_nas.distill.several import distil_layouts, students_at_once
from mohawk_nas.distill.trainer import num_steps
from mohawk_nas.errors import ConfigError, TeacherError
from mohawk_nas.export.hf import describe_candidates
from mohawk_nas.forecast import count_student_memory
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import evaluate_blocks
from mohawk_nas.registry import load_plugin
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.runs import DECODE_TIMES
from mohawk_nas.search.budget import Budget, DecodeTimes, make_budget
from mohawk_nas.search.decode import (
    Step,
    agreed_times,
    measure_layers,
    read_times,
    write_times,
)
from mohawk_nas.search.gates import learn_gates
from mohawk_nas.search.objectives import BankScorer, PerTrialScorer
from mohawk_nas.search.result import StudyResult
from mohawk_nas.search.rungs import Distiller
from mohawk_nas.search.scoring import Learnt, Score
from mohawk_nas.search.space import SearchSpace, load_space
from mohawk_nas.search.study import check_needs, load_result, trial_seed
from mohawk_nas.teacher import Teacher, check_tokenizer, load_teacher

__all__ = ["Workbench"]


@dataclass
class Workbench:
    """A study with everything it names loaded, each part when it is first used."""

    config: StudyConfig
    reporter: Reporter = SILENT

    def __post_init__(self) -> None:
        for plugin in self.config.plugins:
            load_plugin(Path(plugin))

    @cached_property
    def teacher(self) -> Teacher:
        self.reporter.say(f"loading the teacher from {self.config.teacher.source}")
        teacher = load_teacher(self.config.teacher, seed=self.config.seed)
        check_tokenizer(teacher.tokenizer, teacher)
        return teacher

    @cached_property
    def space(self) -> SearchSpace:
        return load_space(self.config.space, num_layers=self.teacher.num_layers)

    @cached_property
    def budget(self) -> Budget:
        return make_budget(
            self.config.budget,
            self.space,
            self.teacher.views,
            bytes_per_element=self.teacher.model.dtype.itemsize,
            decode=self.decode_times,
        )

    @cached_property
    def decode_times(self) -> DecodeTimes | None:
        """What was measured for this study, now or in an earlier run; None without such a limit."""
        if (step := self.decode_step) is None:
            return None
        record = self.config.run_dir / DECODE_TIMES
        asked = {
            "teacher": self.teacher.fingerprint,
            "type": str(self.teacher.model.dtype),
            "candidates": str(describe_candidates(self.space.candidates)),
            "pinned": {str(i): name for i, name in sorted(self.space.pinned.items())},
            **dataclasses.asdict(step),
        }
        if record.is_file() and (times := read_times(record, asked)) is not None:
            return times

        def measure() -> DecodeTimes:
            self.reporter.say(
                f"measuring a decode step at context {step.context:,} and batch {step.batch}"
            )
            return measure_layers(self.teacher, self.space, step)

        if (url := self.config.search.storage) is None:
            times = measure()
        else:
            # Other hosts may be at this study, and a layout must be on the budget of all or none.
            times = agreed_times(url, self.config.name, asked, measure)
        write_times(record, asked, times)
        return times

    @property
    def decode_step(self) -> Step | None:
        """What ``budget.decode`` limits; None without such a limit."""
        decode = self.config.budget.decode
        if decode.milliseconds is None:
            return None
        assert decode.context is not None
        return Step(context=decode.context, batch=decode.batch)

    @cached_property
    def blocks(self) -> dict[str, TokenBlocks]:
        """Every split, as long as the study needs it."""
        bank, data = self.config.bank, self.config.data
        needed = {
            "bank": max(bank.matrix.tokens, bank.hidden.tokens),
            "search": self.config.search.tokens,
            "validation": data.validation_tokens,
            "test": data.test_tokens,
        }
        return load_blocks(data, self.teacher.tokenizer, needed=needed)

    def training_text(self, tokens: int) -> TokenBlocks:
        """Text of the bank split for so many tokens of stage 3, a block at least."""
        needed = {"bank": max(tokens, self.config.data.block_size)}
        return load_blocks(self.config.data, self.teacher.tokenizer, needed=needed)["bank"]

    @property
    def separator(self) -> int:
        """The token in front of each document."""
        return find_separator(self.config.data, self.teacher.tokenizer)

    @cached_property
    def bank(self) -> Bank:
        return Bank(
            self.config.bank.path,
            teacher=self.teacher,
            candidates=self.space.candidates,
            recipe=self.config.bank,
            blocks=self.blocks["bank"],
            seed=self.config.seed,
        )

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What every score of this study depends on beyond its settings."""
        keys = [self.bank.key(*pair) for pair in self.space.replaceable]
        probe = self.probe("search") if "recall" in self.config.search.weights else None
        known = {"recall probe": f"{probe}, {probe.fingerprint}"} if probe else {}
        for tokens in self.config.search.rungs.tokens:
            if tokens > self.blocks["bank"].tokens.numel():
                name = f"text of the rung of {tokens:,} tokens"
                known[name] = self.training_text(tokens).fingerprint
        return known | {
            "teacher": self.teacher.fingerprint,
            "type of the teacher's weights": str(self.teacher.model.dtype),
            "text of the bank split": self.blocks["bank"].fingerprint,
            "text of the search split": self.blocks["search"].fingerprint,
            "text of the validation split": self.blocks["validation"].fingerprint,
            "mixers or their training": hashlib.sha256("".join(keys).encode()).hexdigest()[:32],
        }

    @cached_property
    def study_identity(self) -> dict[str, Any]:
        """:attr:`identity`, and what decides besides which layouts are on the budget."""
        if (times := self.decode_times) is None:
            return self.identity
        return self.identity | {"measurement of decode times": times.digest}

    def probe(self, split: recall.Split) -> recall.RecallProbe | None:
        """The split's recall probe, None if the teacher solves none."""
        if split not in self._probes:
            # As many questions to each block of a split on which layouts are compared.
            blocks = len(self.blocks[split]) if split in ("search", "validation") else 1
            sequences = -(-recall.NUM_SEQUENCES[split] // blocks) * blocks
            self._probes[split] = recall.make_probe(
                self.teacher, split, separator=self.separator, num_sequences=sequences
            )
        return self._probes[split]

    @cached_property
    def _probes(self) -> dict[recall.Split, recall.RecallProbe | None]:
        return {}

    @cached_property
    def study(self) -> StudyConfig:
        """The study as this teacher allows it: recall is left out if it solves no probe.

        Raises:
            TeacherError: Nothing would be left to score by, or one figure for a Pareto set.
            ConfigError: A baseline or the strategy cannot do without it.
        """
        search = self.config.search
        if "recall" not in search.weights:
            return self.config
        if (probe := self.probe("search")) is not None:
            self.reporter.say(
                f"recall is asked by {probe}; the teacher gets {probe.teacher_recall:.0%} right"
            )
            return self.config
        said = (
            f"{self.teacher.source} solves no recall probe (fewer than {recall.SOLVED:.0%} of "
            f"{recall.NUM_PAIRS[0]} pairs)"
        )
        rest = {name: weight for name, weight in search.objective.items() if name != "recall"}
        if not rest:
            raise TeacherError(f"search.objective: {said}; score by kl instead")
        pareto = [name for name in search.pareto if name != "recall"]
        if len(pareto) == 1:
            raise TeacherError(
                f"search.pareto: {said}, and {pareto[0]} alone makes no Pareto set; name another "
                "figure besides it"
            )
        allowed = dataclasses.replace(search, objective=rest, pareto=pareto)
        study = dataclasses.replace(self.config, search=allowed)
        if problems := check_needs(study):
            raise ConfigError([f"{problem}: {said}" for problem in problems])
        where = [key for key in ("objective", "pareto") if "recall" in getattr(search, key)]
        self.reporter.say(f"{said}: recall is left out of search.{' and search.'.join(where)}")
        return study

    def result(self) -> StudyResult:
        """The study as far as it has run.

        Raises:
            RunError: It has no trials yet.
        """
        return load_result(self.study, self.space, self.budget, run_dir=self.config.run_dir)

    def release(self) -> None:
        """Let go of what is large; it is loaded again if it is used again."""
        # The identity stays: it says which teacher this is.
        _ = self.study_identity, self.space, self.budget
        for name in ("teacher", "blocks", "bank"):
            self.__dict__.pop(name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def stage1_losses(self) -> dict[tuple[int, str], float]:
        """(layer, candidate) -> loss with which the stage 1 of its bank entry ended.

        Raises:
            BankError: The bank has no stage 1.
        """
        return {pair: self.bank.final_loss(*pair, "matrix") for pair in self.space.replaceable}

    def learn_gates(
        self,
        *,
        replacements: Mapping[int, str],
        pinned: Mapping[int, str],
        kept: int,
        tokens: int,
        batch_size: int,
        lr: float,
        recall_weight: float,
        seed: int,
    ) -> Learnt:
        """Learn what each free layer's attention is worth, on the text that trained the bank.

        Args:
            replacements: Free layer -> the candidate that may take its place.
            pinned: Layer -> the candidate it is pinned to, for those that are not attention.
            kept: Free layers that may keep attention.
            tokens: Of text, rounded up to whole steps; the split is gone through several times if
                it is shorter.
            batch_size: Blocks a step.
            lr: Of the gates.
            recall_weight: Of the cross-entropy of the bank split's recall probe, if the teacher
                solves it.
            seed: Of the start and of the text's order.

        Raises:
            TrainingError: The loss was not finite.
        """
        began, blocks = time.perf_counter(), self.blocks["bank"]
        order = BlockOrder(len(blocks), batch_size=batch_size, seed=seed)
        steps = -(-tokens // (batch_size * blocks.tokens.shape[1]))
        batches = [blocks.batch(order.indices(step)) for step in range(steps)]
        probe = self.probe("bank") if recall_weight > 0 else None
        worth = learn_gates(
            self.teacher,
            self.bank,
            replacements,
            batches,
            kept=kept,
            pinned=pinned,
            probe=probe,
            recall_weight=recall_weight,
            lr=lr,
            seed=seed,
            reporter=self.reporter,
        )
        # A step asks as many of the probe's sequences as it has blocks.
        asked = 0 if probe is None else steps * batch_size * probe.tokens.shape[1]
        return Learnt(
            worth=worth,
            tokens=sum(batch.numel() for batch in batches) + asked,
            seconds=time.perf_counter() - began,
        )

    def scorer(self) -> BankScorer:
        """Scores layouts as ``search.evaluation`` says."""
        search = self.study.search
        kind = PerTrialScorer if search.evaluation == "per_trial" else BankScorer
        scorer = kind(
            self.teacher,
            self.bank,
            self.blocks["search"],
            pairs=self.space.replaceable,
            weights=search.weights,
            probe=self.probe("search") if "recall" in search.weights else None,
            batch_size=search.batch_size,
        )
        if self.teacher.device.type == "cuda":
            kept = {name: size / 2**30 for name, size in scorer.kept_bytes.items()}
            self.reporter.say(
                f"scoring may keep {kept['teacher']:.1f} GiB of the teacher's outputs and "
                f"{kept['students']:.1f} GiB of hidden states"
            )
        return scorer

    def students_at_once(self, recipe: LogitsConfig) -> int:
        """How many students the device has room for side by side, by a recipe of stage 3."""
        return students_at_once(self.teacher.device, self.bytes_a_student(recipe))

    def bytes_a_student(self, recipe: LogitsConfig) -> int:
        """Memory that a student takes beside the teacher while it is trained by a recipe."""
        memory = count_student_memory(self.config, recipe, teacher=self.teacher)
        del memory["teacher's weights"]
        return sum(memory.values())

    def validation_figures(self, student: Any) -> dict[str, tuple[float, ...]]:
        """What rungs compare students by, in each block of the validation split.

        ``kl``, and ``recall``, the lost share of the teacher's, if it solves that split's probe.
        """
        blocks = self.blocks["validation"]
        figures = {"kl": evaluate_blocks(self.teacher, student, blocks).kl}
        if (probe := self.probe("validation")) is not None:
            right = probe.by_block(recall.answers(student, probe), len(blocks))
            figures["recall"] = tuple((1 - right / probe.teacher_recall).tolist())
        return figures

    def distiller(self, scorer: BankScorer) -> Distiller:
        """Distils layouts for the rungs; what the scorer keeps in memory is let go for them."""
        return _Distiller(self, scorer)


@dataclass(frozen=True)
class _Distiller:
    """Distils layouts for the study's rungs and measures them on the validation split."""

    bench: Workbench
    scorer: BankScorer

    @property
    def at_once(self) -> int:
        self.scorer.release()
        return students_at_once(self.bench.teacher.device, self._bytes_a_student)

    @cached_property
    def _bytes_a_student(self) -> int:
        # Asked for before each group of layouts, and counted in seconds where layers are many.
        return self.bench.bytes_a_student(short_recipe(self.bench.config, 0))

    def __call__(self, layouts: Sequence[Layout], tokens: int, seed: int) -> list[Score]:
        bench, first = self.bench, self.bench.config.seed
        self.scorer.release()
        config = short_recipe(bench.config, tokens)
        # A rung's text does not depend on which other rungs there are.
        train = bench.training_text(tokens)
        pairs = sorted({(i, layout[i]) for layout in layouts for i in layout.replaced_layers})
        keep = bench.config.search.evaluation == "bank"
        began = time.perf_counter()
        bench.bank.train(pairs, reporter=bench.reporter, keep=keep)
        # Again from the bank, not from the rung below: the schedule ends in a decay, so a student
        # of the rung below is not one that could have been met on the way to this one.
        figures = distil_layouts(
            bench.teacher,
            layouts,
            bench.bank,
            train=train,
            config=config,
            # An audit's seeds, which count from 0, must be others.
            seed=trial_seed(first, seed, "run-off") if seed else first,
            measure=bench.validation_figures,
            reporter=bench.reporter,
        )
        seconds = (time.perf_counter() - began) / len(layouts)
        block_size = bench.config.data.block_size
        steps = num_steps(config, block_size) // config.accumulate
        trained = steps * config.accumulate * config.batch_size * block_size
        return [Score(per_block=found, tokens=trained, seconds=seconds) for found in figures]
