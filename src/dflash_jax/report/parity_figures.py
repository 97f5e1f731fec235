"""Figures of a parity."""

import plotly.graph_objects as go

from dflash_jax.report.figures import (
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
from dflash_jax.report.parity_record import Measured, Parity
from dflash_jax.report.parity_tables import link_name, sorted_links
from dflash_jax.report.tables import count

SYMBOLS = {"holds": "circle", "broken": "x", "undecided": "diamond"}
ROLES = {"holds": "good", "broken": "bad", "undecided": "warn"}
ENDS = ("none", "all")


def difference_figure(parity: Parity) -> Figure | None:
    """The paired difference at each offset, its verdict by colour and mark, and the margin as a band."""
    items = {offset: (item, item.difference) for offset, item in parity.offsets.items() if item.difference}
    if not items:
        return None
    means = [difference.mean for _, difference in items.values()]
    intervals = [difference.ci95 for _, difference in items.values()]
    trace = go.Scatter(
        x=[f"{offset:,}" for offset in items],
        y=means,
        mode="markers",
        marker={"size": 11, "symbol": [SYMBOLS[item.verdict] for item, _ in items.values()]},
        error_y=error_bars(means, intervals),
        customdata=[
            [item.verdict, interval_text(difference.ci95), f"{count(item.num_anchors_differing)} anchors differ"]
            for item, difference in items.values()
        ],
        hovertemplate="%{x}: %{customdata[0]}<br>%{y:+.3f} (%{customdata[1]})<br>%{customdata[2]}<extra></extra>",
        meta={"colors": [ROLES[item.verdict] for item, _ in items.values()]},
    )
    caption = "The engine's accept_len minus the reference's, on the same anchors; 95 % intervals over prompts."
    caption += " Circle: holds; cross: broken; diamond: undecided."
    caption += "" if parity.margin is None else f" The band is the margin, ±{parity.margin:g} accepted tokens."
    return make_figure(
        "parity-differences",
        title="accept_len against the reference",
        caption=caption,
        traces=[trace],
        x=offset_axis(list(items)),
        y=difference_axis(parity.margin),
        shapes=[] if parity.margin is None else [band(-parity.margin, parity.margin, role="good")],
        showlegend=False,
    )


def drift_figure(parity: Parity) -> Figure | None:
    """How far features and drafter move with the offset, on a log axis. None where nothing moved."""
    traces = []
    for name, color, symbol, attribute in (
        ("target's features", "c0", "circle", "feature_drift"),
        ("drafter's output", "c1", "diamond", "drafter_drift"),
    ):
        moved = {offset: value for offset, item in parity.offsets.items() if (value := getattr(item, attribute))}
        agreement = [parity.offsets[offset].argmax_agreement for offset in moved]
        if not moved:
            continue
        traces.append(
            go.Scatter(
                name=name,
                x=[f"{offset:,}" for offset in moved],
                y=list(moved.values()),
                mode="markers",
                marker={"size": 10, "symbol": symbol},
                customdata=["unknown" if value is None else f"{value:.4%}" for value in agreement],
                hovertemplate="%{y:.2e}<br>argmax agreement %{customdata}",
                meta={"color": color},
            )
        )
    if not traces:
        return None
    return make_figure(
        "parity-drift",
        title="Drift of the numerics",
        caption="Relative, root mean square over tokens, against the reference. Float32 rounding alone is near 1e-7"
        " to 1e-6. A drift of exactly 0 is not drawn.",
        traces=traces,
        x=offset_axis(list(parity.offsets)),
        y={"title": "relative drift", "type": "log", "exponentformat": "power"},
    )


def exchange_figures(parity: Parity) -> list[Figure]:
    """For the farthest offset that was taken apart: each link mended alone, and each spoiled alone."""
    taken = {offset: item for offset, item in parity.offsets.items() if item.swaps or item.spoils}
    if not taken:
        return []
    offset = max(taken)
    item = taken[offset]
    mended = _exchange(
        "parity-swaps",
        item.swaps,
        title=f"One link mended, at offset {offset:,}",
        caption="The engine's chain with that one link made sound. The link that brings acceptance back is to blame.",
    )
    spoiled = _exchange(
        "parity-spoils",
        item.spoils,
        title=f"One link spoiled, at offset {offset:,}",
        caption="A sound chain with that one link the engine's. The link that takes acceptance away is to blame.",
    )
    return [figure for figure in (mended, spoiled) if figure]


def _exchange(name: str, links: dict[str, Measured], *, title: str, caption: str) -> Figure | None:
    """accept_len by the link exchanged, beside that of no exchange and of all of them."""
    if not links:
        return None
    names = sorted_links(links)
    means, intervals = [links[link].mean for link in names], [links[link].ci95 for link in names]
    trace = go.Scatter(
        x=means,
        y=[link_name(link) for link in names],
        mode="markers",
        marker={"size": 11, "symbol": ["diamond" if link in ENDS else "circle" for link in names]},
        error_x=error_bars(means, intervals),
        customdata=[interval_text(interval) for interval in intervals],
        hovertemplate="%{y}<br>accept_len %{x:.3f} (%{customdata})<extra></extra>",
        meta={"colors": ["muted" if link in ENDS else "c0" for link in names]},
    )
    return make_figure(
        name,
        title=title,
        caption=f"{caption} accept_len on the same anchors of 32 prompts at most.",
        traces=[trace],
        x={"title": "accept_len", "rangemode": "tozero"},
        y={"type": "category", "automargin": True, "autorange": "reversed"},
        showlegend=False,
    )


def memory_figure(parity: Parity) -> Figure | None:
    """accept_len on seen and unseen prompts. None where the record does not tell them apart."""
    found = {"seen": parity.seen, "unseen": parity.unseen}
    groups = {name: group for name, group in found.items() if group}
    if not groups:
        return None
    means = [group.accept_len_mean for group in groups.values()]
    intervals = [group.accept_len_ci95 for group in groups.values()]
    extra = [f"{group.num_anchors:,} anchors" for group in groups.values()]
    return make_figure(
        "parity-memory",
        title="Seen and unseen prompts",
        caption="The reference's accept_len on prompts the drafter was trained on and on others; 95 % intervals over"
        " prompts.",
        traces=[bars("accept_len", "c0", list(groups), means, intervals, extra)],
        x=named_axis("prompts", list(groups)),
        y={"title": "accept_len", "rangemode": "tozero"},
        showlegend=False,
    )


def lengths_figure(parity: Parity) -> Figure | None:
    """accept_len by real context length. None where the record has none."""
    buckets = parity.by_context_length
    if not buckets:
        return None
    means = [bucket.accept_len_mean for bucket in buckets.values()]
    intervals = [bucket.accept_len_ci95 for bucket in buckets.values()]
    extra = [f"{bucket.num_anchors:,} anchors" for bucket in buckets.values()]
    return make_figure(
        "parity-lengths",
        title="accept_len by real context length",
        caption="Here the context is truly long instead of shifted: tokens before the anchor, the engine at the"
        " smallest offset. 95 % intervals over prompts.",
        traces=[points(plain(parity.label), "c0", list(buckets), means, intervals, extra)],
        x=named_axis("tokens of context before the anchor", list(buckets)),
        y={"title": "accept_len", "rangemode": "tozero"},
        showlegend=False,
    )


def parity_figures(parity: Parity) -> list[Figure]:
    """Every figure of one parity."""
    found = [difference_figure(parity), drift_figure(parity), *exchange_figures(parity), memory_figure(parity)]
    return [figure for figure in (*found, lengths_figure(parity)) if figure]
