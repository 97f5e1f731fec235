"""Blocks of decoded text, worked by hand."""

from dflash_jax.report.records import Sample
from dflash_jax.report.samples import cut_into_blocks, spread_by_tau


def _sample(*, pieces="", accepted=(), **changes):
    fields = {"id": "x", "prompt": "", "pieces": tuple(pieces), "accepted": accepted, "tokens_equal": True, "tau": 1.0}
    return Sample(**(fields | changes))


def test_the_drawn_example():
    blocks = cut_into_blocks(_sample(pieces="0123456", accepted=(3, 1, 2)))
    assert [block.number for block in blocks] == [0, 1, 2, 3]
    assert [[f"{text}{kind[0]}" for text, kind in block.tokens] for block in blocks] == [
        ["0p"],
        ["1d", "2d", "3t"],
        ["4t"],
        ["5d", "6t"],
    ]
    assert blocks[1].tooltip == "block 1: 3 tokens committed = 2 drafted + 1 target's own"
    assert blocks[2].tooltip == "block 2: 1 token committed = 0 drafted + 1 target's own"


def test_a_text_of_one_token_is_its_prefill():
    assert [block.number for block in cut_into_blocks(_sample(pieces="0"))] == [0]


def test_samples_are_spread_over_tau_and_unequal_ones_come_first():
    samples = [_sample(id=str(tau), tau=float(tau), tokens_equal=tau != 4) for tau in range(1, 10)]
    assert [sample.id for sample in spread_by_tau(samples, count=3)] == ["4", "6", "1"]
    assert [sample.id for sample in spread_by_tau(samples[:2], count=3)] == ["2", "1"]
