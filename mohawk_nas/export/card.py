"""The model card of an export: what it is, what made it, how good it is, under which licence."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mohawk_nas.config import StudyConfig
from mohawk_nas.errors import TeacherError
from mohawk_nas.export.hf import symbols_of
from mohawk_nas.files import read_json
from mohawk_nas.layout import Layout
from mohawk_nas.teacher import gguf_path

__all__ = ["Licence", "find_licence", "model_card", "read_evaluation"]

_TEXTS = ("license*", "licence*", "copying*", "notice*", "use_policy*")
_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, kw_only=True, slots=True)
class Licence:
    """What the teacher's own files say of its licence."""

    metadata: dict[str, str] = field(default_factory=dict)
    """``license``, ``license_name`` and ``license_link`` as model cards have them; may be empty."""
    texts: tuple[Path, ...] = ()
    """Its files of text."""

    def copy(self, folder: Path) -> None:
        """Put the texts into a folder, under their own names."""
        for text in self.texts:
            shutil.copyfile(text, folder / text.name)


def find_licence(source: str) -> Licence:
    """Look for a teacher's licence where the teacher is.

    Read are the front matter of its ``README.md``, its ``config.json``, the metadata of a GGUF
    file, and files named like a licence. Of a teacher on the hub, those that are there.

    Args:
        source: As a study names it in ``teacher.source``.
    """
    try:
        gguf = gguf_path(source)
    # An export does not need its teacher, which may be gone.
    except TeacherError:
        return Licence()
    if gguf is None and not Path(source).is_dir():
        if not _on_hub(source):
            return Licence()
        card = _from_hub(source, "README.md")
        if card is None:
            return Licence()
        found = [_from_hub(source, name) for name in ("LICENSE", "NOTICE")]
        return Licence(
            metadata=_front_matter(card), texts=tuple(text for text in found if text is not None)
        )
    folder = Path(source) if gguf is None else gguf.parent
    metadata = _front_matter(folder / "README.md") or _of_config(folder / "config.json")
    if gguf is not None:
        metadata = _of_gguf(gguf) or metadata
    texts = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(Path(path.name.lower()).match(pattern) for pattern in _TEXTS)
    ]
    return Licence(metadata=metadata, texts=tuple(texts))


def model_card(
    layout: Layout,
    candidates: Mapping[str, dict[str, Any]],
    study: StudyConfig,
    result: Mapping[str, Any],
    licence: Licence,
    *,
    evaluation: Mapping[str, Any] | None = None,
    fingerprint: str,
    dtype: str,
    standalone: bool,
) -> str:
    """``README.md`` of an export, as the Hugging Face hub reads it.

    Args:
        layout: The student's.
        candidates: As the export's configuration has them.
        study: What it comes from.
        result: ``result.json`` of the distillation.
        licence: The teacher's.
        evaluation: What ``evaluate`` has written of this run, if it has.
        fingerprint: The teacher's.
        dtype: Of the weights on disk.
        standalone: Whether the folder holds its own code.
    """
    teacher = study.teacher.source
    guide = study.distill.teacher.source
    origin = _name(teacher)
    symbols = symbols_of(layout, candidates)
    legend = ", ".join(f"{symbol} = {name}" for name, symbol in symbols.items())
    kept = ", ".join(map(str, layout.attention_layers)) or "none"
    matter = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        # Only a name on the hub is a link; another one could be that of another model there.
        **({"base_model": teacher} if _on_hub(teacher) else {}),
        **licence.metadata,
        "tags": [
            "mohawk-nas",
            "hybrid",
            "distillation",
            *sorted({choices["mixer"] for choices in candidates.values()}),
            *(["custom_code"] if standalone else []),
        ],
    }
    versions = result["provenance"]["versions"]
    rows = {
        "layout": f"`{layout.strip(symbols)}` ({legend})",
        "layers that keep attention (counted from 0)": kept,
        "teacher": f"{origin} (fingerprint `{fingerprint}`)",
        **({"teacher of stage 3": _name(guide)} if guide else {}),
        "text": ", ".join(map(_name, study.data.names)),
        **_token_rows(study, result),
        "weights on disk": dtype,
        "made with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    parts = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---",
        f"# Hybrid of {origin}",
        f"A pretrained Transformer in which {len(layout.replaced_layers)} of {len(layout)} layers "
        "have another token mixer than attention, chosen and distilled with mohawk-nas (MOHAWK, "
        "arXiv 2408.10189).",
        _table(rows),
        "## Scores",
        _table(_score_rows(result, to=_name(guide) if guide else "the teacher")),
        *([] if evaluation is None else [_evaluation_table(evaluation)]),
        "## Mixers",
        "\n".join(_mixer_lines(candidates)) or "None: every layer keeps attention.",
        "## Loading it",
        _loading(standalone),
        "## Licence",
        _licence_text(licence, origin, standalone, taught_by=_name(guide)),
    ]
    return "\n\n".join(parts) + "\n"


def _token_rows(study: StudyConfig, result: Mapping[str, Any]) -> dict[str, str]:
    stages = {"matrix": "stage 1", "hidden": "stage 2", "logits": "stage 3"}
    rows = {}
    if study.distill.start == "bank":
        tokens = {"matrix": study.bank.matrix.tokens, "hidden": study.bank.hidden.tokens}
        rows = {f"tokens of {stages[s]}, in the bank": f"{n:,}" for s, n in tokens.items() if n}
    elif study.distill.matrix.tokens:
        rows["tokens of stage 1"] = f"{study.distill.matrix.tokens:,}"
    for stage, tokens in result["tokens"].items():
        if tokens:
            rows[f"tokens of {stages.get(stage, stage)}"] = f"{tokens:,}"
    return rows


def _score_rows(result: Mapping[str, Any], *, to: str) -> dict[str, str]:
    kl, scores = result["validation_kl"], result["scores"]
    rows = {
        f"validation KL to {to}, undistilled": f"{kl['before']:.4f} nats a token",
        f"validation KL to {to}, distilled": f"{kl['after']:.4f} nats a token",
    }
    for name, value in scores.get("objectives", {}).items():
        rows[f"search objective `{name}`, undistilled (lower is better)"] = f"{value:.4f}"
    if "layouts_scored" in scores:
        of = f"{scores['layouts_scored']:,} of {scores['layouts_possible']:,} possible ones"
        rows["layouts scored by the search"] = of
    return rows


def read_evaluation(run: Path, layout: Layout) -> dict[str, Any] | None:
    """What ``evaluate`` has written of a run, if it is of what is distilled there now."""
    path = run / "evaluation.json"
    if not path.is_file() or path.stat().st_mtime < (run / "distill/result.json").stat().st_mtime:
        return None
    found: dict[str, Any] = read_json(path)
    return found if found.get("layout") == list(layout.candidates) else None


def _evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """One row a model, the teacher's first; figures that some lack are left blank there."""
    models = {row["name"]: _figures(row) for row in evaluation["models"]}
    columns = list(dict.fromkeys(name for figures in models.values() for name in figures))
    lines = [f"| test split | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in models.items():
        cells = (f"{figures[c]:.4f}" if c in figures else "" for c in columns)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    figures = {"perplexity": row["perplexity"]}
    for figure in (*row.get("text", ()), *row.get("tasks", ())):
        figures[figure["name"]] = figure["value"]
    return figures


def _mixer_lines(candidates: Mapping[str, dict[str, Any]]) -> Iterable[str]:
    for name, choices in sorted(candidates.items()):
        options = ", ".join(f"{o}: {v}" for o, v in choices.items() if o != "mixer")
        yield f"- `{name}`: {choices['mixer']} ({options})"


def _loading(standalone: bool) -> str:
    alone = (
        "It needs torch and transformers; the code is in this folder:\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER", trust_remote_code=True)\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER", trust_remote_code=True)\n'
        "```\n\n"
        "Where mohawk-nas is installed and `mohawk_nas.export` has been imported, its code is run "
        "in place of the folder's. Faster kernels that a mixer knows of are used where they can be "
        "imported; none is needed."
    )
    installed = (
        "It needs mohawk-nas:\n\n"
        "```python\n"
        "import mohawk_nas.export  # registers the model type\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")\n'
        "```"
    )
    return alone if standalone else installed


def _licence_text(licence: Licence, origin: str, standalone: bool, *, taught_by: str) -> str:
    said = licence.metadata.get("license_name") or licence.metadata.get("license")
    texts = ", ".join(f"[{text.name}]({text.name})" for text in licence.texts)
    applies = "The teacher's licence applies to these weights as it does to the teacher's"
    if said and texts:
        text = f"{applies}: {said}, text in {texts}."
    elif said or texts:
        text = f"{applies}: {said or texts}."
    else:
        text = (
            f"{applies}. It was not found in the files of {origin} (front matter of README.md, "
            "config.json, metadata of the weights, files named LICENSE or NOTICE): look it up "
            "before you hand this folder on."
        )
    if taught_by:
        text += (
            f" Stage 3 was taught by {taught_by}: look up what its licence says of models that "
            "learn from it."
        )
    if standalone:
        text += " The Python files are mohawk-nas's (Apache-2.0), except those named `plugin_*`."
    return text


def _table(rows: Mapping[str, str]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]
    return "\n".join(lines)


def _on_hub(source: str) -> bool:
    here = Path(source).exists() or Path(source).is_absolute()
    return not here and not source.startswith("package:") and not source.endswith(".gguf")


def _name(source: str) -> str:
    # A path says where a file lay on one machine; its name is what another reader can use.
    return Path(source).name if Path(source).is_absolute() else source


def _from_hub(source: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    # Where there is no network, asking the hub takes its time.
    for options in ({"local_files_only": True}, {}):
        # Not there, no network, gated: there is nothing to read.
        with suppress(OSError, ValueError):
            if found := cached_file(source, name, **options):
                return Path(found)
    return None


def _front_matter(card: Path) -> dict[str, str]:
    try:
        text = card.read_text(encoding="utf-8")
    except OSError:
        return {}
    _, first, rest = text.partition("---\n")
    if not first or not text.startswith("---\n"):
        return {}
    try:
        matter = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return _chosen(matter if isinstance(matter, dict) else {})


def _of_config(path: Path) -> dict[str, str]:
    # JSON is YAML.
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return _chosen(config if isinstance(config, dict) else {})


def _of_gguf(path: Path) -> dict[str, str]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    names = {"license": "general.license"}
    names |= {key: f"general.{key.replace('_', '.')}" for key in _KEYS[1:]}
    return _chosen({key: fields[name].contents() for key, name in names.items() if name in fields})


def _chosen(found: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(found.get("license"), str):
        return {}
    return {key: str(found[key]) for key in _KEYS if found.get(key)}
