"""The hybrid as transformers sees it: a model type of its own around a stock causal LM.

The configuration holds the teacher's own configuration, the layout, and each candidate's options;
the model builds the stock causal LM from it and hangs the mixers into its attention slots. So every
family that can be a teacher can be exported, with its own modelling code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from mohawk_nas.errors import ExportError, MohawkError, RunError
from mohawk_nas.export.configuration import HybridConfig
from mohawk_nas.layout import ATTENTION, Layout, assign_symbols
from mohawk_nas.mixer import MIXERS, MixerConfig, build_mixer, mixer_config
from mohawk_nas.registry import load_plugin
from mohawk_nas.student import install_mixers
from mohawk_nas.teacher import cache_name, find_attention

__all__ = [
    "HybridConfig",
    "HybridForCausalLM",
    "describe_candidates",
    "load_hybrid",
    "save_hybrid",
    "symbols_of",
]


class HybridForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal LM in which some layers' attention is another mixer."""

    config_class = HybridConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        base = config.base_config()
        # Some families have no scaled_dot_product_attention, which is what loading asks for first.
        stock = AutoModelForCausalLM._model_mapping[type(base)]
        wanted = config._attn_implementation
        base._attn_implementation = (
            "eager" if wanted == "sdpa" and not stock._supports_sdpa else wanted
        )
        self.causal_lm = AutoModelForCausalLM.from_config(base)
        slots = find_attention(self.causal_lm)
        layout = Layout(tuple(config.layout))
        configs = {
            name: mixer_config(choices, where=f"candidates.{name}")
            for name, choices in config.candidates.items()
        }
        layout.check([ATTENTION, *configs], num_layers=len(slots))
        mixers = {i: build_mixer(configs[layout[i]], slots[i].view) for i in layout.replaced_layers}
        install_mixers(self.causal_lm, mixers, slots)
        self.post_init()

    @property
    def base_model(self) -> Any:
        """The stock model without its head, mixers in place."""
        return self.causal_lm.base_model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        kwargs[cache_name(self)] = past_key_values if cache is None else cache
        return self.causal_lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def get_input_embeddings(self) -> Any:
        return self.causal_lm.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.causal_lm.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.causal_lm.get_output_embeddings()

    def set_output_embeddings(self, value: Any) -> None:
        self.causal_lm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        resized = super().resize_token_embeddings(*args, **kwargs)
        # Losses go by the stock model's number, and loading by the one that is written down.
        teacher = self.config.teacher
        teacher.get("text_config", teacher)["vocab_size"] = resized.num_embeddings
        self.causal_lm.config.get_text_config().vocab_size = resized.num_embeddings
        return resized

    def _init_weights(self, module: Any) -> None:
        # Only called for weights that no checkpoint holds; the parts know how they start.
        self.causal_lm._init_weights(module)


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)


def describe_candidates(candidates: Mapping[str, MixerConfig]) -> dict[str, dict[str, Any]]:
    """Candidates as they stand in YAML and in :class:`HybridConfig`; attention is left out."""
    described = {}
    for name, config in candidates.items():
        if not config.keeps_attention:
            described[name] = {"mixer": MIXERS.name_of(type(config)), **dataclasses.asdict(config)}
    return described


def symbols_of(layout: Layout, candidates: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Candidate -> symbol, for those that a layout uses.

    Args:
        layout: Any.
        candidates: As :func:`describe_candidates` gives them.
    """
    letters = {ATTENTION: MIXERS.get(ATTENTION).symbol}
    letters |= {name: MIXERS.get(choices["mixer"]).symbol for name, choices in candidates.items()}
    used = set(layout.candidates)
    return {name: s for name, s in assign_symbols(letters).items() if name in used}


def save_hybrid(
    student: Any,
    folder: Path,
    *,
    layout: Layout,
    candidates: Mapping[str, dict[str, Any]],
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    shard_size: str | None = None,
) -> None:
    """Write an assembled student as a Hugging Face folder.

    Args:
        student: As :func:`mohawk_nas.student.assemble` returns it, or a :class:`HybridForCausalLM`.
        folder: Made if need be.
        layout: The student's.
        candidates: As :func:`describe_candidates` gives them.
        tokenizer: Saved beside the model.
        dtype: Of the weights on disk; as they are if None.
        shard_size: Largest file of weights, e.g. ``5GB``; transformers' own if None.
    """
    causal_lm = student.causal_lm if isinstance(student, HybridForCausalLM) else student
    used = {name: dict(candidates[name]) for name in set(layout.candidates) - {ATTENTION}}
    teacher = causal_lm.config.to_diff_dict()
    for name in ("dtype", "_name_or_path", "transformers_version"):
        teacher.pop(name, None)
    config = HybridConfig(teacher=teacher, layout=list(layout.candidates), candidates=used)
    dtype = dtype or causal_lm.dtype
    with torch.device("meta"):
        # Saving writes the shell's type into the configuration.
        shell = HybridForCausalLM(config).to(dtype)
    # A loaded hybrid has it; the stock model inside has defaults then.
    shell.generation_config = student.generation_config
    state = {f"causal_lm.{n}": t.to(dtype) for n, t in causal_lm.state_dict().items()}
    # Tied weights are one tensor and are stored once.
    for tied in getattr(shell, "all_tied_weights_keys", None) or {}:
        state.pop(tied, None)
    sharding = {} if shard_size is None else {"max_shard_size": shard_size}
    shell.save_pretrained(folder, state_dict=state, **sharding)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load_hybrid(folder: str | Path, *, plugins: list[str] | None = None, **options: Any) -> Any:
    """Load an exported hybrid; the same as ``AutoModelForCausalLM.from_pretrained``.

    Args:
        folder: The exported folder.
        plugins: Files that register the mixers it uses, where they do not come with the package.
        **options: Handed on, e.g. ``dtype``.

    Raises:
        RunError: The folder cannot be read.
        ExportError: Weights are missing from the folder.
    """
    for plugin in plugins or ():
        load_plugin(Path(plugin))
    try:
        model, report = HybridForCausalLM.from_pretrained(
            folder, output_loading_info=True, **options
        )
    except MohawkError:
        raise
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise RunError(
            f"{folder}: must hold a whole hybrid, but cannot be read ({reason}); make it again"
        ) from e
    if report["missing_keys"]:
        raise ExportError(
            f"{folder}: weights are missing, e.g. {sorted(report['missing_keys'])[0]}"
        )
    return model.eval()
