"""``mohawk-nas export``: a distilled student as a checked Hugging Face folder with a model card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mohawk_nas.config import StudyConfig, plain
from mohawk_nas.errors import ExportError, RunError
from mohawk_nas.evaluate import CARD, find_target, load_student
from mohawk_nas.export.card import find_licence, model_card, read_evaluation
from mohawk_nas.export.hf import save_hybrid
from mohawk_nas.export.standalone import standalone_files, write_standalone
from mohawk_nas.export.verify import verify_export
from mohawk_nas.files import atomic_folder, read_json, write_json
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import MIXERS
from mohawk_nas.pipeline import load_best
from mohawk_nas.registry import helpers, is_plugin, load_plugin
from mohawk_nas.runs import set_aside

__all__ = ["export_folder"]

PLUGINS = "plugins"
"""Folder in an export that holds the files of a user's own mixers."""


def export_folder(
    source: Path,
    out: Path | None = None,
    *,
    dtype: str = "float32",
    standalone: bool = False,
    shard_size: str | None = None,
    force: bool = False,
) -> tuple[Path, dict[str, float]]:
    """Export a distilled run and check the result in a fresh process.

    Args:
        source: The run's folder, or its ``distill`` folder.
        out: Where to; ``export`` in the run's folder if None.
        dtype: Of the weights on disk.
        standalone: Put the model's code into the folder, so that it loads without this package.
        shard_size: Largest file of weights, e.g. ``5GB``; transformers' own if None.
        force: Set a folder that is already there aside.

    Returns:
        The folder, and the differences that the check found.

    Raises:
        RunError: Nothing is distilled there, or the folder holds something already.
        ExportError: The export does not do what the student does, or a mixer needs more than a
            folder can hold.
    """
    target = find_target(source)
    if target.model is None or target.best is None:
        raise RunError(f"{source}: must hold a finished distillation; run `distill` first")
    out = target.best.parent / "export" if out is None else out
    in_the_way = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if in_the_way and not force:
        raise RunError(f"{out}: is there already; use --force to set it aside, or --out")
    for plugin in target.study.plugins:
        load_plugin(Path(plugin))
    model = load_student(target, dtype=torch.float32)
    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(target.model)
    layout = Layout(tuple(config.layout))
    result = read_json(target.model.parent / "result.json")
    best = load_best(target.best)
    card = {
        "layout": list(layout.candidates),
        "attention_layers": list(layout.attention_layers),
        "teacher": {
            "source": _names_only(best.study.teacher.source),
            "fingerprint": result["teacher"],
        },
        "scores": result["scores"],
        "distillation": _without_folders(result),
    }
    _check_helpers(choices["mixer"] for choices in config.candidates.values())
    if standalone:
        # Refused before many gigabytes are written.
        standalone_files(choices["mixer"] for choices in config.candidates.values())
    licence = find_licence(best.study.teacher.source)
    page = model_card(
        layout,
        config.candidates,
        best.study,
        result,
        licence,
        evaluation=read_evaluation(target.best.parent, layout),
        fingerprint=result["teacher"],
        dtype=dtype,
        standalone=standalone,
    )
    with atomic_folder(out) as beside:
        save_hybrid(
            model,
            beside,
            layout=layout,
            candidates=config.candidates,
            tokenizer=tokenizer,
            dtype=getattr(torch, dtype),
            shard_size=shard_size,
        )
        if standalone:
            write_standalone(beside)
        licence.copy(beside)
        plugins = _copy_plugins(target.study.plugins, beside)
        write_json(beside / CARD, card | {"study": _portable(best.study, plugins)})
        (beside / "README.md").write_text(page, encoding="utf-8")
        if dtype != "float32":
            # The check compares what was written, so the weights are rounded the same way; what is
            # computed from the configuration (rotary frequencies) is not.
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(getattr(torch, dtype)))
        try:
            copies = [str(beside / plugin) for plugin in plugins]
            found = verify_export(beside, model, plugins=copies, alone=standalone)
        except ExportError as e:
            raise ExportError(f"{out}: is not written, since {e}") from e
        if in_the_way:
            set_aside(out)
    return out, found


def _check_helpers(mixers: Iterable[str]) -> None:
    """Raise ExportError if a plugin's file needs another one, which an export does not hold."""
    for name in mixers:
        item = MIXERS.get(name)
        if is_plugin(item) and (needed := helpers(item)):
            raise ExportError(
                f"{MIXERS.origin(name)}: a mixer under `plugins` must be one file to be exported, "
                f"but this one imports {', '.join(map(str, needed))}; put them into it, "
                "or install them as a package that names the mixer in an entry point"
            )


def _copy_plugins(plugins: Sequence[str], folder: Path) -> list[str]:
    """Put a study's plugins into an export, for our own commands; their names relative to it."""
    names: list[str] = []
    for plugin in map(Path, plugins):
        name, number = f"{PLUGINS}/{plugin.name}", 2
        while name in names:
            name, number = f"{PLUGINS}/{plugin.stem}_{number}.py", number + 1
        (folder / PLUGINS).mkdir(exist_ok=True)
        shutil.copyfile(plugin, folder / name)
        names.append(name)
    return names


def _portable(study: StudyConfig, plugins: Sequence[str]) -> dict[str, Any]:
    """The study with no more of where things lie than an export is evaluated by: its text, the
    teacher, and the cache."""
    found: dict[str, Any] = plain(study)
    found["plugins"] = list(plugins)
    found["output"] = Path(study.output).name
    found["bank"]["path"] = Path(study.bank.path).name
    guide = found["distill"]["teacher"]
    guide["source"] = _names_only(guide["source"])
    return found


def _without_folders(result: Mapping[str, Any]) -> dict[str, Any]:
    made = result["provenance"]
    return {**result, "provenance": {**made, "command": _names_only(made["command"])}}


def _names_only(text: str) -> str:
    """A text with the last name of each absolute path in it."""
    return re.sub(r"(?<![\w.~/])/[^\s,'\"\]]+", lambda path: Path(path[0]).name, text)
