"""``mohawk-nas export``: a distilled student as a checked Hugging Face folder with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from mohawk_nas.config import plain
from mohawk_nas.errors import ExportError, RunError
from mohawk_nas.evaluate import CARD, find_target
from mohawk_nas.export.hf import load_hybrid, save_hybrid
from mohawk_nas.export.verify import verify_export
from mohawk_nas.files import atomic_folder, read_json, write_json
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.pipeline import load_best
from mohawk_nas.registry import load_plugin
from mohawk_nas.runs import set_aside

__all__ = ["export_folder"]


def export_folder(
    source: Path, out: Path | None = None, *, dtype: str = "float32", force: bool = False
) -> tuple[Path, dict[str, float]]:
    """Export a distilled run and check the result in a fresh process.

    Args:
        source: The run's folder, or its ``distill`` folder.
        out: Where to; ``export`` in the run's folder if None.
        dtype: Of the weights on disk.
        force: Set a folder that is already there aside.

    Returns:
        The folder, and the differences that the check found.

    Raises:
        RunError: Nothing is distilled there, or the folder holds something already.
        ExportError: The export does not do what the student does.
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
    model = load_hybrid(target.model, dtype=torch.float32)
    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(target.model)
    layout = Layout(tuple(config.layout))
    result = read_json(target.model.parent / "result.json")
    best = load_best(target.best)
    card = {
        "layout": list(layout.candidates),
        "attention_layers": list(layout.attention_layers),
        "teacher": {
            "source": best.study.teacher.source,
            "fingerprint": best.teacher_fingerprint,
        },
        "scores": result["scores"],
        "distillation": result,
        "study": plain(best.study),
    }
    page = _model_card(layout, config, best.study.teacher.source, best.study.data.names, result)
    with atomic_folder(out) as beside:
        save_hybrid(
            model,
            beside,
            layout=layout,
            candidates=config.candidates,
            tokenizer=tokenizer,
            dtype=getattr(torch, dtype),
        )
        write_json(beside / CARD, card)
        (beside / "README.md").write_text(page, encoding="utf-8")
        if dtype != "float32":
            # The check compares what was written, so the weights are rounded the same way; what is
            # computed from the configuration (rotary frequencies) is not.
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.to(getattr(torch, dtype)))
        try:
            found = verify_export(beside, model, plugins=target.study.plugins)
        except ExportError as e:
            raise ExportError(f"{out}: is not written, since {e}") from e
        if in_the_way:
            set_aside(out)
    return out, found


def _model_card(
    layout: Layout, config: Any, teacher: str, sources: list[str], result: dict[str, Any]
) -> str:
    kept = ", ".join(map(str, layout.attention_layers)) or "none"
    kl = result["validation_kl"]
    names = sorted(set(layout.candidates) - {ATTENTION})
    mixers = "\n".join(f"- `{n}`: `{json.dumps(config.candidates[n])}`" for n in names)
    # A path says where a file lay on one machine; its name is what another reader can use.
    origin = Path(teacher).name if Path(teacher).is_absolute() else teacher
    text = ", ".join(Path(s).name if Path(s).is_absolute() else s for s in sources)
    return f"""---
library_name: transformers
tags: [mohawk-nas, hybrid, distillation]
base_model: {origin}
---

# Hybrid of {origin}

A pretrained Transformer in which {len(layout.replaced_layers)} of {len(layout)} layers have another
token mixer than attention, chosen and distilled with mohawk-nas (MOHAWK, arXiv 2408.10189).

| | |
|---|---|
| layers that keep attention (counted from 0) | {kept} |
| teacher | {origin} |
| text | {text} |
| tokens of stage 3 | {result["tokens"]["logits"]:,} |
| validation KL to the teacher, undistilled | {kl["before"]:.4f} nats a token |
| validation KL to the teacher, distilled | {kl["after"]:.4f} nats a token |

Mixers:

{mixers or "- none"}

```python
import mohawk_nas.export  # registers the model type
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

The teacher's licence applies to these weights as it does to the teacher's.
"""
