"""Write documents that can only be predicted by looking back: tables of random words, then asked.

    python studies/assets/make_lookups.py --words 'corpus/train-*.jsonl.xz' --out lookups.jsonl

Prose alone hardly asks a student to look anything up, so distilling on it forgets recall that the
bank still had. A study that takes some of its text from here does not:

    data:
      mixture:
        - {source: 'corpus/train-*.jsonl.xz', weight: 0.85}
        - {source: lookups.jsonl, weight: 0.15}

A document lists pairs of words in one of a few notations and then repeats some of them in any
order. None of the notations is one that recall is measured with. Words are the most frequent ones
of `--words`, which is JSON lines with a `text` field, plain or compressed.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

from train_teacher import InputError, count, documents, matching_files

NOTATIONS = ("{} -> {}; ", "| {} | {} |\n", "{} means {}. ", "{}/{} ", "[{}] {}\n", "'{}', '{}'\n")
FEWEST_PAIRS, MOST_PAIRS = 4, 128
NUM_WORDS = 4000
COUNTED_DOCUMENTS = 2000
WORD = re.compile(r"\b[A-Za-z]{3,10}\b")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--words", nargs="+", required=True, help="text whose words are used")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=count, default=16_000_000, help="characters, such as 16M")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        words = frequent_words(matching_files("--words", args.words))
    except InputError as error:
        print(f"make_lookups: error: {error}", file=sys.stderr)
        return 2
    rng, written = Random(args.seed), 0
    with args.out.open("w", encoding="utf-8") as out:
        while written < args.size:
            text = document(words, rng)
            out.write(json.dumps({"text": text}) + "\n")
            written += len(text)
    return 0


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
