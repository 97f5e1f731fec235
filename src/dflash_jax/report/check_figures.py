"""Figures of checks, several side by side, and of comparisons."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from dflash_jax.report.check_record import Bucket, Check, Comparison
from dflash_jax.report.check_tables import BREAKDOWNS, first_offset, lettered_labels
from dflash_jax.report.check_verdict import MARGIN
from dflash_jax.report.fields import Interval
from dflash_jax.report.figures import (
    SERIES,
    Figure,
    band,
    bars,
    difference_axis,
    error_bars,
    interval_text,
    make_figure,
    named_axis,
    offset_axis,
    plain,
    points,
)
from dflash_jax.report.tables import lettered

Y_ACCEPT_LEN = {"title": "accept_len (drafted tokens)", "rangemode": "tozero"}
GROUPS = ("unseen", "seen", "all", "untrained")
MOST_NAMED = 4
"""Checks whose names fit into a legend."""
SYMBOLS = ("circle", "diamond", "square", "cross")
PATTERNS = ("", "/", ".", "x")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Series:
    """One check in a figure: its name in the legend, its colour's role, and how often the colours went round before."""

    name: str
    color: str
    cycle: int
    check: Check

    def told_apart(self, trace: Any) -> Any:
        """The trace, with a symbol or a pattern of its own where its colour is another check's too."""
        if self.cycle and trace.type == "bar":
            trace.marker.pattern = {"shape": PATTERNS[self.cycle % len(PATTERNS)]}
        elif self.cycle:
            trace.marker.symbol = SYMBOLS[self.cycle % len(SYMBOLS)]
        return trace


def _series(checks: Sequence[Check]) -> list[_Series]:
    """Each check with its name and looks; letters alone where a legend of whole names would leave no room to draw."""
    names = lettered([check.label for check in checks]) if _many(checks) else lettered_labels(checks)
    seen = [" (seen)" if check.only_seen and len(checks) > 1 else "" for check in checks]
    return [
        _Series(name=name + mark, color=_color(place), cycle=place // len(SERIES), check=check)
        for place, (name, mark, check) in enumerate(zip(names, seen, checks, strict=True))
    ]


def _many(checks: Sequence[Check]) -> bool:
    """Whether there are too many checks for their names in a legend."""
    return len(checks) > MOST_NAMED


def _color(place: int) -> str:
    return SERIES[place % len(SERIES)]


def _extra(bucket: Bucket) -> str:
    """A hover's further line: how much it is of."""
    prompts = "" if bucket.num_prompts is None else f" of {bucket.num_prompts:,} prompts"
    return f"{bucket.num_anchors:,} anchors{prompts}, token_acc {bucket.token_acc_mean:.3f}"


def _layout(checks: Sequence[Check]) -> dict[str, Any]:
    """Series side by side, named where there are several."""
    return {"showlegend": len(checks) > 1, "scattermode": "group", "barmode": "group", "bargap": 0.35}


def _notes(checks: Sequence[Check]) -> str:
    """What every caption adds: the warning of seen prompts, and where letters are named."""
    note = " A, B, ... are named under “In short”." if _many(checks) else ""
    if all(check.only_seen for check in checks):
        return f"{note} ONLY PROMPTS THE DRAFTER WAS TRAINED ON."
    if any(check.only_seen for check in checks):
        note += " (seen): ONLY PROMPTS THE DRAFTER WAS TRAINED ON."
    return note


def _groups(check: Check) -> dict[str, Bucket]:
    """The groups of prompts that a check has; `all` only where it is not one of them."""
    named = {"unseen": check.unseen, "seen": check.seen, "all": None, "untrained": check.untrained}
    if (check.seen is None) == (check.unseen is None):
        named["all"] = check.total
    return {name: bucket for name in GROUPS if (bucket := named[name])}


def _tau(bucket: Bucket) -> tuple[float, Interval | None] | None:
    """A group's tau along the chain."""
    return (bucket.replay.tau_micro, bucket.replay.tau_ci95) if bucket.replay else None


def _accept_len(bucket: Bucket) -> tuple[float, Interval | None]:
    """A group's accept_len over all anchors."""
    return bucket.accept_len_mean, bucket.accept_len_ci95


def _group_bars(
    name: str,
    checks: Sequence[Check],
    value: Callable[[Bucket], tuple[float, Interval | None] | None],
    *,
    title: str,
    caption: str,
    y: dict[str, Any],
) -> Figure | None:
    """One metric's bars by group of prompts, checks side by side."""
    traces, used = [], set()
    for series in _series(checks):
        found = {group: (value(bucket), _extra(bucket)) for group, bucket in _groups(series.check).items()}
        held = {group: (pair, extra) for group, (pair, extra) in found.items() if pair}
        used |= held.keys()
        if held:
            means, intervals = [pair[0] for pair, _ in held.values()], [pair[1] for pair, _ in held.values()]
            extras = [extra for _, extra in held.values()]
            drawn = bars(series.name, series.color, list(held), means, intervals, extras)
            traces.append(series.told_apart(drawn))
    if not traces:
        return None
    x = named_axis("prompts", [group for group in GROUPS if group in used])
    caption += _notes(checks)
    return make_figure(name, title=title, caption=caption, traces=traces, x=x, y=y, **_layout(checks))


def group_figures(checks: Sequence[Check]) -> list[Figure]:
    """accept_len over all anchors, and tau along the chain, by group of prompts."""
    caption = "Mean over all anchors (micro) with 95 % intervals over prompts: trained on (seen), held out (unseen)."
    accept_len = _group_bars(
        "groups", checks, _accept_len, title="accept_len, all anchors", caption=caption, y=Y_ACCEPT_LEN
    )
    y = {"title": "tau (tokens per target pass)", "rangemode": "tozero"}
    caption = (
        "Tokens committed per target pass, bonus included, over the blocks that decoding would visit; 1 is no gain."
    )
    tau = _group_bars("tau", checks, _tau, title="Replay tau, the chain", caption=caption, y=y)
    return [figure for figure in (accept_len, tau) if figure]


def offset_figures(checks: Sequence[Check]) -> list[Figure]:
    """accept_len by offset, and the paired differences to the smallest offset; checks side by side."""
    figures: list[Figure] = []
    offsets = sorted({offset for check in checks for offset in (*check.by_offset, *check.differences)})
    traces = [
        _bucket_points(series, {f"{offset:,}": bucket for offset, bucket in series.check.by_offset.items()})
        for series in _series(checks)
        if series.check.by_offset
    ]
    if traces:
        caption = "Mean over all anchors (micro) with 95 % intervals over prompts." + _notes(checks)
        x = offset_axis(offsets)
        title = "accept_len by offset"
        layout = _layout(checks)
        figures.append(
            make_figure("offsets", title=title, caption=caption, traces=traces, x=x, y=Y_ACCEPT_LEN, **layout)
        )
    if any(check.differences for check in checks):
        figures.append(_differences(checks, offsets))
    return figures


def _difference_points(series: _Series) -> go.Scatter:
    """One check's paired differences."""
    found = series.check.differences
    extra = [
        f"paired, to offset {first_offset(series.check):,}"
        + ("" if item.num_anchors_differing is None else f"; {item.num_anchors_differing:,} anchors differ")
        for item in found.values()
    ]
    places, means = [f"{offset:,}" for offset in found], [item.mean for item in found.values()]
    drawn = points(series.name, series.color, places, means, [item.ci95 for item in found.values()], extra)
    return series.told_apart(drawn)


def _differences(checks: Sequence[Check], offsets: Sequence[int]) -> Figure:
    """The paired differences to the smallest offset, and the margin."""
    return make_figure(
        "differences",
        title="Paired difference to the smallest offset",
        caption="The same tokens at each offset, minus the smallest one, paired; 95 % intervals over prompts."
        f" Within the band, ±{MARGIN:g} accepted tokens, the offsets agree." + _notes(checks),
        traces=[_difference_points(series) for series in _series(checks) if series.check.differences],
        x=offset_axis([offset for offset in offsets if any(offset in check.differences for check in checks)]),
        y=difference_axis(MARGIN),
        shapes=[band(-MARGIN, MARGIN, role="good")],
        **_layout(checks),
    )


def _bucket_points(series: _Series, buckets: dict[str, Bucket]) -> go.Scatter:
    """One check's accept_len over named groups."""
    means = [bucket.accept_len_mean for bucket in buckets.values()]
    intervals = [bucket.accept_len_ci95 for bucket in buckets.values()]
    extra = [_extra(bucket) for bucket in buckets.values()]
    return series.told_apart(points(series.name, series.color, list(buckets), means, intervals, extra))


def breakdown_figure(checks: Sequence[Check], kind: str) -> Figure | None:
    """accept_len by context length or by prompt set. None where no check has it."""
    word, attribute = BREAKDOWNS[kind]
    parts: list[dict[str, Bucket]] = [getattr(check, attribute) for check in checks]
    if not any(parts):
        return None
    traces = [_bucket_points(series, part) for series, part in zip(_series(checks), parts, strict=True) if part]
    axis = {"context": "tokens of context before the anchor", "sets": "prompt set"}[kind]
    x = named_axis(axis, list(dict.fromkeys(name for part in parts for name in part)))
    caption = f"Mean over all anchors (micro) by {word}, with 95 % intervals over prompts." + _notes(checks)
    title = f"accept_len by {word}"
    return make_figure(kind, title=title, caption=caption, traces=traces, x=x, y=Y_ACCEPT_LEN, **_layout(checks))


def _survival_line(name: str, color: str, dash: str, survival: Sequence[float]) -> go.Scatter:
    """One survival curve over slots 1..B-1."""
    return go.Scatter(
        name=plain(name),
        x=list(range(1, len(survival) + 1)),
        y=list(survival),
        mode="lines+markers",
        line={"dash": dash, "width": 2.5},
        marker={"size": 7},
        hovertemplate="slot %{x}: %{y:.1%}",
        meta={"color": color},
    )


def _survival_traces(group: str, color: str, bucket: Bucket | None) -> list[go.Scatter]:
    """A group's curves: all anchors solid, chain dashed."""
    traces = []
    if bucket and bucket.survival:
        traces.append(_survival_line(f"{group}, all anchors", color, "solid", bucket.survival))
    if bucket and bucket.replay and bucket.replay.survival:
        traces.append(_survival_line(f"{group}, chain", color, "dash", bucket.replay.survival))
    return traces


def survival_figure(checks: Sequence[Check]) -> Figure | None:
    """Survival by slot: groups of one check, or the main group of several. None where no check holds a curve."""
    traces: list[go.Scatter] = []
    if len(checks) == 1:
        [check] = checks
        groups: dict[str, tuple[str, Bucket | None]] = {"held-out": ("c0", check.unseen), "seen": ("c1", check.seen)}
        if not check.unseen and not check.seen:
            groups = {"all prompts": ("c0", check.total)}
        groups["untrained"] = ("muted", check.untrained)
        for group, (color, bucket) in groups.items():
            traces += _survival_traces(group, color, bucket)
    else:
        for series in _series(checks):
            drawn = _survival_traces(series.name, series.color, series.check.main)
            # Of many checks two curves each would be a thicket; every one has the first, all anchors.
            traces += map(series.told_apart, drawn[:1] if _many(checks) else drawn)
    if not traces:
        return None
    caption = "Share of blocks whose drafted tokens are all accepted up to that slot: "
    caption += (
        "over all anchors; the chain's is in the table."
        if _many(checks)
        else "over all anchors (solid), and over the anchors that decoding would visit (dashed; 1 + its sum is tau)."
    )
    caption += _notes(checks)
    y = {"title": "survival", "tickformat": ".0%", "range": [0, 1.02]}
    x = {"title": "slot of the block", "dtick": 1}
    title = "Survival by slot"
    return make_figure("survival", title=title, caption=caption, traces=traces, x=x, y=y, hovermode="x unified")


def _slot_points(series: _Series) -> go.Scatter:
    """One check's token_acc by slot."""
    slots = series.check.by_slot
    means, intervals = [slot.token_acc for slot in slots], [slot.ci95 for slot in slots]
    extra = ["" if slot.num_labelled is None else f"{slot.num_labelled:,} labelled" for slot in slots]
    places = [str(slot.slot) for slot in slots]
    return series.told_apart(points(series.name, series.color, places, means, intervals, extra))


def slot_figure(checks: Sequence[Check]) -> Figure | None:
    """token_acc by slot. None where no check has it."""
    traces = [_slot_points(series) for series in _series(checks) if series.check.by_slot]
    if not traces:
        return None
    caption = (
        "Share of labelled tokens at each slot that are right, whatever the slots before held: above survival, and"
        " no forecast of speed." + _notes(checks)
    )
    y = {"title": "token_acc", "tickformat": ".0%", "range": [0, 1.02]}
    slots = range(1, max(check.block_size for check in checks))
    x = named_axis("slot of the block", [str(slot) for slot in slots])
    title = "token_acc by slot"
    return make_figure("token_acc", title=title, caption=caption, traces=traces, x=x, y=y, **_layout(checks))


def comparison_figure(comparisons: Sequence[Comparison]) -> Figure | None:
    """The difference of accept_len, and of tau, of each comparison with its interval. None where there is none."""
    traces = []
    for place, metric in enumerate(("accept_len", "tau")):
        held = [item for item in comparisons if metric in item.metrics]
        values = [item.metrics[metric] for item in held]
        if not held:
            continue
        means, intervals = [value.difference for value in values], [value.ci95 for value in values]
        traces.append(
            go.Scatter(
                name=metric,
                y=[_arrow(item) for item in held],
                x=means,
                mode="markers",
                orientation="h",
                marker={"size": 10, "symbol": ("circle", "diamond")[place]},
                error_x=error_bars(means, intervals),
                customdata=[
                    [
                        interval_text(value.ci95),
                        f"{value.a:.3f} → {value.b:.3f}",
                        "paired" if item.paired else "not paired",
                    ]
                    for item, value in zip(held, values, strict=True)
                ],
                hovertemplate="%{x:+.3f} (%{customdata[0]})<br>%{customdata[1]}, %{customdata[2]}",
                meta={"color": _color(place)},
            )
        )
    if not traces:
        return None
    return make_figure(
        "comparison",
        title="Differences, b − a",
        caption="In tokens, with 95 % intervals over prompts: right of 0 b is better; over 0 nothing is decided.",
        traces=traces,
        x={"title": "difference (tokens)", "zeroline": True, "zerolinewidth": 2},
        y={"type": "category", "automargin": True, "autorange": "reversed"},
        scattermode="group",
    )


def _arrow(comparison: Comparison) -> str:
    """A comparison's name over two lines of an axis."""
    return f"{plain(comparison.a)}<br>→ {plain(comparison.b)}"
