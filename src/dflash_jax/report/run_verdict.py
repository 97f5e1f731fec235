"""A training run in plain words: how its loss went, and what held-out prompts say of its drafters."""

from dflash_jax.report.run_record import HeldOut, Run
from dflash_jax.report.sentences import Mark, Sentence, Tile, interval_words
from dflash_jax.report.tables import plural


def _training(run: Run) -> Sentence:
    """How the loss went, or where it diverged."""
    broken = next((step.step for step in run.steps if step.loss is None), None)
    if broken is not None:
        text = f"the loss of {run.label} is not finite at step {broken:,}."
        return Sentence(mark="bad", lead="Training diverged", text=text)
    first, last = run.steps[0], run.steps[-1]
    text = f"the loss of {run.label} went from {first.loss:.2f} to {last.loss:.2f} in {last.step:,} steps"
    text += f"; the last batch's accuracy is {last.accuracy:.1%}" if last.accuracy is not None else ""
    does = "held-out tau does" if run.held_out else "`dflash-jax check` does"
    text += f". A training loss says nothing about prompts not trained on: {does}."
    return Sentence(mark="info", lead="Training", text=text)


def _gains(one: HeldOut) -> bool:
    """Whether drafting is a gain, as surely as is known."""
    return (one.tau_ci95.low if one.tau_ci95 else one.tau_micro) > 1


def _held_out(run: Run) -> Sentence | None:
    """The best drafter and the last one on held-out prompts. None where nothing was measured."""
    best = run.best
    if best is None:
        return None
    last = run.held_out[-1]
    prompts = "held-out prompts" if best.num_prompts is None else plural(best.num_prompts, "held-out prompt")
    tau = f"{best.tau_micro:.3f} tokens per target pass"
    tau += f" ({interval_words(best.tau_ci95)})" if best.tau_ci95 else " (no interval was recorded)"
    text = f"on {prompts} the best drafter, of step {best.step:,}, commits {tau} where plain decoding commits 1"
    if last.step == best.step:
        text += "; it is the last one measured."
    else:
        text += f"; the last one, of step {last.step:,}, commits {last.tau_micro:.3f}."
    if len(run.held_out) > 1:
        text += " Chosen by these prompts, it is flattered by them: report numbers on others."
    return Sentence(mark="good" if _gains(best) else "warn", lead="Held-out tau", text=text)


def run_sentences(run: Run) -> list[Sentence]:
    """Everything to be said about one run."""
    return [sentence for sentence in (_training(run), _held_out(run)) if sentence]


def run_tiles(run: Run) -> list[Tile]:
    """A run's key numbers: of its last logged step, and of its best drafter."""
    last = run.steps[-1]
    loss = "not finite" if last.loss is None else f"{last.loss:.2f}"
    tiles = [
        Tile(
            name="training loss",
            value=loss,
            under=f"at step {last.step:,}",
            mark="bad" if last.loss is None else "info",
        )
    ]
    if last.accuracy is not None:
        tiles.append(Tile(name="training accuracy", value=f"{last.accuracy:.1%}", under=f"at step {last.step:,}"))
    if best := run.best:
        mark: Mark = "good" if _gains(best) else "warn"
        under = f"at step {best.step:,}" + (f", {interval_words(best.tau_ci95)}" if best.tau_ci95 else "")
        tiles.append(Tile(name="held-out replay tau, best", value=f"{best.tau_micro:.2f}", under=under, mark=mark))
    tiles.append(
        Tile(name="drafters kept", value=f"{len(run.records):,}", under=", ".join(list(run.records)[-2:]) or "none")
    )
    return tiles
