"""Figures as plotly JSON. Colours are roles that the page's script fills in for light and dark.

A trace carries `meta = {"color": role}`, where a role is a CSS variable of the page without its dashes, `meta =
{"colors": [role, ...]}`, one for each point, or `meta = {"ramp": t}`, t in 0..1 along the page's ramp from first
slot to last. A shape's `name` is its role.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dflash_jax.report.fields import Interval

MAX_POINTS = 1000
MAX_NAME = 44
SERIES = ("c0", "c1", "c2", "c3", "c4", "c5")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure: a name unique on its page, a heading, a caption in words, and plotly's `data` and `layout`."""

    name: str
    title: str
    caption: str
    plot: dict[str, Any]


def make_figure(
    name: str, *, title: str, caption: str, traces: Sequence[Any], x: dict[str, Any], y: dict[str, Any], **layout: Any
) -> Figure:
    """Let plotly check the traces and axes, and keep their plain JSON."""
    drawn = go.Figure(data=list(traces), layout={"xaxis": x, "yaxis": y, **layout}).to_plotly_json()
    # The theme comes from the page; plotly's default template would be 7 kB of colours for light only.
    plot = {
        "data": drawn["data"],
        "layout": {key: value for key, value in drawn["layout"].items() if key != "template"},
    }
    return Figure(name=name, title=title, caption=caption, plot=plot)


def plain(text: str) -> str:
    """A name for plotly, which reads a few tags in its labels: escaped, and short enough for a legend on a phone."""
    shown = text if len(text) <= MAX_NAME else f"{text[: MAX_NAME // 2 - 1]}…{text[-MAX_NAME // 2 :]}"
    return html.escape(shown, quote=False)


def error_bars(means: Sequence[float], intervals: Sequence[Interval | None]) -> dict[str, Any]:
    """Error bars from intervals; a missing interval has no bar."""
    pairs = list(zip(means, intervals, strict=True))
    above = [interval.high - mean if interval else 0.0 for mean, interval in pairs]
    below = [mean - interval.low if interval else 0.0 for mean, interval in pairs]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.6, "width": 5}


def interval_text(interval: Interval | None) -> str:
    """An interval for a hover."""
    return "no interval" if interval is None else f"95 % {interval.low:.3f} to {interval.high:.3f}"


def points(
    name: str,
    color: str,
    places: Sequence[str],
    means: Sequence[float],
    intervals: Sequence[Interval | None],
    extra: Sequence[str],
) -> go.Scatter:
    """Means with intervals over named places, one series; `extra` is a further line of each hover."""
    return go.Scatter(
        name=plain(name),
        x=[plain(place) for place in places],
        y=list(means),
        mode="markers",
        marker={"size": 10},
        error_y=error_bars(means, intervals),
        cliponaxis=False,  # a point at 0 is whole
        customdata=_hover(intervals, extra),
        hovertemplate="%{x}<br>%{y:.3f} (%{customdata[0]})<br>%{customdata[1]}",
        meta={"color": color},
    )


def bars(
    name: str,
    color: str,
    places: Sequence[str],
    means: Sequence[float],
    intervals: Sequence[Interval | None],
    extra: Sequence[str],
) -> go.Bar:
    """Means as bars from zero with intervals, one series; `extra` is a further line of each hover."""
    return go.Bar(
        name=plain(name),
        x=[plain(place) for place in places],
        y=list(means),
        error_y=error_bars(means, intervals),
        customdata=_hover(intervals, extra),
        hovertemplate="%{x}<br>%{y:.3f} (%{customdata[0]})<br>%{customdata[1]}",
        meta={"color": color},
    )


def _hover(intervals: Sequence[Interval | None], extra: Sequence[str]) -> list[list[str]]:
    """What a hover says beside the value."""
    return [[interval_text(interval), plain(text)] for interval, text in zip(intervals, extra, strict=True)]


def named_axis(title: str, places: Sequence[str]) -> dict[str, Any]:
    """An axis of names in the given order."""
    shown = [plain(place) for place in places]
    return {"type": "category", "title": title, "categoryorder": "array", "categoryarray": shown}


def offset_axis(offsets: Sequence[int]) -> dict[str, Any]:
    """Offsets as names: 0 has no place on a log axis, and distances between offsets mean nothing here."""
    return named_axis("position_offset (ctx_pos_start)", [f"{offset:,}" for offset in offsets])


def difference_axis(margin: float | None) -> dict[str, Any]:
    """An axis of differences of accept_len, wide enough that the margin's band is seen to end."""
    axis: dict[str, Any] = {"title": "difference of accept_len", "zeroline": True, "zerolinewidth": 2}
    return axis if margin is None else axis | {"autorangeoptions": {"include": [-1.5 * margin, 1.5 * margin]}}


def band(low: float, high: float, *, role: str) -> dict[str, Any]:
    """A shaded band across the figure between two values of y."""
    return {
        "type": "rect",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": low,
        "y1": high,
        "layer": "below",
        "name": role,
    } | {
        "line": {"width": 0},
        "opacity": 0.16,
    }


def thin(count: int) -> list[int]:
    """At most about MAX_POINTS indices of a curve of `count` rows, evenly spaced, the last one among them."""
    stride = -(-count // MAX_POINTS)
    return sorted({*range(0, count, stride), count - 1})
