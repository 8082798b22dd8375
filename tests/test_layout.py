import re

import pytest

from mohawk_nas.errors import LayoutError
from mohawk_nas.layout import Layout, assign_symbols

SYMBOLS = {"attention": "A", "mamba2": "M", "large": "M2", "window": "W"}


def parse(text, *, num_layers=4, symbols=SYMBOLS):
    return Layout.parse(text, num_layers=num_layers, symbols=symbols)


def layout(strip):
    names = {symbol: name for name, symbol in SYMBOLS.items()}
    return Layout(tuple(names[symbol] for symbol in strip.split()))


def test_keeping():
    kept = Layout.keeping([3, 0], num_layers=5, replacement="mamba2")
    assert kept.candidates == ("attention", "mamba2", "mamba2", "attention", "mamba2")
    assert kept.attention_layers == (0, 3)
    assert kept.replaced_layers == (1, 2, 4)
    assert len(kept) == 5
    assert (kept[3], kept[4]) == ("attention", "mamba2")
    assert Layout.keeping([], num_layers=2, replacement="m").attention_layers == ()
    assert Layout.keeping(iter((1, 0)), num_layers=2, replacement="m").replaced_layers == ()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "layer 4 is out of range: layers are counted from 0 and must be below 4"),
        ([0, -1], "layer -1 is out of range: layers are counted from 0 and must be below 4"),
        ([2, 1, 2], r"each layer may be named once, but got \[2, 1, 2\]"),
    ],
)
def test_keeping_layers_that_are_not_there(layers, message):
    with pytest.raises(LayoutError, match=message):
        Layout.keeping(layers, num_layers=4, replacement="mamba2")


@pytest.mark.parametrize(
    ("text", "strip"),
    [
        ("1,3", "M A M A"),
        (" 3, 1 ", "M A M A"),
        ("2", "M M A M"),
        ("0,1,2,3", "A A A A"),
        ("", "M M M M"),
        ("M A M A", "M A M A"),
        ("MAMA", "M A M A"),
        ("M2AWM", "M2 A W M"),
        ("  M2  A W M ", "M2 A W M"),
        ("AAAA", "A A A A"),
    ],
)
def test_parse(text, strip):
    assert parse(text) == layout(strip)
    assert parse(text).strip(SYMBOLS) == strip


def test_what_is_printed_can_be_read():
    long = Layout.keeping([4, 10, 16, 22], num_layers=24, replacement="mamba2")
    strip = long.strip(SYMBOLS)
    assert strip.replace(" ", "") == "MMMMAMMMMMAMMMMMAMMMMMAM"
    for text in (strip, strip.replace(" ", ""), "4,10,16,22"):
        assert parse(text, num_layers=24) == long


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,4", "layer 4 is out of range: layers are counted from 0 and must be below 4"),
        ("-1", "layer -1 is out of range"),
        ("1,1", r"each layer may be named once, but got \[1, 1\]"),
        (
            "1;3",
            "a layout is a list of attention layers like 1,5 or a strip like M A, but got '1;3'",
        ),
        ("1 3", "but got '1 3'"),
        ("1,x", "but got '1,x'"),
        ("1.5", "but got '1.5'"),
        ("M A M", "a layout must name all 4 layers, but 'M A M' names 3"),
        ("MAMAM", "a layout must name all 4 layers, but 'MAMAM' names 5"),
        (
            "M X Y X",
            r"unknown symbols in layout: X Y; known: A \(attention\), M \(mamba2\), M2 \(large\), ",
        ),
        ("m a m a", "unknown symbols in layout: a m; known: A"),
        ("M3 A A A", "unknown symbols in layout: M3; known"),
        ("mamba2", "unknown symbols in layout: a a2 b m; known"),
    ],
)
def test_texts_that_are_no_layout(text, message):
    with pytest.raises(LayoutError, match=message):
        parse(text)


def test_parse_in_a_space_of_attention_alone():
    only = {"attention": "A"}
    assert parse("0,1,2,3", symbols=only) == layout("A A A A")
    with pytest.raises(LayoutError, match="the search space has no candidate besides attention"):
        parse("1,3", symbols=only)


def test_with_candidate():
    before = layout("M A M A")
    assert before.with_candidate(0, "window") == layout("W A M A")
    assert before == layout("M A M A")


def test_check():
    known = ("attention", "mamba2")
    layout("M A M A").check(known, num_layers=4)
    with pytest.raises(LayoutError, match="the layout has 4 layers, but the teacher has 5"):
        layout("M A M A").check(known, num_layers=5)
    message = "layer 2: unknown candidate 'mamba'; available: attention, mamba2. Did you mean 'mam"
    with pytest.raises(LayoutError, match=re.escape(message)):
        layout("M A M A").with_candidate(2, "mamba").check(known, num_layers=4)


def test_layouts_are_values():
    assert len({layout("M A M A"), parse("1,3"), layout("A M M A")}) == 2
    with pytest.raises(AttributeError):
        layout("M A M A").candidates = ()


def test_key_is_the_same_on_every_machine():
    # Written down, since runs that are on a disk somewhere refer to it.
    assert layout("M A M A").key() == "b17979ad319dce5e"
    assert layout("A M M A").key() != layout("M A M A").key()
    # Names that run into each other are no reason for equal keys.
    assert Layout(("ab", "c")).key() != Layout(("a", "bc")).key()


def test_assign_symbols():
    letters = {"attention": "A", "small": "M", "large": "M", "window": "W", "huge": "M"}
    assert assign_symbols(letters) == {
        "attention": "A",
        "small": "M",
        "large": "M2",
        "window": "W",
        "huge": "M3",
    }
