"""What a reader of the numbers must know before he believes them."""

from collections.abc import Collection, Sequence

from dflash_jax.accept import SequenceResult

ONLY_SEEN = (
    "ONLY PROMPTS THE DRAFTER WAS TRAINED ON were checked: these numbers say nothing about new prompts. "
    "Check on a cache of other prompts"
)
UNKNOWN = "the drafter has no record of its training prompts: seen and unseen cannot be told apart"


def _departures(results: Sequence[SequenceResult]) -> str | None:
    departures = sum(result.num_departures for result in results)
    if not departures:
        return None
    tokens = sum(result.length - result.prompt_len for result in results)
    unlabelled = sum(int((~result.labelled).sum()) for result in results)
    return (
        f"{departures:,} of {tokens:,} response tokens ({departures / tokens:.1%}) are not the target's greedy ones: "
        f"slots behind them have no label ({unlabelled:,} have none, those past the texts' ends included), and replay "
        "(tau) assumes greedy text. Make the responses greedily to predict decoding"
    )


def warnings_of(results: Sequence[SequenceResult], *, trained: Collection[int] | None) -> list[str]:
    """Return what to warn of, the gravest first: only seen prompts, unknown training prompts, text that is not greedy.

    Args:
        results: what was evaluated.
        trained: prompt_hash of every prompt the drafter was trained on; None where nobody knows.
    """
    found = []
    if trained is None:
        found.append(UNKNOWN)
    elif all(result.prompt_hash in trained for result in results):
        found.append(ONLY_SEEN)
    departures = _departures(results)
    return [*found, *([departures] if departures else [])]
