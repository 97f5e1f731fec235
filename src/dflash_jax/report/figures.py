"""The page's figures as plotly JSON. Colours are roles that the page's script fills in for light and dark.

A trace carries `meta = {"color": role}`, where a role is a CSS variable of the page without its dashes, or
`meta = {"ramp": t}`, t in 0..1 along the page's ramp from first slot to last.
"""

import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dflash_jax.report.fields import Interval
from dflash_jax.report.records import Bucket, Check, Decode, Run, Sample

MAX_POINTS = 1000
SERIES = ("c0", "c1", "c2", "c3", "c4", "c5")
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure: a name unique on its page, a heading, a caption in words, and plotly's `data` and `layout`."""

    name: str
    title: str
    caption: str
    plot: dict[str, Any]


def _figure(
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


def _error_bars(means: Sequence[float], intervals: Sequence[Interval | None]) -> dict[str, Any]:
    """Error bars from intervals; a missing interval has no bar."""
    pairs = list(zip(means, intervals, strict=True))
    above = [interval.high - mean if interval else 0.0 for mean, interval in pairs]
    below = [mean - interval.low if interval else 0.0 for mean, interval in pairs]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1.6, "width": 5}


def _interval_text(interval: Interval | None) -> str:
    """An interval for a hover."""
    return "no interval" if interval is None else f"95 % {interval.low:.3f} to {interval.high:.3f}"


def _points(
    name: str,
    color: str,
    offsets: Sequence[int],
    means: Sequence[float],
    intervals: Sequence[Interval | None],
    extra: Sequence[str],
) -> go.Scatter:
    """Means with intervals over offsets, one series."""
    return go.Scatter(
        name=html.escape(name, quote=False),
        x=[f"{offset:,}" for offset in offsets],
        y=list(means),
        mode="markers",
        marker={"size": 10},
        error_y=_error_bars(means, intervals),
        customdata=[[_interval_text(interval), text] for interval, text in zip(intervals, extra, strict=True)],
        hovertemplate="offset %{x}<br>%{y:.3f} (%{customdata[0]})<br>%{customdata[1]}",
        meta={"color": color},
    )


def _offset_axis(offsets: Sequence[int]) -> dict[str, Any]:
    """Offsets as names: 0 has no place on a log axis, and distances between offsets mean nothing here."""
    names = [f"{offset:,}" for offset in offsets]
    return {
        "type": "category",
        "title": "position_offset (ctx_pos_start)",
        "categoryorder": "array",
        "categoryarray": names,
    }


def _all_offsets(checks: Sequence[Check]) -> list[int]:
    """Every offset of every check, rising."""
    return sorted({offset for check in checks for offset in (*check.by_offset, *check.differences)})


def offset_figures(checks: Sequence[Check]) -> list[Figure]:
    """accept_len by offset, and the paired differences to offset 0; checks side by side."""
    figures: list[Figure] = []
    offsets = _all_offsets(checks)
    layout: dict[str, Any] = {"showlegend": len(checks) > 1, "scattermode": "group"}
    traces = [
        _points(
            check.label,
            SERIES[place % len(SERIES)],
            list(check.by_offset),
            [bucket.accept_len_mean for bucket in check.by_offset.values()],
            [bucket.accept_len_ci95 for bucket in check.by_offset.values()],
            [
                f"{bucket.num_anchors:,} anchors, token_acc {bucket.token_acc_mean:.3f}"
                for bucket in check.by_offset.values()
            ],
        )
        for place, check in enumerate(checks)
        if check.by_offset
    ]
    if traces:
        y = {"title": "accept_len (drafted tokens)", "rangemode": "tozero"}
        caption = "Mean over all anchors (micro) with 95 % intervals, bootstrapped over prompts."
        title = "accept_len by offset"
        figures.append(
            _figure("offsets", title=title, caption=caption, traces=traces, x=_offset_axis(offsets), y=y, **layout)
        )
    traces = [
        _points(
            check.label,
            SERIES[place % len(SERIES)],
            list(check.differences),
            [item.mean for item in check.differences.values()],
            [item.ci95 for item in check.differences.values()],
            ["paired over prompts, to offset 0"] * len(check.differences),
        )
        for place, check in enumerate(checks)
        if check.differences
    ]
    if traces:
        y = {"title": "difference of accept_len", "zeroline": True, "zerolinewidth": 2}
        caption = (
            "The same tokens at each offset, minus offset 0, paired over prompts: an interval that holds 0 is parity."
        )
        x = _offset_axis([offset for offset in offsets if any(offset in check.differences for check in checks)])
        figures.append(
            _figure(
                "differences", title="Paired difference to offset 0", caption=caption, traces=traces, x=x, y=y, **layout
            )
        )
    return figures


def _survival_line(name: str, color: str, dash: str, survival: Sequence[float]) -> go.Scatter:
    """One survival curve over slots 1..B-1."""
    return go.Scatter(
        name=html.escape(name, quote=False),
        x=list(range(1, len(survival) + 1)),
        y=list(survival),
        mode="lines+markers",
        line={"dash": dash, "width": 2.5},
        marker={"size": 7},
        hovertemplate="slot %{x}: %{y:.1%}",
        meta={"color": color},
    )


def survival_figure(check: Check, *, name: str, title: str) -> Figure | None:
    """Survival by slot: groups by colour, all anchors solid, chain dashed. None where the check holds no curve."""
    groups: dict[str, tuple[str, Bucket | None]] = {"held-out": ("c0", check.unseen), "seen": ("c1", check.seen)}
    if not check.unseen and not check.seen:
        groups = {"all prompts": ("c0", check.total)}
    groups["untrained"] = ("muted", check.untrained)
    traces: list[go.Scatter] = []
    for group, (color, bucket) in groups.items():
        if bucket and bucket.survival:
            traces.append(_survival_line(f"{group}, all anchors", color, "solid", bucket.survival))
        if bucket and bucket.replay and bucket.replay.survival:
            traces.append(_survival_line(f"{group}, chain", color, "dash", bucket.replay.survival))
    if not traces:
        return None
    caption = (
        "Share of blocks whose drafted tokens are all accepted up to that slot: over all anchors (solid), and over the"
        " anchors that decoding would visit (dashed; 1 + its sum is tau)."
    )
    y = {"title": "survival", "tickformat": ".0%", "range": [0, 1.02]}
    x = {"title": "slot of the block", "dtick": 1}
    return _figure(name, title=title, caption=caption, traces=traces, x=x, y=y, hovermode="x unified")


def thin(count: int) -> list[int]:
    """At most about MAX_POINTS indices of a curve of `count` rows, evenly spaced, the last one among them."""
    stride = -(-count // MAX_POINTS)
    return sorted({*range(0, count, stride), count - 1})


def loss_figure(runs: Sequence[Run]) -> Figure:
    """The loss of every run over its steps."""
    traces: list[go.Scatter] = []
    for place, run in enumerate(runs):
        rows = [run.steps[index] for index in thin(len(run.steps))]
        traces.append(
            go.Scatter(
                name=html.escape(run.label, quote=False),
                x=[row.step for row in rows],
                y=[row.loss for row in rows],
                mode="lines" if len(rows) > 1 else "markers",
                line={"width": 2},
                customdata=[[row.learning_rate, row.grad_norm, row.anchors_per_s] for row in rows],
                hovertemplate="step %{x}: loss %{y:.3f}<br>learning rate %{customdata[0]:.2e}<br>"
                "gradient norm %{customdata[1]:.2f}<br>%{customdata[2]:,.0f} anchors/s",
                meta={"color": SERIES[place % len(SERIES)]},
            )
        )
    return _figure(
        "loss",
        title="Training loss",
        caption="Decay-weighted cross-entropy as logged; learning rate, gradient norm and speed on hover.",
        traces=traces,
        x={"title": "step"},
        y={"title": "loss"},
        showlegend=len(runs) > 1,
    )


def slot_figure(run: Run, *, name: str, title: str) -> Figure | None:
    """Training accuracy of each slot over the steps. None where the run did not log it."""
    rows = [run.steps[index] for index in thin(len(run.steps)) if run.steps[index].accuracy_by_slot]
    if not rows:
        return None
    slots = max(len(row.accuracy_by_slot) for row in rows)
    traces = [
        go.Scatter(
            name=f"slot {slot + 1}",
            x=[row.step for row in rows],
            y=[row.accuracy_by_slot[slot] if slot < len(row.accuracy_by_slot) else None for row in rows],
            mode="lines" if len(rows) > 1 else "markers",
            line={"width": 2},
            hovertemplate="%{y:.1%}",
            meta={"ramp": slot / max(1, slots - 1)},
        )
        for slot in range(slots)
    ]
    caption = "Share of labelled anchors whose token at that slot is the target's, on the training batch of that step."
    x, y = {"title": "step"}, {"title": "accuracy", "tickformat": ".0%", "rangemode": "tozero"}
    return _figure(name, title=title, caption=caption, traces=traces, x=x, y=y, hovermode="x unified")


def speed_figure(decodes: Sequence[Decode]) -> Figure:
    """Tokens per second, plain against DFlash."""
    labels = [html.escape(decode.label, quote=False) for decode in decodes]
    bars = {"plain decoding": ("muted", [decode.plain_tokens_per_s for decode in decodes])}
    bars["DFlash"] = ("c0", [decode.tokens_per_s for decode in decodes])
    traces = [
        go.Bar(
            name=name,
            y=labels,
            x=values,
            orientation="h",
            text=["" if value is None else f"{value:,.1f}" for value in values],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{x:,.1f} tokens/s",
            meta={"color": color},
        )
        for name, (color, values) in bars.items()
        if any(value is not None for value in values)
    ]
    return _figure(
        "speed",
        title="Decode speed",
        caption="Output tokens per second of the decoding loops, same prompts for both; prefill, compiling left out.",
        traces=traces,
        x={"title": "tokens/s", "rangemode": "tozero"},
        y={"type": "category", "showticklabels": len(decodes) > 1, "automargin": True},
        barmode="group",
        bargap=0.35,
    )


def committed_figure(samples: Sequence[Sample]) -> Figure | None:
    """How many blocks committed how many tokens. None where no block was decoded."""
    counts = Counter(length for sample in samples for length in sample.accepted)
    if not counts:
        return None
    total = counts.total()
    lengths = list(range(1, max(counts) + 1))
    trace = go.Bar(
        x=lengths,
        y=[counts[length] / total for length in lengths],
        customdata=[counts[length] for length in lengths],
        hovertemplate="%{x} tokens: %{y:.1%} of blocks (%{customdata:,})<extra></extra>",
        meta={"color": "c0"},
    )
    mean = sum(length * count for length, count in counts.items()) / total
    return _figure(
        "committed",
        title="Tokens committed per block",
        caption=f"{total:,} blocks of {len(samples):,} prompts; their mean, {mean:.3f}, is tau (micro)."
        " 1 means that no drafted token was accepted.",
        traces=[trace],
        x={"title": "tokens committed by one target pass", "dtick": 1},
        y={"title": "share of blocks", "tickformat": ".0%"},
        showlegend=False,
    )
