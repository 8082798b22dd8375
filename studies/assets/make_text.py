"""Rebuild the sample text of the offline quickstart from six pinned packages.

Nothing here opens a connection. Fetch and unpack the packages with their ordinary clients into an
empty folder (Debian 12 for the first half; any Python for the second), then run the script:

    apt-get download r-cran-janeaustenr=1.0.0-1 r-cran-tokenizers=0.3.0-1 \\
        golang-github-andybalholm-brotli-dev=1.0.4-3
    for deb in *.deb; do dpkg-deb -x "$deb" "${deb%%_*}"; done
    pip download --no-deps --no-binary :all: pytest==9.2.0 sqlalchemy==2.1.9 trio==0.35.0
    for sdist in *.tar.gz; do tar xf "$sdist"; done
    python studies/assets/make_text.py --packages . --out studies/assets/text

The same packages give the same records. SOURCES.md, beside the output, says what each text is,
under which licence, and why it was chosen.
"""

import argparse
import collections
import json
import lzma
import random
import re
import struct
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PIECE_CHARS = 16_000
SHORTEST_DOCUMENT = 1_500


class Document(NamedTuple):
    source: str  # "<package>:<path>", with "#<part>" for a part of a book
    licence: str
    text: str


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, required=True, help="folder of unpacked packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "text")
    args = parser.parse_args()
    try:
        documents = [d for d in collect(args.packages) if len(d.text) >= SHORTEST_DOCUMENT]
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; see --help", file=sys.stderr)
        return 2

    # A reader that stops early should still have seen every kind of text.
    random.Random(0).shuffle(documents)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quickstart.jsonl.xz"
    with lzma.open(path, "wt", encoding="utf-8", preset=9 | lzma.PRESET_EXTREME) as file:
        for document in documents:
            for text in pieces(document.text):
                record = {"text": text, "source": document.source, "licence": document.licence}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    copy_licences(args.packages, args.out / "licences")
    print_table(documents)
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


# What is taken.

JANEAUSTENR = "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
TOKENIZERS = "r-cran-tokenizers/usr/lib/R/site-library/tokenizers/data/Rdata.rdb"
BROTLI = "golang-github-andybalholm-brotli-dev/usr/share/gocode/src/github.com/andybalholm/brotli"

# Two more novels in the package were among the texts that phi-tiny was trained on.
AUSTEN = {
    "EMMA": "emma",
    "PRIDE AND PREJUDICE": "prideprejudice",
    "SENSE AND SENSIBILITY": "sensesensibility",
}

# Tables of contents, reference pages that are mostly signatures, and pages whose bulk is code or
# names are left out. trio's code of conduct is under another licence than the rest.
MANUALS = {
    "pytest-9.2.0/doc/en": (
        "**/*.rst",
        r"announce|changelog|plugin_list|reference/reference|reportingdemo|talks|license|builtin"
        r"|sponsor|tidelift|contact|historical|history",
    ),
    "sqlalchemy-2.1.9/doc/build": (
        "**/*.rst",
        r"changelog|copyright|api\.rst|events?\.rst|_setup|nav_include|dialects|types|operators"
        r"|data_select|dataclasses|declarative_tables|queryguide|baked|constraints|collection",
    ),
    "trio-0.35.0/docs/source": ("*.rst", r"code-of-conduct|history|releasing|awesome"),
}
NOTICES = {
    "pytest": "pytest-9.2.0/LICENSE",
    "sqlalchemy": "sqlalchemy-2.1.9/LICENSE",
    "trio": "trio-0.35.0/LICENSE.MIT",
}


def collect(root: Path) -> Iterator[Document]:
    yield from novels(root)
    yield from whaling(root)
    yield from optics(root)
    yield from manuals(root)


def novels(root: Path) -> Iterator[Document]:
    for lines in r_character_vectors(root / JANEAUSTENR):
        if book := AUSTEN.get(lines[0]):
            chapters = split_at(r"^(?:CHAPTER|Chapter) \w+$", "\n".join(lines))[1:]
            for number, chapter in enumerate(chapters, 1):
                text = re.sub(r"\n+VOLUME \w+\s*$|\n+(?:THE END|FINIS)\s*$", "", chapter)
                yield book_part(f"r-cran-janeaustenr:{book}#{number}", text)


def whaling(root: Path) -> Iterator[Document]:
    (book,) = r_character_vectors(root / TOKENIZERS)
    text = "\n".join(book).replace("\r\n", "\n")
    # The transcriber's header and trailer carry a trademark; the book between them is free of it.
    text = text.split("*** START OF THIS", 1)[1].split("\nEnd of Project", 1)[0]
    chapters = split_at(r"^(?:CHAPTER \d+\. |Epilogue$)", text)[1:]
    for number, chapter in enumerate(chapters, 1):
        yield book_part(f"r-cran-tokenizers:mobydick#{number}", chapter)


def optics(root: Path) -> Iterator[Document]:
    text = (root / BROTLI / "testdata/Isaac.Newton-Opticks.txt").read_text(encoding="utf-8")
    text = re.sub(r"\[Illustration[^\]]*\]|\[[A-Z]\]|\[Sidenote:[^\]]*\]", "", text)
    for number, part in enumerate(split_at(r"^_PART [IV]+\._$", text)[1:], 1):
        part = re.sub(r"\n(?:THE\s+)?(?:FIRST|SECOND|THIRD)\s+BOOK\s+OF\s+OPTICKS\s*$", "", part)
        path = "testdata/Isaac.Newton-Opticks.txt"
        yield book_part(f"golang-github-andybalholm-brotli-dev:{path}#{number}", part)


def manuals(root: Path) -> Iterator[Document]:
    for folder, (pattern, unwanted) in MANUALS.items():
        package = folder.split("/")[0].rsplit("-", 1)[0]
        paths = sorted((root / folder).glob(pattern))
        if not paths:
            raise FileNotFoundError(2, f"no {pattern} in it", str(root / folder))
        for path in paths:
            name = path.relative_to(root / folder).as_posix()
            if not re.search(unwanted, name):
                text = rst_to_text(path.read_text(encoding="utf-8"))
                source = f"{package}:{folder.split('/', 1)[1]}/{name}"
                yield Document(source, "MIT", tidy(text))


def copy_licences(root: Path, out: Path) -> None:
    """The MIT licence asks that its notice go with every copy."""
    out.mkdir(exist_ok=True)
    for package, path in NOTICES.items():
        (out / f"{package}.txt").write_bytes((root / path).read_bytes())


# How it is cleaned.


def r_character_vectors(path: Path) -> Iterator[list[str]]:
    """Each character vector of an R lazy-load database.

    The database is a chain of (4-byte length, zlib stream), one for each object, in R's XDR
    serialisation. Only what the two packages hold is understood: version 3, no attributes inside.
    """
    database = path.read_bytes()
    while database:
        stream = zlib.decompressobj()
        data = stream.decompress(database[4:])
        database = stream.unused_data
        (encoding_length,) = struct.unpack_from(">i", data, 14)
        position = 18 + encoding_length
        kind, count = struct.unpack_from(">ii", data, position)
        if kind & 0xFF != 16:
            continue
        strings = []
        position += 8
        for _ in range(count):
            (length,) = struct.unpack_from(">i", data, position + 4)
            strings.append(data[position + 8 : position + 8 + length].decode("utf-8-sig"))
            position += 8 + length
        yield strings


def split_at(heading: str, text: str) -> list[str]:
    """Cut in front of each match; the first part is what stands before the first heading."""
    starts = [m.start() for m in re.finditer(heading, text, re.MULTILINE)]
    return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]


def book_part(source: str, text: str) -> Document:
    text = re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n", text)
    return Document(source, "public domain", tidy("\n\n".join(map(unwrap, paragraphs))))


def unwrap(paragraph: str) -> str:
    """One line a paragraph, except that an indented line (verse, a list) begins a new one."""
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n(?=\s)", paragraph))


def tidy(text: str) -> str:
    # A small model learns nothing from addresses, and they age.
    address = re.compile(r"://|\b[\w-]+\.(?:org|net|io)\b")
    paragraphs = (p.rstrip() for p in text.split("\n\n") if not address.search(p))
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(p for p in paragraphs if p.strip())).strip("\n")


ADMONITIONS = r"note|warning|tip|seealso|important|deprecated|versionadded|versionchanged|topic"
DEFINITIONS = r"(?:\w+:)?(?:function|class|method|attribute|data|exception|decorator|glossary)"
CODE = r"code-block|sourcecode|code|ipython|parsed-literal|pytest"


def rst_to_text(text: str) -> str:
    """Prose, headings, lists and examples of a reStructuredText page; markup and indexes go."""
    lines = expand_directives(text.expandtabs().split("\n"))
    # SQLAlchemy's own marks around the SQL that an example prints.
    text = re.sub(r"\{(?:execsql|printsql|sql|opensql|stop)\}", "", mark_headings("\n".join(lines)))
    text = re.sub(r":[\w:+-]+:`[~.]*(?:_\w+\.)?([^`<]*[^`<\s])(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]+>`__?|`([^`]+)`__?", r"\1\2", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r"\s*::$|(?<=\w)::$", ":", text, flags=re.MULTILINE)
    paragraphs = re.split(r"\n\s*\n", text)
    is_table = re.compile(r"^\s*(?:\+[-=]+|=+ +=+|\.\. )", re.MULTILINE)
    return "\n\n".join(unwrap_markup(p) for p in paragraphs if not is_table.search(p))


def expand_directives(lines: list[str]) -> list[str]:
    kept: list[str] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        i += 1
        if not (match := re.match(r"( *)\.\.(?: |$)(?:([\w:-]+)::)?(.*)", line)):
            kept.append(line)
            continue
        indent, name, argument = len(match[1]), match[2] or "", match[3].strip()
        body = []
        while i < len(lines) and (
            not lines[i].strip() or len(lines[i]) - len(lines[i].lstrip()) > indent
        ):
            body.append(lines[i])
            i += 1
        while body and (not body[0].strip() or re.match(r"\s+:[\w-]+:(?: |$)", body[0])):
            body.pop(0)
        body = textwrap.dedent("\n".join(body)).rstrip().split("\n")
        if re.fullmatch(CODE, name):
            kept += ["", *(f"    {line}".rstrip() for line in body), ""]
        elif re.fullmatch(ADMONITIONS, name):
            title = [argument] if argument[:1].isalpha() else []
            kept += ["", *title, *expand_directives(body), ""]
        elif re.fullmatch(DEFINITIONS, name):
            signature = [f"`{argument}`"] if argument else []
            kept += ["", *signature, "", *expand_directives(body), ""]
    return kept


def mark_headings(text: str) -> str:
    levels: dict[str, int] = {}

    def replace(match: re.Match[str]) -> str:
        level = levels.setdefault(match[2], min(len(levels) + 1, 4))
        return f"\n{'#' * level} {match[1].strip()}\n"

    text = re.sub(r"^([=\-~#*^\"]){3,}\n(?=.+\n\1{3,}$)", "", text, flags=re.MULTILINE)
    return re.sub(r"^(\S.*)\n([=\-~^\"'*#+`.])\2{2,}$", replace, text, flags=re.MULTILINE)


def unwrap_markup(paragraph: str) -> str:
    """Join the lines of prose and of list items; examples, which are indented, stay as they are."""
    if paragraph.startswith(" "):
        return paragraph.rstrip()
    items = re.split(r"\n(?=\s*(?:[-*+]|\d+\.|#\.) )", paragraph)
    return "\n".join(" ".join(item.split()) for item in items)


def pieces(text: str) -> Iterator[str]:
    """Cut a document at paragraph breaks into parts of about equal length."""
    size = len(text) / max(1, round(len(text) / PIECE_CHARS))
    parts: dict[int, list[str]] = collections.defaultdict(list)
    start = 0
    for paragraph in text.split("\n\n"):
        parts[int((start + len(paragraph) / 2) / size)].append(paragraph)
        start += len(paragraph) + 2
    return ("\n\n".join(part) for part in parts.values())


def print_table(documents: list[Document]) -> None:
    table: dict[str, list[int]] = collections.defaultdict(list)
    for document in documents:
        group = re.sub(r"[#/].*", "", document.source)
        table[group].append(len(document.text))
    for name, sizes in sorted(table.items()):
        print(f"{name:45} {len(sizes):4} documents {sum(sizes):9,} characters")
    total = sum(len(d.text) for d in documents)
    largest = max(documents, key=lambda d: len(d.text))
    print(f"{'total':45} {len(documents):4} documents {total:9,} characters")
    print(f"largest: {largest.source} ({len(largest.text) / total:.1%})")


if __name__ == "__main__":
    sys.exit(main())
