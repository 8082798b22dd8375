"""The hybrid's configuration, as transformers reads and writes it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

__all__ = ["HybridConfig"]

# What generation and evaluation tools read from a configuration, whatever the model is.
_COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
)


class HybridConfig(PreTrainedConfig):  # type: ignore[misc]
    """Configuration of a hybrid.

    Args:
        teacher: The stock model's configuration as a dictionary, with its ``model_type``.
        layout: One candidate's name for each layer.
        candidates: Name -> ``{"mixer": NAME, option: value, ...}``, attention left out.
    """

    model_type = "mohawk_hybrid"

    def __init__(
        self,
        teacher: dict[str, Any] | None = None,
        layout: list[str] | None = None,
        candidates: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.teacher = dict(teacher or {})
        self.layout = list(layout or [])
        self.candidates = dict(candidates or {})
        if self._auto_class is None:
            # A folder that is saved by an installed package holds no code to point to.
            kwargs.pop("auto_map", None)
        if self.teacher:
            base = self.base_config()
            for name in _COMMON:
                if hasattr(base, name):
                    kwargs.setdefault(name, getattr(base, name))
        super().__init__(**kwargs)

    def base_config(self) -> Any:
        """A fresh configuration object of the stock model."""
        return AutoConfig.for_model(**self.teacher)
