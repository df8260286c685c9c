"""Bar charts as SVG files that need no library to draw and read well in light and in dark."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT = 760, 170, 110  # right: room for the figures beside the bars
_ROW, _BAR, _HEAD, _FOOT = 26, 15, 40, 44
_STYLE = """
text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}
.name{text-anchor:end}.tick{text-anchor:middle;font-size:11px}.axis{text-anchor:middle}
.bar{fill:#5b8fb0}.own{fill:#d1495b}.grid{stroke:#d0d7de}.mark{stroke:#1f2328;stroke-dasharray:4 3}
.whisker{stroke:#1f2328;stroke-width:1.5;fill:none}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.grid{stroke:#3d444d}.bar{fill:#6ea3c4}
.own{fill:#e8697a}.mark,.whisker{stroke:#e6edf3}}
"""


@dataclass(frozen=True)
class Bar:
    """One bar of a chart.

    Attributes:
        value: its length; None draws the text alone.
        text: what stands at its end.
        span: ends of the whisker, if there is one.
        own: whether it has the colour of this project's method.
    """

    name: str
    value: float | None
    text: str
    span: tuple[float, float] | None = None
    own: bool = False


@dataclass(frozen=True)
class Chart:
    """Horizontal bars over one axis that begins at zero.

    Attributes:
        axis: what the axis shows, with its unit.
        mark: where a line is drawn across all bars, if anywhere.
    """

    axis: str
    bars: list[Bar]
    mark: float | None = None

    @property
    def height(self) -> int:
        return _ROW * len(self.bars) + _FOOT


def draw(title: str, charts: list[Chart]) -> str:
    """The charts below one another, as an SVG document."""
    parts, top = [], _HEAD
    for chart in charts:
        parts.append(f'<g transform="translate(0 {top})">{_chart(chart)}</g>')
        top += chart.height + _ROW // 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f'<text class="title" x="12" y="24">{escape(title)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _chart(chart: Chart) -> str:
    highest = max([v for bar in chart.bars for v in _values(bar)] + [chart.mark or 0]) or 1
    ticks = tick_values(highest)
    scale = (_WIDTH - _LEFT - _RIGHT) / ticks[-1]
    bottom = _ROW * len(chart.bars)
    parts = []
    for tick in ticks:
        x = _LEFT + tick * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}">{tick:,g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{bottom + 34}">{escape(chart.axis)}</text>')
    parts += [_bar(bar, _ROW * number, scale) for number, bar in enumerate(chart.bars)]
    if chart.mark is not None:
        x = _LEFT + chart.mark * scale
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
    return "".join(parts)


def _values(bar: Bar) -> list[float]:
    return [] if bar.value is None else [bar.value, *(bar.span or ())]


def _bar(bar: Bar, top: int, scale: float) -> str:
    middle = top + _ROW / 2
    parts = [f'<text class="name" x="{_LEFT - 8}" y="{middle + 4}">{escape(bar.name)}</text>']
    end = _LEFT + max(_values(bar), default=0) * scale
    if bar.value is not None:
        parts.append(
            f'<rect class="{"own" if bar.own else "bar"}" x="{_LEFT}" y="{middle - _BAR / 2}" '
            f'width="{bar.value * scale:.1f}" height="{_BAR}"/>'
        )
    if bar.value is not None and bar.span is not None:
        low, high = (_LEFT + value * scale for value in bar.span)
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {middle - 4}v8M{low:.1f} {middle}H{high:.1f}'
            f'M{high:.1f} {middle - 4}v8"/>'
        )
    parts.append(f'<text x="{end + 8:.1f}" y="{middle + 4}">{escape(bar.text)}</text>')
    return "".join(parts)


def tick_values(highest: float) -> list[float]:
    """Round numbers from zero to the first that is not below `highest`."""
    rough = highest / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 12) for number in range(math.ceil(highest / step - 1e-9) + 1)]
