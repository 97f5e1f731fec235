"""What is read of a drafter's training, and when it counts as memorisation."""

import json

import pytest

from dflash_jax.core import InputError, write_json
from dflash_jax.parity.memory import Training, memory_cause, read_training


def group(mean, low, high, *, token_acc=0.5):
    return {
        "accept_len_mean": mean,
        "accept_len_ci95": [low, high],
        "token_acc_mean": token_acc,
        "num_prompts": 9,
    }


def test_a_run_s_record_and_curve(tmp_path):
    drafter = tmp_path / "run" / "run-14"
    drafter.mkdir(parents=True)
    assert read_training(drafter) == Training()
    write_json(drafter / "record.json", {"trained_prompt_hashes": ["000000000000000a", "ff"], "step": 14})
    assert read_training(drafter) == Training(prompts=frozenset({10, 255}), step=14, token_acc=None)
    rows = [{"step": step, "accuracy": 0.1 * (step > 4) + 0.4 * (step > 14)} for step in range(1, 21)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # steps 5 to 14; what came after this checkpoint does not count
    assert read_training(drafter).token_acc == pytest.approx(0.1)


def test_a_record_that_is_none(tmp_path):
    (tmp_path / "record.json").write_text("[1]")
    with pytest.raises(InputError, match="^the drafter's record is a JSON list, an object is needed: "):
        read_training(tmp_path)


@pytest.mark.parametrize(
    ("seen", "unseen", "memorised"),
    [
        (group(3.0, 2.5, 3.5), group(0.2, 0.1, 0.3), True),
        (group(3.0, 2.5, 3.5), group(1.0, 0.6, 1.3), False),  # its interval reaches half of theirs
        (group(3.0, 2.5, 3.5), group(2.6, 2.4, 2.8), False),
        (group(3.0, 0.2, 3.5), group(0.2, 0.1, 0.3), False),  # too few seen prompts to say
        (group(3.0, 2.5, 3.5), None, False),
        (None, None, False),
    ],
)
def test_seen_and_unseen_prompts_apart(seen, unseen, memorised):
    found = memory_cause(seen, unseen, Training(token_acc=1.0, step=5))
    assert (found.cause_id == "memorisation") is memorised
    assert bool(found.evidence) is memorised


@pytest.mark.parametrize(
    ("training", "memorised"),
    [
        (Training(step=5, token_acc=0.9), True),
        (Training(step=5, token_acc=0.5), False),
        (Training(step=5), False),  # no curve
        (Training(), False),  # a foreign drafter
    ],
)
def test_unseen_prompts_against_the_curve(training, memorised):
    found = memory_cause(None, group(0.4, 0.3, 0.5, token_acc=0.3), training)
    assert (found.cause_id == "memorisation") is memorised
    if memorised:
        assert found.sentence is not None
        assert "training 0.900, unseen 0.300" in found.sentence
