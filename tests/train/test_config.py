from pathlib import Path

import pytest

from dflash_jax.core import InputError
from dflash_jax.train import TrainConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"--steps is 0: a positive number is needed"),
        ({"num_layers": 0}, r"--num-layers is 0: a positive number is needed"),
        ({"sequences_per_step": -1}, r"--sequences-per-step is -1: a positive number is needed"),
        ({"anchors_per_sequence": 0}, r"--anchors-per-sequence is 0: a positive number is needed"),
        ({"accumulate": 0}, r"--accumulate is 0: a positive number is needed"),
        ({"accumulate": 3}, r"--accumulate is 3, --sequences-per-step 4: make it a multiple"),
        ({"checkpoint_every": 0}, r"--checkpoint-every is 0: a positive number is needed"),
        ({"learning_rate": 0.0}, r"--learning-rate is 0.0: a number above 0 is needed"),
        ({"learning_rate": float("nan")}, r"--learning-rate is nan: a number above 0 is needed"),
        ({"clip_norm": -1.0}, r"--clip-norm is -1.0: a number above 0 is needed"),
        ({"decay_gamma": 0.0}, r"--decay-gamma is 0.0: a number above 0 is needed"),
        ({"warmup_ratio": 1.0}, r"--warmup-ratio is 1.0: a share from 0 to below 1 is needed"),
        ({"warmup_ratio": -0.1}, r"--warmup-ratio is -0.1: a share from 0 to below 1 is needed"),
        ({"weight_decay": -0.1}, r"--weight-decay is -0.1: a number from 0 up is needed"),
        ({"spike_factor": -1.0}, r"--spike-factor is -1.0: a number from 0 up is needed"),
        ({"decay_ratio": 1.0}, r"--decay-ratio is 1.0: a share from 0 to below 1 is needed"),
        ({"sampled_vocab": 0}, r"--sampled-vocab is 0: a positive number is needed"),
        ({"dpace_alpha": -0.1}, r"--dpace-alpha is -0.1: a number from 0 to 1 is needed"),
        ({"block_size": 1}, r"--block-size is 1: at least 2 are needed \(the anchor and one drafted token\)"),
    ],
)
def test_bad_number_is_named(changes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        TrainConfig(target=Path("t"), cache=Path("c"), out=Path("o"), **changes)


def test_the_smallest_of_everything_is_taken():
    TrainConfig(
        target=Path("t"), cache=Path("c"), out=Path("o"), steps=1, num_layers=1, sequences_per_step=1,
        anchors_per_sequence=1, checkpoint_every=1, warmup_ratio=0.0, weight_decay=0.0, block_size=2,
    )  # fmt: skip
