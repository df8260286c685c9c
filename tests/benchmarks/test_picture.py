"""Invariants of benchmarks/picture.py:

- The picture is well-formed XML with a title, axis labels and every name and figure, text escaped.
- Bars and whiskers are as long as their values on one scale that begins at zero; nothing is drawn
  outside the picture.
- Colours are set for light and for dark.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import picture
import pytest

SVG = "{http://www.w3.org/2000/svg}"
BARS = [
    picture.Bar("floor", 1.0, "1.00", (1.0, 1.0)),
    picture.Bar('a < b & "c"', 2.5, "2.50 <GiB>", (2.0, 3.9), own=True),
    picture.Bar("gone", None, "out of memory"),
]


@pytest.fixture
def tree():
    charts = [picture.Chart("x of floor & more", BARS, mark=1.0), picture.Chart("GiB", BARS[:2])]
    return ElementTree.fromstring(picture.draw("Cost < time & memory", charts))


def texts(tree) -> list[str]:
    return [element.text for element in tree.iter(f"{SVG}text")]


def test_every_text_is_there_and_escaped(tree):
    assert tree.tag == f"{SVG}svg"
    assert tree.find(f"{SVG}title").text == "Cost < time & memory"
    found = texts(tree)
    for text in ("Cost < time & memory", "x of floor & more", "GiB", "gone", "out of memory"):
        assert text in found
    assert found.count('a < b & "c"') == found.count("2.50 <GiB>") == 2


def test_bars_are_in_proportion_and_one_without_a_value_has_none(tree):
    first = tree.findall(f"{SVG}g")[0]
    widths = [float(bar.get("width")) for bar in first.iter(f"{SVG}rect")]
    assert len(widths) == 2
    assert widths[1] / widths[0] == pytest.approx(2.5, rel=1e-3)
    left = float(next(first.iter(f"{SVG}rect")).get("x"))
    (mark,) = (line for line in first.iter(f"{SVG}line") if line.get("class") == "mark")
    assert float(mark.get("x1")) == pytest.approx(left + widths[0], abs=0.1)


def test_whiskers_end_at_their_values(tree):
    first = tree.findall(f"{SVG}g")[0]
    bar = next(first.iter(f"{SVG}rect"))
    left, unit = float(bar.get("x")), float(bar.get("width"))
    whisker = list(first.iter(f"{SVG}path"))[1].get("d")
    start = float(whisker.split()[0].removeprefix("M"))
    end = float(whisker.partition("H")[2].partition("M")[0])
    assert (start, end) == pytest.approx((left + 2.0 * unit, left + 3.9 * unit), abs=0.2)


def test_nothing_lies_outside(tree):
    _, _, width, height = map(float, tree.get("viewBox").split())
    charts = tree.findall(f"{SVG}g")
    tops = [float(g.get("transform").split()[1].rstrip(")")) for g in charts]
    for group, top in zip(charts, tops, strict=True):
        for text in group.iter(f"{SVG}text"):
            assert 0 <= float(text.get("x")) < width
            assert 0 <= top + float(text.get("y")) < height
        for bar in group.iter(f"{SVG}rect"):
            assert float(bar.get("x")) + float(bar.get("width")) <= width


def test_both_colour_schemes_are_there(tree):
    style = tree.find(f"{SVG}style").text
    assert "prefers-color-scheme:dark" in style
    for name in ("text", ".grid", ".bar", ".own", ".mark", ".whisker"):
        assert style.count(name) >= 2


@pytest.mark.parametrize("highest", [3e-4, 0.7, 1.0, 1.16, 6.0, 9.99, 61.2, 12345.0])
def test_ticks_are_round_and_reach_the_highest(highest):
    ticks = picture.tick_values(highest)
    step = ticks[1]
    assert ticks[0] == 0
    assert ticks[-2] < highest <= ticks[-1]
    assert 3 <= len(ticks) <= 8
    assert f"{step:e}"[0] in "125"
    assert ticks == pytest.approx([number * step for number in range(len(ticks))])
