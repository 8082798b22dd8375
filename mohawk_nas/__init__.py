"""Search, distil and export attention / state-space hybrids of pretrained Transformers.

The names below are imported when they are first used, so that ``import mohawk_nas`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "MIXERS",
    "Bank",
    "Layout",
    "Mixer",
    "MixerConfig",
    "StudyConfig",
    "Teacher",
    "assemble",
    "load_study",
    "load_teacher",
]

_HOMES = {
    "Bank": "bank",
    "Layout": "layout",
    "MIXERS": "mixer",
    "Mixer": "mixer",
    "MixerConfig": "mixer",
    "StudyConfig": "config",
    "Teacher": "teacher",
    "assemble": "student",
    "load_study": "config",
    "load_teacher": "teacher",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"mohawk_nas.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mohawk_nas' has no attribute {name!r}")
