"""Figures of training runs and of decoding."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from dflash_jax.report.fields import Interval
from dflash_jax.report.figures import SERIES, Figure, error_bars, interval_text, make_figure, plain, thin
from dflash_jax.report.run_record import HeldOut, Run, Sample
from dflash_jax.report.tables import plural

RESAMPLES = 2000


def loss_figure(runs: Sequence[Run]) -> Figure:
    """The loss of every run over its steps."""
    traces: list[go.Scatter] = []
    for place, run in enumerate(runs):
        rows = [run.steps[index] for index in thin(len(run.steps))]
        traces.append(
            go.Scatter(
                name=plain(run.label),
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
    return make_figure(
        "loss",
        title="Training loss",
        caption="Decay-weighted cross-entropy as logged; learning rate, gradient norm and speed on hover.",
        traces=traces,
        x={"title": "step"},
        y={"title": "loss"},
        showlegend=len(runs) > 1,
    )


def _hover_lines(one: HeldOut) -> list[str]:
    """What a hover says beside tau: its interval, then what else was measured."""
    known = {"macro": one.tau_macro, "accept_len": one.accept_len_mean, "token_acc": one.token_acc_mean}
    more = [f"{name} {value:.3f}" for name, value in known.items() if value is not None]
    more += [] if one.num_prompts is None else [plural(one.num_prompts, "prompt")]
    return [interval_text(one.tau_ci95), ", ".join(more)]


def _held_out_line(name: str, color: str, found: Sequence[HeldOut]) -> go.Scatter:
    """Held-out tau of one run, with intervals where they were recorded."""
    taus, intervals = [one.tau_micro for one in found], [one.tau_ci95 for one in found]
    return go.Scatter(
        name=plain(name),
        x=[one.step for one in found],
        y=taus,
        mode="lines+markers",
        line={"width": 2},
        marker={"size": 7},
        error_y=error_bars(taus, intervals),
        customdata=[_hover_lines(one) for one in found],
        hovertemplate="step %{x}: tau %{y:.3f} (%{customdata[0]})<br>%{customdata[1]}",
        meta={"color": color},
    )


def _best_star(name: str, color: str, best: HeldOut) -> go.Scatter:
    """The measurement that `best` was chosen by."""
    return go.Scatter(
        name=plain(name),
        x=[best.step],
        y=[best.tau_micro],
        mode="markers",
        marker={"size": 17, "symbol": "star"},
        hoverinfo="skip",
        meta={"color": color},
    )


def held_out_figure(runs: Sequence[Run]) -> Figure | None:
    """Held-out replay tau over the steps of every run that measured it, the best marked. None where no run did."""
    measured = [run for run in runs if run.held_out]
    if not measured:
        return None
    traces: list[go.Scatter] = []
    several = len(runs) > 1
    for place, run in enumerate(runs):
        if (best := run.best) is None:
            continue
        color = SERIES[place % len(SERIES)]
        found = run.held_out
        shown = {*thin(len(found)), found.index(best)}
        name = run.label if several else "held-out tau"
        traces.append(_held_out_line(name, color, [found[index] for index in sorted(shown)]))
        traces.append(_best_star(f"best of {run.label}" if several else f"best: step {best.step:,}", color, best))
    prompts = {one.num_prompts for run in measured for one in run.held_out if one.num_prompts is not None}
    of = plural(min(prompts), "held-out prompt") if len(prompts) == 1 else "held-out prompts"
    interval = any(one.tau_ci95 for run in measured for one in run.held_out)
    caption = f"Tokens per target pass (micro) that decoding of {of} would have committed; 1 is no gain."
    caption += " 95 % intervals over prompts." if interval else " No intervals were recorded."
    caption += " The star is RUN/best, chosen by these very prompts, so its tau is a little too high."
    return make_figure(
        "held-out",
        title="Held-out replay tau",
        caption=caption,
        traces=traces,
        x={"title": "step"},
        y={"title": "tau (tokens per target pass)"},
        showlegend=True,
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
    return make_figure(name, title=title, caption=caption, traces=traces, x=x, y=y, hovermode="x unified")


def committed_shares(samples: Sequence[Sample]) -> list[tuple[int, int, float, Interval | None]]:
    """For 1 token to the most that a block committed: blocks, their share, its 95 % interval.

    The interval is a percentile bootstrap over prompts with a fixed seed, as the check's are; None where there is one
    prompt only.
    """
    counts = [Counter(sample.accepted) for sample in samples if sample.accepted]
    lengths = range(1, max(max(count) for count in counts) + 1)
    by_prompt = np.array([[count[length] for length in lengths] for count in counts], float)
    shares = by_prompt.sum(0) / by_prompt.sum()
    intervals: list[Interval | None] = [None] * len(shares)
    if len(counts) > 1:
        draws = np.random.default_rng(0).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES)
        totals = draws @ by_prompt
        low, high = np.percentile(totals / totals.sum(1, keepdims=True), [2.5, 97.5], axis=0)
        intervals = [Interval(low=float(a), high=float(b)) for a, b in zip(low, high, strict=True)]
    blocks = [int(value) for value in by_prompt.sum(0)]
    return list(zip(lengths, blocks, map(float, shares), intervals, strict=True))


def committed_figure(samples: Sequence[Sample]) -> Figure | None:
    """How many blocks committed how many tokens. None where no block was decoded."""
    if not any(sample.accepted for sample in samples):
        return None
    rows = committed_shares(samples)
    total = sum(blocks for _, blocks, _, _ in rows)
    shares, intervals = [share for *_, share, _ in rows], [interval for *_, interval in rows]
    trace = go.Bar(
        x=[length for length, *_ in rows],
        y=shares,
        error_y=error_bars(shares, intervals),
        customdata=[[blocks, interval_text(interval)] for _, blocks, _, interval in rows],
        hovertemplate="%{x} tokens: %{y:.1%} of blocks (%{customdata[0]:,})<br>%{customdata[1]}<extra></extra>",
        meta={"color": "c0"},
    )
    mean = sum(length * blocks for length, blocks, *_ in rows) / total
    return make_figure(
        "committed",
        title="Tokens committed per block",
        caption=f"{total:,} blocks of {len(samples):,} prompts; their mean, {mean:.3f}, is tau (micro)."
        " 1 means that no drafted token was accepted. 95 % intervals are over prompts.",
        traces=[trace],
        x={"title": "tokens committed by one target pass", "dtick": 1, "autorangeoptions": {"include": [1, 4]}},
        y={"title": "share of blocks", "tickformat": ".0%", "rangemode": "tozero"},
        showlegend=False,
    )
