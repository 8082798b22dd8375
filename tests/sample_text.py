"""Made-up documents for the tests of reading and packing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["the", "a", "river", "Stone", "walks", "42", "quietly,", "über", "東京", "under\n\nlight"]


def make_documents(count: int, *, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{i} of {seed}: " + " ".join(rng.choices(WORDS, k=rng.randint(8, 40)))
        for i in range(count)
    ]


DOCUMENTS = make_documents(150)


def lines_of(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_bytes(lines_of([{"text": text} for text in documents]))
    return path
