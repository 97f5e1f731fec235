import pytest

from dflash_jax.nn import Llama3Scaling, YarnScaling, read_rope, scaling_to_json

LLAMA3 = {"factor": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {
    "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "theta", "scaling"),
    [
        ({"rope_theta": 5000}, 5000.0, None),
        ({"rope_theta": 5000, "rope_scaling": None, "rope_parameters": None}, 5000.0, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, 7e5, None),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 7e5}}, 7e5, None),
        # gpt-oss as OpenAI ships it (transformers 4), then as transformers 5 writes it
        (
            {"rope_theta": 150000, "rope_scaling": {"rope_type": "yarn", **YARN}},
            150000.0,
            YarnScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 150000.0, **YARN, "attention_factor": 1.2}},
            150000.0,
            YarnScaling(factor=32.0, original_max_position_embeddings=4096, truncate=False, attention_factor=1.2),
        ),
        # keys left out take transformers' defaults; `type` is the older spelling
        (
            {
                "rope_theta": 1e6,
                "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
            },
            1e6,
            YarnScaling(
                factor=4.0, original_max_position_embeddings=32768, beta_fast=32.0, beta_slow=1.0, truncate=True
            ),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", **LLAMA3},
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
            },
            5e5,
            Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        ),
    ],
)
def test_settings_of_either_transformers(raw, theta, scaling):
    assert read_rope(raw) == (theta, scaling, [])


@pytest.mark.parametrize("scaling", [{"rope_type": "llama3", **LLAMA3}, {"rope_type": "yarn", **YARN}])
def test_what_is_written_is_what_was_read(scaling):
    assert scaling_to_json(read_rope({"rope_theta": 1e4, "rope_scaling": scaling})[1]) == scaling


def change(kind, changes):
    base = {"llama3": LLAMA3, "yarn": YARN}[kind]
    return {"rope_type": kind} | {key: value for key, value in (base | changes).items() if value is not ...}


@pytest.mark.parametrize(
    ("raw", "problems"),
    [
        ({}, ["rope_theta is missing"]),
        ({"rope_theta": -1.0}, ["rope_theta is -1.0, a number above 1 is needed"]),
        ({"rope_theta": "big"}, ["rope_theta is 'big', a number above 1 is needed"]),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            ["rope_scaling.rope_type is 'linear'; handled: default, llama3, yarn"],
        ),
        ({"rope_theta": 1e4, "rope_scaling": "yarn"}, ["rope_scaling is 'yarn', an object is needed"]),
        ({"rope_theta": 1e4, "rope_scaling": {"factor": 2.0}}, ["rope_scaling.factor is 2.0"]),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["rope_parameters.partial_rotary_factor is 0.5"],
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.25}, ["partial_rotary_factor is 0.25"]),
        (
            {"rope_theta": 1e4, "rope_scaling": change("llama3", {"factor": ..., "high_freq_factor": "x"})},
            ["rope_scaling.factor is missing", "rope_scaling.high_freq_factor is 'x', a number above 0 is needed"],
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": change("llama3", {"high_freq_factor": 1.0})},
            ["rope_scaling: high_freq_factor 1 is not above low_freq_factor 1"],
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": change("yarn", {"factor": 0.5, "truncate": 1, "mscale": 1.0})},
            [
                "rope_scaling.factor is 0.5, a number of at least 1 is needed",
                "rope_scaling.mscale is 1.0",
                "rope_scaling.truncate is 1, true or false is needed",
            ],
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": change("yarn", {"original_max_position_embeddings": 0})},
            ["rope_scaling.original_max_position_embeddings is 0, a positive whole number is needed"],
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": change("yarn", {"beta_fast": 1.0})},
            ["rope_scaling: beta_fast 1 is not above beta_slow 1"],
        ),
        (
            {
                "rope_theta": 1e4,
                "rope_scaling": change("yarn", {}),
                "rope_parameters": change("yarn", {"factor": 16.0, "rope_theta": 1e4}),
            },
            ["rope_scaling and rope_parameters differ"],
        ),
    ],
)
def test_what_is_not_handled_is_named(raw, problems):
    assert read_rope(raw)[2] == problems
