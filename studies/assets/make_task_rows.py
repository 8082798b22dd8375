"""Writes rows of LAMBADA, PIQA and ARC-Easy as `mohawk-nas evaluate --task-data` reads them.

    python studies/assets/make_task_rows.py lambada_openai.jsonl piqa.jsonl --out ROWS

Where there is no network, these sets are to be had as files of llm-foundry (Apache-2.0; in its
repository under `scripts/eval/local_data`), whose rows hold finished prompts: `{context,
continuation}`, and `{query, choices, gold}`. A harness makes prompts of its own, so they are taken
apart again into the fields of the original sets. A file's stem is its task. LAMBADA is CC BY 4.0
(as OpenAI prepared it, modified MIT), PIQA AFL 3.0, ARC CC BY-SA 4.0; no row comes with this
repository.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mohawk_nas.errors import InputError, MohawkError
from mohawk_nas.files import atomic_write

Row = Mapping[str, Any]


def lambada(row: Row) -> Row:
    return {"text": f"{row['context'].rstrip()} {row['continuation'].strip()}"}


def piqa(row: Row) -> Row:
    first, second = row["choices"]
    return {"goal": question(row), "sol1": first, "sol2": second, "label": row["gold"]}


def arc(row: Row) -> Row:
    labels = list(string.ascii_uppercase[: len(row["choices"])])
    choices = {"text": row["choices"], "label": labels}
    return {"question": question(row), "choices": choices, "answerKey": labels[row["gold"]]}


def question(row: Row) -> str:
    text: str = row["query"]
    return text.removeprefix("Question: ").rstrip("\n")


TASKS: Mapping[str, tuple[str, Callable[[Row], Row]]] = {
    "lambada_openai": ("test", lambada),
    "piqa": ("validation", piqa),
    "arc_easy": ("test", arc),
}
"""Task -> the split that it is scored on, and what makes its rows."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder; TASK/SPLIT.jsonl in it")
    args = parser.parse_args(argv)
    try:
        for file in args.files:
            print(f"Wrote {make(file, args.out)}")
    except MohawkError as error:
        print(f"make_task_rows: error: {error}", file=sys.stderr)
        return 2
    return 0


def make(file: Path, out: Path) -> Path:
    """The rows of one file."""
    if file.stem not in TASKS:
        raise InputError(f"{file}: must be named by its task, one of {', '.join(TASKS)}")
    split, convert = TASKS[file.stem]
    path = out / file.stem / f"{split}.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [convert(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, IndexError) as e:
        raise InputError(f"{file}: must hold rows of llm-foundry ({type(e).__name__}: {e})") from e
    with atomic_write(path) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
