"""A study's configuration: YAML and command-line overrides to frozen dataclasses.

Everything a run depends on is a field here. :func:`load_study` reports every problem it finds at
once, each with its dotted path; past this module only the dataclasses travel.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mohawk_nas.errors import ConfigError, did_you_mean
from mohawk_nas.layout import ATTENTION, num_attention

__all__ = [
    "BankConfig",
    "BudgetConfig",
    "CacheBudgetConfig",
    "DataConfig",
    "DecodeBudgetConfig",
    "DistillConfig",
    "GuideConfig",
    "LogitsConfig",
    "MatrixConfig",
    "RungsConfig",
    "SearchConfig",
    "SourceConfig",
    "SpaceConfig",
    "StageConfig",
    "StudyConfig",
    "TeacherConfig",
    "dump",
    "flatten",
    "load_study",
    "plain",
    "read_options",
    "recipe_of",
    "short_recipe",
    "study_from_dict",
    "token_count",
]

T = TypeVar("T")

OBJECTIVES = ("stage2_local", "stage2_cascade", "kl", "recall")
COSTS = ("attention_layers", "cache")
FIGURES = (*OBJECTIVES, *COSTS)
"""What a layout can be scored by; costs follow from the layout alone."""

_OTHERWISE = {
    "budget.attention_layers": ", or budget.cache, or budget.decode",
    "data.source": ", or data.mixture",
}
"""What may be given instead of a setting."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which pretrained model, and how it is held in memory."""

    source: str = MISSING
    """Local folder, GGUF file, hub name, or ``package:NAME/FILE.gguf`` for a file that an installed
    Python package carries. Relative paths start at the study's file."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, where it is not with the model."""
    architecture: str | None = None
    """A ``config.json`` that describes the model: for planning before the weights are here, and
    for ``random_weights``."""
    random_weights: bool = False
    """Build the architecture with random weights: for timing, never for results."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Changes to the architecture, e.g. fewer layers; with ``random_weights`` only."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights in memory; auto is float32 on a CPU and bfloat16 on a GPU."""
    device: str = "auto"
    """auto takes the first GPU if there is one."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """The teacher's attention implementation."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One part of a mixture of texts."""

    source: list[str] = field(default_factory=list)
    """As in :class:`DataConfig`."""
    weight: float = 1.0
    """Share of the blocks that come from here, beside the other parts' weights."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    text_field: str = "text"
    """Field of a record that holds its text."""
    document_field: str | None = None
    """As in :class:`DataConfig`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Text, and how it is cut into blocks of tokens.

    Documents are divided over the splits by a hash of their name, so no document is in two.
    """

    source: list[str] = field(default_factory=list)
    """Files or globs (text, jsonl, parquet; .xz, .gz and .zst are unpacked), or one hub data set.
    Relative paths start at the study's file. Either this or ``mixture`` must be given."""
    mixture: list[SourceConfig] = field(default_factory=list)
    """Several texts, each with a ``source``, a ``weight`` and fields of its own. Every split is
    mixed by the weights, block by block."""
    subset: str | None = None
    """Configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    text_field: str = "text"
    """Field of a record that holds its text."""
    document_field: str | None = None
    """Field that names the document a record belongs to, where a record may be a part of one;
    None takes each record for a document."""
    separator: str | None = None
    """Token put in front of each document; None takes the tokenizer's end-of-text token."""
    block_size: int = 256
    """Tokens a block. Attention and state both run across document borders inside a block."""
    validation_tokens: int = 8192
    """Watched while distilling; layouts are compared on them at rungs."""
    test_tokens: int = 8192
    """Read by ``evaluate`` and ``audit``; nothing is chosen by them."""
    cache: str = "runs/cache"
    """Folder of tokenised text; relative to the working folder."""
    streaming: bool = False
    """Full distillation reads its text as it goes and keeps none of it: for text that fits neither
    memory nor disk. Everything else is still read once and cached."""
    shuffle_blocks: int = 1024
    """Blocks of a stream that are shuffled among each other; 1 keeps their order."""
    workers: int | None = None
    """Processes that tokenise a stream ahead of training; null takes what the CPUs allow, 0 lets
    the training process do it. The text does not depend on it."""

    @property
    def names(self) -> list[str]:
        """Every file, glob or data set, whichever part names it."""
        return [name for _, part in self.parts for name in part.source]

    @property
    def parts(self) -> list[tuple[float, DataConfig]]:
        """Weight and settings of each text, as if it were the only one."""
        if not self.mixture:
            return [(1.0, self)]
        return [
            (
                part.weight,
                dataclasses.replace(
                    self,
                    mixture=[],
                    source=part.source,
                    subset=part.subset,
                    split=part.split,
                    text_field=part.text_field,
                    document_field=part.document_field,
                ),
            )
            for part in self.mixture
        ]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Optimisation of one stage: AdamW, with a warm-up, a constant and a decaying part."""

    tokens: int = 0
    """0 skips the stage."""
    batch_size: int = 8
    """Blocks a step."""
    lr: float = 1e-3
    warmup: float = 0.1
    """Share of the steps in which the rate rises."""
    decay: float = 0.2
    """Share of the steps, at the end, in which it falls."""
    min_lr: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    """Largest norm of one candidate's gradient."""


@dataclass(frozen=True, kw_only=True)
class MatrixConfig(StageConfig):
    """Stage 1."""

    squared: bool = False
    """Square the distance of a head's matrices; the paper takes the distance itself."""


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """Abbreviated stages 1 and 2 that train every candidate of every layer once."""

    path: str = "runs/bank"
    """Folder of trained candidates, shared by studies; relative to the working folder."""
    matrix: MatrixConfig = field(default_factory=MatrixConfig)
    hidden: StageConfig = field(default_factory=lambda: StageConfig(tokens=262144))
    checkpoint_steps: int = 50
    """Steps after which unfinished candidates are saved."""


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """Which mixers each layer may take."""

    name: str | None = None
    """A search space that comes with the package, or a YAML file with these fields."""
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> ``{mixer: NAME, option: value}``. ``attention`` is always there."""
    pinned: dict[int, str] = field(default_factory=dict)
    """Layer -> the candidate it must take."""


@dataclass(frozen=True, kw_only=True)
class CacheBudgetConfig:
    """Memory that a student may keep between tokens: KV caches and states of all layers."""

    mib: float | None = None
    """MiB, at most; null sets no limit."""
    context: int | None = None
    """Tokens a sequence for which it is counted; must be given with ``mib``."""
    batch: int = 1
    """Sequences."""


@dataclass(frozen=True, kw_only=True)
class DecodeBudgetConfig:
    """Time that a student may take for one more token of every sequence of the batch.

    Each kind of layer, and the rest of the model, is measured on this machine when the search
    begins; a layout's time is their sum. The best layout is measured as a whole in the end.
    """

    milliseconds: float | None = None
    """Of the whole model, at most; null sets no limit."""
    context: int | None = None
    """Tokens already in each sequence's cache; must be given with ``milliseconds``."""
    batch: int = 1
    """Sequences."""


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What every layout must meet: every limit that is given; one must be."""

    attention_layers: Any | None = None
    """Layers that keep attention, exactly; ``{at_most: K}`` also allows fewer."""
    cache: CacheBudgetConfig = field(default_factory=CacheBudgetConfig)
    """Memory of caches and states."""
    decode: DecodeBudgetConfig = field(default_factory=DecodeBudgetConfig)
    """Time of a decode step."""


@dataclass(frozen=True, kw_only=True)
class RungsConfig:
    """Short distillations of the layouts that score best, which then decide who is best.

    Each rung starts again from the bank, with the recipe of ``distill.logits`` but for what is
    given here, and is measured on the validation split. Audits distil by the same recipe.
    """

    tokens: list[int] = field(default_factory=list)
    """Stage-3 tokens of a layout at each rung, rising, such as [1000000, 4000000]. Empty distils
    nothing: the undistilled score decides."""
    pruner: Any = "halving"
    """Who climbs to the next rung, a name or ``{name: NAME, option: value}``. ``halving``: the best
    one in ``factor``, ``most`` of them at most if it is given. ``wilcoxon``: those that a
    signed-rank test over blocks cannot tell from the best at ``p``, ``most`` of them at most.
    Of each baseline the best layout climbs to the first rung as well."""
    seeds: int = 3
    """Of stage 3, at most, for layouts that the last rung leaves tied with the best: they are
    distilled again until one is told from the rest, each time half as many as climbed at most, or
    two. With 1 a single distillation decides."""
    batch_size: int | None = None
    """Blocks a batch; null takes that of ``distill.logits``. A full distillation often takes steps
    of so much text that a rung would be over after a few of them."""
    accumulate: int | None = None
    """Batches a step; null likewise."""
    lr: float | None = None
    """Peak learning rate; null likewise."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How layouts are chosen and scored."""

    trials: int = 100
    """Distinct layouts to score. A space that is no larger is scored whole."""
    strategy: Any = "swaps"
    """A strategy's name, or ``{name: NAME, option: value}``; so is each of ``baselines``."""
    objective: dict[str, float] = field(default_factory=lambda: {"kl": 1.0, "recall": 0.2})
    """Objective -> weight. A single name stands for itself alone. By default losing all that the
    teacher recalls counts as much as 0.2 nats a token; where it recalls nothing, KL alone does."""
    pareto: list[str] = field(default_factory=list)
    """Two figures or more, such as ``[kl, recall, cache]``: the result is then also the set of
    layouts that no other scored layout beats in all of them, and samplers look for that set.
    ``objective`` still decides which layout is the best. Besides objectives these are costs:
    ``attention_layers``, and ``cache``, the bytes of keys, values and states that one sequence of
    ``data.block_size`` tokens leaves."""
    evaluation: Literal["bank", "per_trial"] = "bank"
    """Assemble trials from the bank, or train each trial's layers anew (the slow reference)."""
    baselines: list[Any] = field(
        default_factory=lambda: [
            "uniform",
            "first",
            "last",
            "stage2_rank",
            "swap_one",
            "add_one_in",
            "greedy",
        ]
    )
    """Selectors and layouts that are scored in the same study, before the strategy begins."""
    tokens: int = 16384
    """Tokens of the search split on which a layout is scored."""
    batch_size: int | None = None
    """Blocks scored at once; null takes what suits the device. Scores depend on it by rounding
    alone."""
    rungs: RungsConfig = field(default_factory=RungsConfig)
    """Distilled scores, after the undistilled ones."""
    storage: str | None = None
    """``journal:PATH``, a file that any number of processes and hosts share, or a database's URL
    as Optuna takes it; relative to the working folder. None is a file in the run's folder: SQLite
    for one worker, a journal for several."""

    @property
    def weights(self) -> dict[str, float]:
        """Every figure that a layout is scored by -> its weight in the objective, 0 for those that
        only ``pareto`` names."""
        return {**dict.fromkeys(self.pareto, 0.0), **self.objective}


_SPEED_ONLY = {"identity": False}
_IF_CHANGED = {"identity": "if changed"}
"""Of fields that :func:`recipe_of` leaves out, always or where they stand at their default."""


@dataclass(frozen=True, kw_only=True)
class LogitsConfig(StageConfig):
    """Stage 3: end-to-end distillation of the assembled student."""

    loss: Literal["kl", "reverse_kl", "soft_ce"] = "kl"
    """Forward KL divergence, or the paper's cross-entropy on the teacher's probabilities; the two
    differ by the teacher's entropy and have the same gradient. Reverse KL divergence takes the
    student's probabilities as weights: it would rather miss what the teacher says than say what the
    teacher does not."""
    temperature: float = 1.0
    hard_label_weight: float = 0.0
    """Share of the loss that is cross-entropy on the text itself, 0 to 1."""
    trainable: Literal["mixers", "all_but_mlp", "all"] = "all"
    """What is trained."""
    schedule: Literal["wsd", "cosine"] = field(default="wsd", metadata=_IF_CHANGED)
    """How the rate goes on after the warm-up: constant until it falls in a line (``decay``), or
    along half a cosine from the first step to the last, whatever ``decay`` says."""
    accumulate: int = 1
    """Batches whose gradients are added before the weights move."""
    validate_steps: int = 50
    """Optimizer steps between two looks at the validation split."""
    patience: int = field(default=0, metadata=_IF_CHANGED)
    """Looks at the validation split in a row, at a constant rate, that may fail to lower its KL by
    ``min_gain``; then the rate falls at once, over a share of ``decay`` of the steps that the run
    then has, and the run ends early. 0 spends all ``tokens``."""
    min_gain: float = field(default=0.01, metadata=_IF_CHANGED)
    """Share by which the validation KL must fall below where it last did so, with ``patience``."""
    checkpoint_steps: int = 50
    """Optimizer steps between two checkpoints."""
    max_bad_steps: int = field(default=10, metadata=_SPEED_ONLY)
    """Steps whose loss or gradient was not finite before the run stops; none of them moves a
    weight."""
    parallel: Literal["auto", "ddp", "fsdp"] = field(default="auto", metadata=_SPEED_ONLY)
    """How several processes share the work: each holds the whole student (DDP), or a part of it
    and, where that is too large, of the teacher (FSDP2). auto takes DDP where the student with its
    optimizer fills at most half of a GPU."""
    activation_checkpointing: bool = field(default=False, metadata=_SPEED_ONLY)
    """Keep of each layer its input alone and run the layer again in backward: less memory, and a
    third more of the student's operations."""


@dataclass(frozen=True, kw_only=True)
class GuideConfig(TeacherConfig):
    """A teacher for stage 3 alone; the fields are those of ``teacher``."""

    source: str = ""
    """As ``teacher.source``; empty for the study's own teacher."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Full distillation of the chosen layout."""

    start: Literal["bank", "scratch"] = "bank"
    """Continue the bank's candidates, or train them anew with the budgets below. A study may also
    write ``from``, which Python cannot."""
    matrix: MatrixConfig = field(default_factory=MatrixConfig)
    """Stage 1, when starting from scratch."""
    hidden: StageConfig = field(default_factory=StageConfig)
    """Stage 2; its rate is warmed up again."""
    logits: LogitsConfig = field(default_factory=lambda: LogitsConfig(tokens=98304, lr=1e-4))
    """Stage 3."""
    teacher: GuideConfig = field(default_factory=GuideConfig)
    """Another, usually larger, model of the same vocabulary that teaches in stage 3."""
    tensorboard: bool = False
    """Also log to TensorBoard, in ``distill/tensorboard``."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """One study: a teacher, a space, a budget and how the space is searched."""

    name: str = MISSING
    seed: int = 0
    output: str = "runs"
    """Folder in which the run gets a folder of its own; relative to the working folder."""
    plugins: list[str] = field(default_factory=list)
    """Python files that register mixers or strategies; relative to the study's file."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    space: SpaceConfig = field(default_factory=SpaceConfig)
    layout: str | None = None
    """A layout of one's own, which ``distill`` takes without a search: attention layers such as
    ``[4, 10, 16, 22]`` (``[]`` keeps none), or a strip such as ``M A M M``. The budget then follows
    from it."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of this study's results."""
        return Path(self.output) / self.name


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study.

    Args:
        path: YAML file.
        overrides: Dotted assignments such as ``search.trials=50``, later ones win. Relative paths
            in them start at the working folder.

    Raises:
        ConfigError: The file is missing or not YAML, or anything in it is wrong; all problems in
            one message.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConfigError("no such file; there must be a study in YAML", source=str(path)) from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot be read: {e}", source=str(path)) from e
    except yaml.YAMLError as e:
        raise ConfigError(f"is not YAML: {' '.join(str(e).split())}", source=str(path)) from e
    if not isinstance(raw, dict):
        raise ConfigError("a study must be a mapping of settings", source=str(path))
    return study_from_dict(raw, overrides=overrides, base=path.parent, source=str(path))


def study_from_dict(
    raw: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    base: Path | None = None,
    source: str | None = None,
) -> StudyConfig:
    """The study that a mapping describes.

    Args:
        raw: Settings as they stand in a YAML file.
        overrides: As in :func:`load_study`.
        base: Folder at which relative paths of inputs start; they become absolute.
        source: Name of the origin, for messages.

    Raises:
        ConfigError: Every problem found.
    """
    problems: list[str] = []
    settings = _normalise(raw)
    if base is not None:
        _locate(settings, base)
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = key.strip().split(".")
        if not equals or not all(keys):
            problems.append(f"override {override!r} must look like key.name=value")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        _assign(settings, keys, _located(keys, value))
    settings = _normalise(settings)

    config = writable(StudyConfig)
    known = _known_paths(StudyConfig)
    for dotted, value in _leaves(settings, StudyConfig):
        if problem := _misplaced(dotted, value, known):
            problems.append(problem)
            continue
        try:
            if dotted == "data.mixture" and isinstance(value, list):
                value = _parts(value)
            OmegaConf.update(config, dotted, value, merge=False)
        except ConfigError as e:
            problems += e.problems
        except (OmegaConfBaseException, ValueError) as e:
            inner = getattr(e, "full_key", None) or dotted
            where = inner if inner.startswith(dotted) else f"{dotted}.{inner}"
            problems.append(f"{where}: {_unfit(known[dotted], value, e)}")
    missing = sorted(OmegaConf.missing_keys(config))
    for name in missing:
        # A stand-in of the right type, so that the checks below can still run.
        OmegaConf.update(config, name, "-")
    study = OmegaConf.to_object(config)
    assert isinstance(study, StudyConfig)
    if not (study.data.source or study.data.mixture) and not _says(settings, "data", "source"):
        missing = sorted([*missing, "data.source"])
    if study.layout is not None and study.budget == BudgetConfig():
        kept = num_attention(study.layout)
        study = dataclasses.replace(study, budget=BudgetConfig(attention_layers=kept))
    if study.budget == BudgetConfig() and not any(p.startswith("budget.") for p in problems):
        # Each of its limits may be left out, but not all.
        missing.insert(0, "budget.attention_layers")
    # Nothing is reported twice: what is wrong in itself is neither missing nor checked again.
    told = [f"{name}: must be given{_OTHERWISE.get(name, '')}" for name in missing]
    for found in (told, _check(study)):
        broken = [problem.split(":")[0] for problem in problems]
        if any(name.startswith("data.mixture[") for name in broken):
            # There is a text, if it can be read.
            broken.append("data.source")
        problems += [p for p in found if not any(_overlap(p.split(":")[0], b) for b in broken)]
    if problems:
        raise ConfigError(problems, source=source)
    return study


def writable(cls: type) -> DictConfig:
    """The OmegaConf schema of a frozen dataclass, open for assignment.

    Merging would do for single values, but it would add a mapping to its default's entries where
    the user means to replace them.
    """
    config: DictConfig = OmegaConf.structured(cls)
    nodes: list[DictConfig] = [config]
    while nodes:
        node = nodes.pop()
        OmegaConf.set_readonly(node, None)
        for key in node:
            if not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
                nodes.append(node[key])
    return config


def read_options(cls: type[T], options: Mapping[str, Any], *, where: str, owner: str) -> T:
    """An object of a configuration dataclass, from what the user chose for some of its fields.

    Args:
        cls: A dataclass whose fields all have defaults; raises ValueError for what cannot be.
        options: Field -> value.
        where: Dotted path for messages.
        owner: What has these options, for messages.

    Raises:
        ConfigError: Every unknown option and impossible value.
    """
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    problems = []
    try:
        merged = writable(cls)
    except OmegaConfBaseException as e:
        raise ConfigError(
            f"{where}: the fields of {cls.__name__} must be of types that YAML knows, but: "
            f"{str(e).splitlines()[0]}"
        ) from e
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(str(name), known) or f" Options of {owner}: {known}."
            problems.append(f"{where}.{name}: unknown option.{hint}")
            continue
        try:
            OmegaConf.update(merged, name, value)
        except OmegaConfBaseException as e:
            problems.append(f"{where}.{name}: {str(e).splitlines()[0]}")
    if problems:
        raise ConfigError(problems)
    try:
        built = OmegaConf.to_object(merged)
    except (ValueError, AssertionError, OmegaConfBaseException) as e:
        reason = (str(e).splitlines() or [f"its {cls.__name__} is refused by an assertion"])[0]
        raise ConfigError(f"{where}: {reason}") from e
    assert isinstance(built, cls)
    return built


def dump(config: Any) -> str:
    """YAML text of a configuration dataclass, which :func:`study_from_dict` reads back."""
    text: str = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=100)
    return text


def plain(value: Any) -> Any:
    """Dictionaries, lists and scalars of a configuration dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def recipe_of(config: LogitsConfig) -> dict[str, Any]:
    """What distilled weights depend on beyond rounding, as plain values.

    A choice that came later is left out where it stands at its default, so that what was recorded
    before it is still the same recipe.
    """
    found = plain(config)
    for f in dataclasses.fields(config):
        kept = f.metadata.get("identity", True)
        if kept is False or (kept == "if changed" and found[f.name] == f.default):
            del found[f.name]
    return dict(found)


def short_recipe(study: StudyConfig, tokens: int) -> LogitsConfig:
    """Stage 3 of rungs and audits."""
    full, rungs = study.distill.logits, study.search.rungs

    def first(given: T | None, otherwise: T) -> T:
        return otherwise if given is None else given

    return dataclasses.replace(
        full,
        tokens=tokens,
        # Nobody looks at the validation split on the way.
        patience=0,
        min_gain=LogitsConfig.min_gain,
        batch_size=first(rungs.batch_size, full.batch_size),
        accumulate=first(rungs.accumulate, full.accumulate),
        lr=first(rungs.lr, full.lr),
    )


def flatten(config: StudyConfig) -> dict[str, Any]:
    """Dotted path -> plain value of every setting."""
    return dict(_leaves(plain(config), StudyConfig))


def token_count(text: str) -> int:
    """A number of tokens as people write it: ``8388608``, ``500K``, ``1.5M``, ``2B``.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB])|\d+", text)
    if not found:
        raise ValueError(f"must be a number of tokens such as 8388608 or 8M, but got {text}")
    if not found[2]:
        return int(text)
    return round(float(found[1]) * {"K": 1e3, "M": 1e6, "B": 1e9}[found[2]])


def _copied(value: Any, key: Any = "") -> Any:
    """A copy in which numbers of tokens may have been written as ``8M``."""
    if isinstance(value, Mapping):
        return {name: _copied(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [_copied(part, key) for part in value]
    if not (isinstance(value, str) and str(key).endswith("tokens")):
        return value
    try:
        return token_count(value)
    except ValueError:
        # Told with the other values that do not fit.
        return value


def _normalise(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which short forms have become the one long form."""
    settings: dict[str, Any] = _copied(raw)
    search, space, data = (settings.get(name) for name in ("search", "space", "data"))
    if isinstance(search, dict):
        if isinstance(search.get("objective"), str):
            search["objective"] = {search["objective"]: 1.0}
        if "strategy" in search:
            search["strategy"] = _choice(search["strategy"])
        if isinstance(search.get("baselines"), list):
            search["baselines"] = [_choice(entry) for entry in search["baselines"]]
        rungs = search.get("rungs")
        if isinstance(rungs, dict) and "pruner" in rungs:
            rungs["pruner"] = _choice(rungs["pruner"])
    distill = settings.get("distill")
    if isinstance(distill, dict) and "from" in distill:
        distill["start"] = distill.pop("from")
    if isinstance(space, str):
        settings["space"] = {"name": space}
    elif isinstance(space, dict) and isinstance(space.get("pinned"), dict):
        # Keys of an override are text.
        space["pinned"] = {
            int(key) if isinstance(key, str) and key.isdecimal() else key: name
            for key, name in space["pinned"].items()
        }
    mixture = data.get("mixture") if isinstance(data, dict) else None
    for part in (data, *(mixture if isinstance(mixture, list) else ())):
        if isinstance(part, dict) and isinstance(part.get("source"), str):
            part["source"] = [part["source"]]
    layout = settings.get("layout")
    if type(layout) is int or (
        isinstance(layout, list) and all(type(layer) is int for layer in layout)
    ):
        settings["layout"] = ",".join(map(str, layout if isinstance(layout, list) else [layout]))
    return settings


def _choice(entry: object) -> object:
    # A strategy without options is its name, as it has always stood in studies and their storages;
    # a layout of one attention layer is a number to YAML.
    if isinstance(entry, Mapping) and set(entry) == {"name"}:
        return entry["name"]
    return str(entry) if type(entry) is int else entry


def _locate(settings: dict[str, Any], base: Path) -> None:
    """Make relative paths of inputs start at a folder, in place."""

    def located(text: object) -> object:
        if not isinstance(text, str) or text.startswith("package:") or Path(text).is_absolute():
            return text
        path = base / text
        # A hub name looks like a relative path; it is one if something is there, or could be.
        looks_local = bool(re.match(r"\.{1,2}/", text) or re.search(r"[*?\[]|\.[A-Za-z]\w*$", text))
        return str(path.resolve()) if path.exists() or looks_local else text

    teacher, data, space = (settings.get(name) for name in ("teacher", "data", "space"))
    distill = settings.get("distill")
    guide = distill.get("teacher") if isinstance(distill, dict) else None
    for model in (teacher, guide):
        for key in ("source", "tokenizer", "architecture"):
            # Nothing is located at "", which names no model.
            if isinstance(model, dict) and model.get(key):
                model[key] = located(model[key])
    mixture = data.get("mixture") if isinstance(data, dict) else None
    for part in (data, *(mixture if isinstance(mixture, list) else ())):
        if isinstance(part, dict) and isinstance(part.get("source"), list):
            part["source"] = [located(item) for item in part["source"]]
    # A space that comes with the package has no ending, whatever lies beside the study.
    if isinstance(space, dict) and str(space.get("name")).endswith((".yaml", ".yml")):
        space["name"] = located(space["name"])
    plugins = settings.get("plugins")
    if isinstance(plugins, list):
        settings["plugins"] = [
            str((base / item).resolve()) if isinstance(item, str) else item for item in plugins
        ]


def _assign(settings: dict[str, Any], keys: Sequence[str], value: object) -> None:
    for key in keys[:-1]:
        inner = settings.get(key)
        if not isinstance(inner, dict):
            # A name stands for a mapping that says nothing else, so more may be said.
            named = key in ("space", "strategy", "pruner") and isinstance(inner, str)
            inner = settings[key] = {"name": inner} if named else {}
        settings = inner
    settings[keys[-1]] = value


def _says(settings: Mapping[str, Any], section: str, name: str) -> bool:
    inner = settings.get(section)
    return isinstance(inner, Mapping) and name in inner


def _parts(value: Sequence[object]) -> list[SourceConfig]:
    """The parts of a mixture.

    Raises:
        ConfigError: Every problem of any of them.
    """
    parts, problems = [], []
    for i, item in enumerate(value):
        where = f"data.mixture[{i}]"
        if isinstance(item, SourceConfig):
            parts.append(item)
        elif not isinstance(item, Mapping):
            problems.append(f"{where}: must be a mapping with `source` and `weight`, got {item!r}")
        else:
            try:
                parts.append(read_options(SourceConfig, item, where=where, owner="a part"))
            except ConfigError as e:
                problems += e.problems
    if problems:
        raise ConfigError(problems)
    return parts


def _overlap(one: str, other: str) -> bool:
    """Whether two dotted paths are the same, or one lies within the other."""
    short, long = sorted((one, other), key=len)
    return long == short or long.startswith((f"{short}.", f"{short}["))


def _located(keys: Sequence[str], value: object) -> object:
    """An override's value, with paths of inputs that start at the working folder."""
    alone: dict[str, Any] = {}
    _assign(alone, keys, value)
    if keys[0] == "data":
        alone = _normalise(alone)
    _locate(alone, Path.cwd())
    found: Any = alone
    for key in keys:
        found = found[key]
    return found


def _known_paths(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> type of every setting, and -> None of every section."""
    paths: dict[str, Any] = {}
    hints = _hints(cls)
    for f, inner in _fields(cls):
        paths[f"{prefix}{f}"] = None if inner else hints[f]
        if inner:
            paths |= _known_paths(inner, f"{prefix}{f}.")
    return paths


def _misplaced(dotted: str, value: object, known: Mapping[str, Any]) -> str | None:
    """What is wrong with a setting whatever its type is."""
    if dotted not in known:
        parent, _, name = dotted.rpartition(".")
        siblings = [path.rpartition(".")[2] for path in known if path.rpartition(".")[0] == parent]
        hint = did_you_mean(name, siblings) or f" Known here: {', '.join(siblings)}."
        return f"{dotted}: unknown key.{hint}"
    if known[dotted] is None:
        return f"{dotted}: must be a section of settings, but got {value!r}"
    if value is None and type(None) not in typing.get_args(known[dotted]):
        return f"{dotted}: must have a value, but is empty"
    if value == MISSING:
        return f"{dotted}: must be given"
    if any("${" in text for text in _texts(value)):
        return f"{dotted}: values stand for themselves, so '${{' must not be in one: {value!r}"
    return None


def _unfit(kind: Any, value: object, error: Exception) -> str:
    """Why a value is not of its setting's type."""
    origin, length = typing.get_origin(kind) or kind, len(typing.get_args(kind))
    if origin is tuple and (not isinstance(value, list) or len(value) != length):
        return f"must be a list of {length}, but got {value!r}"
    if origin is list and not isinstance(value, list):
        return f"must be a list, but got {value!r}"
    if origin is dict and not isinstance(value, dict):
        return f"must be a mapping, but got {value!r}"
    return str(error).splitlines()[0].strip()


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _fields(cls: type) -> Iterator[tuple[str, type | None]]:
    hints = _hints(cls)
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        yield f.name, kind if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _leaves(settings: Mapping[str, Any], cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    # Mappings are walked where the schema has a section, and taken whole where it has a value.
    sections = {name: inner for name, inner in _fields(cls) if inner}
    for key, value in settings.items():
        if key not in sections:
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _leaves(value, sections[key], f"{prefix}{key}.")
        # A section whose lines are all commented out is none.
        elif value is not None:
            yield f"{prefix}{key}", value


def _check(study: StudyConfig) -> list[str]:
    """What the types cannot say. Paths stand first, so that a problem is never reported twice."""
    problems: list[str] = []

    def need(ok: bool, text: str) -> None:
        if not ok:
            problems.append(text)

    need(
        bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", study.name)),
        f"name: must be letters, digits, '.', '_' and '-', but got {study.name!r}",
    )
    need(study.seed >= 0, f"seed: must be at least 0, but got {study.seed}")
    data, search, distill = study.data, study.search, study.distill
    need(
        bool(data.source) or bool(data.mixture),
        "data.source: must name at least one file or data set",
    )
    need(
        not (data.source and data.mixture),
        "data.mixture: data.source is given as well; give one of the two",
    )
    for i, part in enumerate(data.mixture):
        where = f"data.mixture[{i}]"
        need(bool(part.source), f"{where}.source: must name at least one file or data set")
        need(
            0 < part.weight < math.inf,
            f"{where}.weight: must be above 0, but got {part.weight}",
        )
    need(
        data.shuffle_blocks >= 1,
        f"data.shuffle_blocks: must be at least 1, but got {data.shuffle_blocks}",
    )
    need(
        data.workers is None or data.workers >= 0,
        f"data.workers: must be at least 0, but got {data.workers}",
    )
    need(data.block_size >= 8, f"data.block_size: must be at least 8, but got {data.block_size}")
    for name, tokens in (
        ("data.validation_tokens", data.validation_tokens),
        ("data.test_tokens", data.test_tokens),
        ("search.tokens", search.tokens),
    ):
        need(
            tokens >= data.block_size,
            f"{name}: must hold at least one block of {data.block_size} tokens, but got {tokens}",
        )
    problems += _check_budget(study.budget)
    need(search.trials >= 1, f"search.trials: must be at least 1, but got {search.trials}")
    need(
        search.batch_size is None or search.batch_size >= 1,
        f"search.batch_size: must be at least 1, got {search.batch_size}",
    )
    need(
        search.storage is None
        or re.match(r"[a-z][a-z0-9+]*://|journal:.", search.storage) is not None,
        "search.storage: must be a database's URL such as sqlite:///study.db, or a file that "
        f"several processes share, such as journal:study.journal, but got {search.storage!r}",
    )
    entries = {f"search.baselines[{i}]": entry for i, entry in enumerate(search.baselines)}
    for name, entry in {"search.strategy": search.strategy, **entries}.items():
        chosen = entry.get("name") if isinstance(entry, Mapping) else entry
        need(
            isinstance(chosen, str),
            f"{name}: must be a name or a mapping like {{name: beam, width: 8}}, but got {entry!r}",
        )
    need(bool(search.objective), "search.objective: must name at least one objective")
    for name, weight in search.objective.items():
        need(
            name in OBJECTIVES,
            f"search.objective.{name}: unknown objective; available: {', '.join(OBJECTIVES)}."
            f"{did_you_mean(name, OBJECTIVES)}",
        )
        need(
            0 < weight < math.inf,
            f"search.objective.{name}: its weight must be above 0, but got {weight}",
        )
    for i, name in enumerate(search.pareto):
        need(
            name in FIGURES,
            f"search.pareto[{i}]: unknown figure {name!r}; available: {', '.join(FIGURES)}."
            f"{did_you_mean(name, FIGURES)}",
        )
        need(
            name not in search.pareto[:i],
            f"search.pareto[{i}]: each figure must be named once, but {name!r} is named twice",
        )
    need(
        len(search.pareto) != 1,
        "search.pareto: must name at least two figures, since one alone is an objective, but got "
        f"{search.pareto}",
    )
    need(
        not study.teacher.overrides or study.teacher.random_weights,
        "teacher.overrides: changes the architecture, so it needs teacher.random_weights: true",
    )
    guide = distill.teacher
    need(
        not guide.overrides or guide.random_weights,
        "distill.teacher.overrides: changes the architecture, so it needs "
        "distill.teacher.random_weights: true",
    )
    need(
        bool(guide.source) or guide == GuideConfig(),
        "distill.teacher.source: must be given, since distill.teacher says how it is held",
    )
    need(ATTENTION not in study.space.candidates, f"space.candidates.{ATTENTION}: is always there")
    stages = {
        "bank.matrix": study.bank.matrix,
        "bank.hidden": study.bank.hidden,
        "distill.matrix": distill.matrix,
        "distill.hidden": distill.hidden,
        "distill.logits": distill.logits,
    }
    for name, stage in stages.items():
        need(stage.tokens >= 0, f"{name}.tokens: must be at least 0, but got {stage.tokens}")
        need(
            stage.batch_size >= 1, f"{name}.batch_size: must be at least 1, got {stage.batch_size}"
        )
        need(0 < stage.lr < math.inf, f"{name}.lr: must be above 0, but got {stage.lr}")
        need(
            0 <= stage.min_lr <= stage.lr or not stage.lr > 0,
            f"{name}.min_lr: must lie within 0 and {name}.lr, but got {stage.min_lr}",
        )
        need(
            all(0 <= beta < 1 for beta in stage.betas),
            f"{name}.betas: must lie within 0 and 1, 1 excluded, but got {list(stage.betas)}",
        )
        need(
            0 <= stage.weight_decay < math.inf,
            f"{name}.weight_decay: must be at least 0, but got {stage.weight_decay}",
        )
        need(
            stage.warmup >= 0 and stage.decay >= 0 and stage.warmup + stage.decay <= 1,
            f"{name}.warmup: warmup + decay must lie within 0 and 1, but are "
            f"{stage.warmup} + {stage.decay}",
        )
        need(stage.grad_clip > 0, f"{name}.grad_clip: must be above 0, but got {stage.grad_clip}")
        per_step = stage.batch_size * data.block_size
        factors = "batch_size * data.block_size"
        if isinstance(stage, LogitsConfig):
            per_step, factors = per_step * stage.accumulate, f"{factors} * accumulate"
        need(
            stage.tokens == 0 or stage.tokens >= per_step,
            f"{name}.tokens: must be 0 or at least one step of {per_step} tokens ({factors}), but "
            f"got {stage.tokens}",
        )
    need(
        study.bank.matrix.tokens + study.bank.hidden.tokens > 0,
        "bank.hidden.tokens: stage 1 or stage 2 of the bank must have tokens",
    )
    need(
        distill.start == "bank" or distill.matrix.tokens + distill.hidden.tokens > 0,
        "distill.hidden.tokens: stage 1 or stage 2 must have tokens where distill.start is "
        "scratch, since stage 3 alone does not train new mixers; or start from the bank",
    )
    need(
        study.bank.checkpoint_steps >= 1,
        f"bank.checkpoint_steps: must be at least 1, but got {study.bank.checkpoint_steps}",
    )
    logits, short = distill.logits, short_recipe(study, 0)
    rungs = search.rungs.tokens
    given = {"batch_size": search.rungs.batch_size, "accumulate": search.rungs.accumulate}
    for name, count in given.items():
        need(
            count is None or count >= 1, f"search.rungs.{name}: must be at least 1, but got {count}"
        )
    rate = search.rungs.lr
    need(rate is None or 0 < rate < math.inf, f"search.rungs.lr: must be above 0, but got {rate}")
    need(
        rate is None or not rate > 0 or rate >= logits.min_lr,
        f"search.rungs.lr: must be at least distill.logits.min_lr ({logits.min_lr}), to which it "
        f"falls, but got {rate}",
    )
    need(
        search.rungs.seeds >= 1,
        f"search.rungs.seeds: must be at least 1, but got {search.rungs.seeds}",
    )
    per_step = short.batch_size * short.accumulate * data.block_size
    need(
        all(tokens >= per_step for tokens in rungs),
        f"search.rungs.tokens: each must be at least one step of {per_step} tokens (batch_size * "
        f"accumulate * data.block_size, as search.rungs or distill.logits say), but got {rungs}",
    )
    need(
        rungs == sorted(set(rungs)),
        f"search.rungs.tokens: must rise from rung to rung, but got {rungs}",
    )
    need(
        0 <= logits.hard_label_weight <= 1,
        "distill.logits.hard_label_weight: must lie within 0 and 1, but got "
        f"{logits.hard_label_weight}",
    )
    need(
        0 < logits.temperature < math.inf,
        f"distill.logits.temperature: must be above 0, but got {logits.temperature}",
    )
    for name, count in (
        ("accumulate", logits.accumulate),
        ("validate_steps", logits.validate_steps),
        ("checkpoint_steps", logits.checkpoint_steps),
    ):
        need(count >= 1, f"distill.logits.{name}: must be at least 1, but got {count}")
    need(
        logits.patience >= 0,
        f"distill.logits.patience: must be at least 0, but got {logits.patience}",
    )
    need(
        logits.patience == 0 or logits.schedule == "wsd",
        "distill.logits.patience: waits while the rate is constant, so it needs "
        f"distill.logits.schedule: wsd, but got {logits.schedule}",
    )
    need(
        logits.patience == 0 or (logits.decay < 1 and logits.min_lr < logits.lr),
        "distill.logits.patience: waits until the rate may fall, so it needs distill.logits.decay "
        f"below 1 and distill.logits.min_lr below lr, but got {logits.decay} and {logits.min_lr}",
    )
    need(
        0 <= logits.min_gain < 1,
        f"distill.logits.min_gain: must be at least 0 and below 1, but got {logits.min_gain}",
    )
    need(
        logits.max_bad_steps >= 0,
        f"distill.logits.max_bad_steps: must be at least 0, but got {logits.max_bad_steps}",
    )
    return problems


def _check_budget(budget: BudgetConfig) -> list[str]:
    problems = []
    name, layers = "budget.attention_layers", budget.attention_layers
    if isinstance(layers, Mapping) and set(layers) == {"at_most"}:
        name, layers = f"{name}.at_most", layers["at_most"]
    if layers is not None and type(layers) is not int:
        problems.append(
            f"{name}: must be a number, or {{at_most: NUMBER}} where fewer will do as well, but "
            f"got {layers!r}"
        )
    elif layers is not None and layers < 0:
        problems.append(f"{name}: must be at least 0, but got {layers}")
    for section, limit, most in (
        ("cache", "mib", budget.cache.mib),
        ("decode", "milliseconds", budget.decode.milliseconds),
    ):
        chosen: CacheBudgetConfig | DecodeBudgetConfig = getattr(budget, section)
        where, context, batch = f"budget.{section}", chosen.context, chosen.batch
        if most is None and chosen != type(chosen)():
            problems.append(f"{where}.{limit}: must be given, since {where} says what it is for")
        if most is not None and not 0 < most < math.inf:
            problems.append(f"{where}.{limit}: must be above 0, but got {most}")
        if most is not None and context is None:
            problems.append(f"{where}.context: must be given with {where}.{limit}")
        if context is not None and context < 1:
            problems.append(f"{where}.context: must be at least 1, but got {context}")
        if batch < 1:
            problems.append(f"{where}.batch: must be at least 1, but got {batch}")
    return problems
