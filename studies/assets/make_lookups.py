"""Write documents that can only be predicted by looking back: tables of random words, then asked.

    python studies/assets/make_lookups.py --words 'corpus/train-*.jsonl.xz' --out lookups.jsonl

Prose alone hardly asks a student to look anything up, so distilling on it forgets recall that the
bank still had. `--among` writes the lookups in between other documents, so that every split of a
study whose `data.source` is the new file holds `--share` of them:

    python studies/assets/make_lookups.py --among studies/assets/text/quickstart.jsonl.xz \\
        --share 0.25 --out text-with-lookups.jsonl

A document lists pairs of words in one of a few notations and then repeats some of them in any
order. None of the notations is one that recall is measured with. Words are the most frequent ones
of `--words`, or of what they stand among: JSON lines with a `text` field, plain or compressed.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from train_teacher import InputError, count, documents, fraction, matching_files, records

from mohawk_nas.files import atomic_write

NOTATIONS = ("{} -> {}; ", "| {} | {} |\n", "{} means {}. ", "{}/{} ", "[{}] {}\n", "'{}', '{}'\n")
FEWEST_PAIRS, MOST_PAIRS = 4, 128
NUM_WORDS = 4000
COUNTED_DOCUMENTS = 2000
WORD = re.compile(r"\b[A-Za-z]{3,10}\b")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--words", nargs="+", help="text whose words are used; that of --among")
    add("--out", type=Path, required=True)
    add("--size", type=count, default=16_000_000, help="characters, such as 16M; not with --among")
    add("--among", nargs="+", help="text that the lookups are put in between")
    add("--share", type=fraction, default=0.25, help="of the characters, with --among")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if not (args.words or args.among):
            raise InputError("--words or --among must be given, but neither is")
        if not 0 < args.share < 1:
            raise InputError(f"--share must be between 0 and 1, but is {args.share}")
        words = frequent_words(matching_files("--words", args.words or args.among))
        rng = Random(args.seed)
        rows = alone(words, rng, args.size)
        if args.among:
            rows = among(records(matching_files("--among", args.among)), words, rng, args.share)
        with atomic_write(args.out) as beside, beside.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    except InputError as error:
        print(f"make_lookups: error: {error}", file=sys.stderr)
        return 2
    return 0


def alone(words: list[str], rng: Random, size: int) -> Iterator[dict[str, str]]:
    """Lookups of so many characters."""
    written = 0
    while written < size:
        text = document(words, rng)
        yield {"text": text}
        written += len(text)


def among(
    others: Iterable[dict[str, Any]], words: list[str], rng: Random, share: float
) -> Iterator[dict[str, Any]]:
    """Other records as they come, and lookups wherever less than the share was written of them.

    Lookups name themselves in every field that a document may be named by.
    """
    of_lookups, of_others, number = 0, 0, 0
    for other in others:
        yield other
        of_others += len(other["text"])
        while of_lookups * (1 - share) < of_others * share:
            text = document(words, rng)
            name = f"lookups {number}"
            yield {key: name for key in other if isinstance(other[key], str)} | {"text": text}
            of_lookups, number = of_lookups + len(text), number + 1


def frequent_words(files: list[str]) -> list[str]:
    """The most frequent words of some documents, in small letters."""
    counts: Counter[str] = Counter()
    for number, text in enumerate(documents(files)):
        if number == COUNTED_DOCUMENTS:
            break
        counts.update(word.lower() for word in WORD.findall(text))
    words = [word for word, _ in counts.most_common(NUM_WORDS)]
    if len(words) < 4 * MOST_PAIRS:
        raise InputError(
            f"--words: must hold at least {4 * MOST_PAIRS} different words of 3 to 10 letters, but "
            f"holds {len(words)}"
        )
    return words


def document(words: list[str], rng: Random) -> str:
    """One table and its questions; few pairs are as likely as many."""
    low, high = math.log(FEWEST_PAIRS), math.log(MOST_PAIRS)
    num_pairs = round(math.exp(rng.uniform(low, high)))
    drawn = rng.sample(words, 2 * num_pairs)
    pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
    notation = rng.choice(NOTATIONS)
    asked = rng.sample(pairs, rng.randint(num_pairs // 2, num_pairs))
    return "".join(notation.format(*pair) for pair in [*pairs, *asked]).strip()


if __name__ == "__main__":
    sys.exit(main())
