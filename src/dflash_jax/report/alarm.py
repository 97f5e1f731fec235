"""What must not be overlooked: one box above everything else, however many records it concerns."""

from collections.abc import Sequence
from dataclasses import dataclass

from dflash_jax.report.check_tables import lettered_labels
from dflash_jax.report.records import Records
from dflash_jax.report.tables import plural

LEAD = "Only prompts the drafter was trained on were measured"
FLAG = "only prompts it was trained on"
"""The short form, beside the name of a record concerned."""

MOST_IN_A_SENTENCE = 3
MEMORY = (
    " The numbers show what it remembers; they say nothing about new prompts. Check it on a cache of other prompts"
    " before believing any of them."
)
PARITY = " Parity itself may be read off them; how much is accepted may not"


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """The box: a headline, what it means, and the names of the records concerned where a sentence cannot hold them."""

    lead: str
    text: str
    items: tuple[str, ...] = ()


def _of_checks(records: Records) -> list[str]:
    """The checks concerned, each named as elsewhere on the page, with how much it measured."""
    named = zip(lettered_labels(records.checks), records.checks, strict=True)
    return [_named("check", name, check.total.num_prompts) for name, check in named if check.only_seen]


def _of_parities(records: Records) -> list[str]:
    """The parities concerned, likewise."""
    return [_named("parity", item.label, item.num_prompts) for item in records.parities if item.only_seen]


def _named(kind: str, name: str, num_prompts: int | None) -> str:
    return f"{kind} of {name}" + ("" if num_prompts is None else f" ({plural(num_prompts, 'prompt')})")


def _joined(names: Sequence[str]) -> str:
    """Names in a sentence: `the a, the b and the c`."""
    with_article = [f"the {name}" for name in names]
    return " and ".join(filter(None, (", ".join(with_article[:-1]), with_article[-1])))


def _share(concerned: int, records: Records) -> str:
    """How many of the records that could be concerned are; nothing where there is one."""
    kinds = [kind for kind, found in (("checks", records.checks), ("parities", records.parities)) if found]
    whole = len(records.checks) + len(records.parities)
    if whole == 1:
        return ""
    words = " and ".join(kinds)
    return f", in all {whole} {words}" if concerned == whole else f", in {concerned} of {whole} {words}"


def seen_alarm(records: Records) -> Alarm | None:
    """The box that names every record whose measured prompts are all among those that its drafter was trained on.

    None where there is none. Up to three are named in a sentence, more in a list.
    """
    checks, parities = _of_checks(records), _of_parities(records)
    concerned = parities + checks  # the order of the page
    if not concerned:
        return None
    lead = LEAD + _share(len(concerned), records)
    remembered = f"{PARITY}: the numbers show what the drafter remembers." if not checks else MEMORY
    caveat = f"{PARITY}." if checks and parities else ""
    if len(concerned) > MOST_IN_A_SENTENCE:
        text = f"In these, every prompt measured is among those that the drafter was trained on.{remembered}{caveat}"
        return Alarm(lead=lead, text=text, items=tuple(concerned))
    text = f"Every prompt measured in {_joined(concerned)} is among those that the drafter was trained on."
    return Alarm(lead=lead, text=f"{text}{remembered}{caveat}")
