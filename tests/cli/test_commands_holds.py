"""What an exit code of 1 stands for, where the rule is more than a flag."""

from dflash_jax.cli.commands import _tokens_equal

EXPLAINED, NOT_EXPLAINED = {"explained": True}, {"explained": False}


def test_flips_of_bfloat16_hold_only_where_each_is_told_and_explained():
    def told(*flips, dtype="bfloat16", equal=False):
        return {"dtype": dtype, "tokens_equal": equal, "differences": list(flips)}

    assert _tokens_equal(told(EXPLAINED, EXPLAINED))
    assert _tokens_equal(told(equal=True))
    assert not _tokens_equal(told(EXPLAINED, NOT_EXPLAINED))
    assert not _tokens_equal(told())
    assert not _tokens_equal(told(EXPLAINED, dtype="float32"))
