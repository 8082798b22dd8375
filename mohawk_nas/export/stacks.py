"""``mohawk-nas export --format layout``: a layout as other stacks name it, without weights.

Exporters that write an interval where the layout has none have mistyped whole models (llama.cpp
28208, Megatron-Bridge 4790). So every form is written that says each layer, and the interval only
where its rule gives back this very layout.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml

from mohawk_nas.errors import MohawkError, RunError
from mohawk_nas.evaluate import find_target
from mohawk_nas.export.hf import symbols_of
from mohawk_nas.files import atomic_write
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import MIXERS
from mohawk_nas.pipeline import load_best
from mohawk_nas.registry import load_plugin
from mohawk_nas.runs import set_aside
from mohawk_nas.teacher import Teacher, load_teacher

__all__ = ["export_layout", "interval_of", "is_parallel", "layout_names"]

ATTENTION_SYMBOL, MLP_SYMBOL = "*", "-"
"""Of Megatron-Core's hybrid patterns."""


def export_layout(source: Path, out: Path | None = None, *, force: bool = False) -> Path:
    """Write what :func:`layout_names` says of a study's layout.

    Args:
        source: ``best.yaml``, a run's folder or its ``distill`` folder.
        out: A YAML file; ``layout.yaml`` beside ``best.yaml`` if None.
        force: Set a file that is already there aside.

    Returns:
        The file.

    Raises:
        RunError: There is no run there, or the file is there already.
    """
    found = source if source.is_file() else find_target(source).best
    if found is None:
        raise RunError(f"{source}: must be a run's folder or its best.yaml, but is an export")
    best = load_best(found)
    for plugin in best.study.plugins:
        load_plugin(Path(plugin))
    out = best.path.with_name("layout.yaml") if out is None else out
    if out.is_dir():
        raise RunError(f"{out}: must be a file to write, but is a folder")
    if out.exists() and not force:
        raise RunError(f"{out}: is there already; use --force to set it aside, or --out")
    try:
        teacher = load_teacher(best.study.teacher, meta=True)
    except MohawkError as e:
        # A layout may travel without its teacher.
        teacher, reason = None, str(e)
    names = layout_names(best.layout, best.candidates, teacher)
    if teacher is None:
        names["notes"].append(f"the teacher's blocks were not looked at: {reason}")
    text = yaml.safe_dump(names, sort_keys=False, allow_unicode=True, width=100)
    if out.exists():
        set_aside(out)
    with atomic_write(out) as beside:
        beside.write_text(f"# Written by `mohawk-nas export --format layout`.\n{text}", "utf-8")
    return out


def layout_names(
    layout: Layout, candidates: dict[str, dict[str, Any]], teacher: Teacher | None
) -> dict[str, Any]:
    """A layout under the names of other stacks.

    Args:
        layout: Any.
        candidates: As ``best.yaml`` has them.
        teacher: May stand on the meta device. None leaves out what depends on its blocks.

    Returns:
        Section -> lists, numbers and strings; None, with a note, where a stack cannot say it.
    """
    notes: list[str] = []
    symbols = symbols_of(layout, candidates)
    letters, kinds = {}, {}
    for name, choices in candidates.items():
        elsewhere = MIXERS.get(choices["mixer"]).elsewhere
        letters[name] = elsewhere.get("pattern")
        kinds[name] = elsewhere.get("layer_type")
    parallel = None if teacher is None else is_parallel(teacher)
    layer_types = _layer_types(layout, kinds, teacher, notes)
    return {
        "num_layers": len(layout),
        "counted_from": 0,
        "layout": layout.strip(symbols),
        "symbols": {symbol: name for name, symbol in symbols.items()},
        "candidates": {name: candidates[name] for name in symbols if name != ATTENTION},
        "attention_layers": list(layout.attention_layers),
        "megatron_core": {
            "hybrid_layer_pattern": _pattern(layout, letters, parallel, notes),
        },
        "transformers": {
            "layer_types": layer_types,
            "full_attention_interval": None if layer_types is None else interval_of(layout),
            "attn_layer_indices": list(layout.attention_layers),
        },
        "mamba_in_llama": {
            "attn_layers": list(layout.attention_layers),
            "ssm_layers": list(layout.replaced_layers),
        },
        "mohawk": {
            "blocks": [
                {"name": f"Block{number}", "n_layers": len(list(run)), "mixer": name}
                for number, (name, run) in enumerate(groupby(layout.candidates), start=1)
            ]
        },
        "parallel_blocks": parallel,
        "notes": notes,
    }


def interval_of(layout: Layout) -> int | None:
    """``n`` if attention stands in layers n-1, 2n-1, 3n-1 ... and nowhere else, else None.

    So do transformers' Qwen3-Next and llama.cpp read ``full_attention_interval``.
    """
    kept = layout.attention_layers
    if not kept:
        return None
    first = kept[0] + 1
    return first if kept == tuple(range(first - 1, len(layout), first)) else None


def is_parallel(teacher: Teacher) -> bool | None:
    """Whether a block's MLP reads what attention reads, rather than what attention has added to.

    The architecture is run once without weights, and autograd tells what depends on what.

    Returns:
        None if it cannot be told, or blocks differ.
    """
    model = teacher.model
    attention: dict[int, torch.Tensor] = {}
    found: set[bool] = set()
    hooks = []

    def attended(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            mixed = output[0] if isinstance(output, tuple) else output
            # A leaf, so that what follows depends on it or does not.
            attention[layer] = mixed.detach().requires_grad_()
            return (attention[layer], *output[1:]) if isinstance(output, tuple) else mixed

        return hook

    def mlp_reads(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            read = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
            if layer not in attention:
                # It has run before attention has.
                found.add(True)
                return
            depends = read.requires_grad and (
                torch.autograd.grad(
                    read.sum(), attention[layer], allow_unused=True, retain_graph=True
                )[0]
                is not None
            )
            found.add(not depends)

        return hook

    for i, slot in enumerate(teacher.slots):
        block = model.get_submodule(slot.parent)
        mlps = [
            child
            for name, child in block.named_children()
            if name != slot.attribute and any(True for _ in child.children())
        ]
        hooks.append(slot.get(model).register_forward_hook(attended(i)))
        hooks += [mlp.register_forward_pre_hook(mlp_reads(i), with_kwargs=True) for mlp in mlps]
    try:
        tokens = torch.zeros(1, 4, dtype=torch.long, device=teacher.device)
        # A mask that is ready is taken as it is. To make one, transformers would look at values,
        # which there are none of on the meta device.
        mask = torch.zeros(1, 1, 4, 4, dtype=model.dtype, device=teacher.device)
        with torch.enable_grad():
            model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
    # Some families look at values elsewhere.
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return found.pop() if len(found) == 1 else None


def _pattern(
    layout: Layout, letters: dict[str, str | None], parallel: bool | None, notes: list[str]
) -> str | None:
    """One symbol for the mixer and one for the MLP of each block."""
    unnamed = sorted({n for n in layout.candidates if n != ATTENTION and letters.get(n) is None})
    if unnamed:
        notes.append(f"hybrid_layer_pattern: has no symbol for {', '.join(unnamed)}")
        return None
    if parallel:
        notes.append(
            "hybrid_layer_pattern: its layers stand one after another, but in this teacher "
            "attention and MLP read the same input side by side, which no pattern says"
        )
        return None
    if parallel is None:
        notes.append("hybrid_layer_pattern: holds if attention and MLP stand one after another")
    mixers = (ATTENTION_SYMBOL if n == ATTENTION else letters[n] for n in layout.candidates)
    return "".join(f"{mixer}{MLP_SYMBOL}" for mixer in mixers)


def _layer_types(
    layout: Layout, kinds: dict[str, str | None], teacher: Teacher | None, notes: list[str]
) -> list[str] | None:
    unnamed = sorted({n for n in layout.candidates if n != ATTENTION and kinds.get(n) is None})
    if unnamed:
        notes.append(f"layer_types: has no name for {', '.join(unnamed)}")
        return None
    types = []
    for layer, name in enumerate(layout.candidates):
        if name != ATTENTION:
            types.append(str(kinds[name]))
        elif teacher is not None and teacher.views[layer].sliding_window is not None:
            types.append("sliding_attention")
        else:
            types.append("full_attention")
    return types
