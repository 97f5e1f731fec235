"""The real target against transformers: SmolLM2-135M-Instruct, float32."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from dflash_jax.nn import make_screen
from dflash_jax.nn.head_screens import few_rows_for_8_bits, screened_tokens
from dflash_jax.targets import Target, describe_target, extend, load_target, next_ids, prefill

pytestmark = pytest.mark.slow

PROMPTS = [
    "The three laws of motion, found by Isaac Newton, say that",
    'def fibonacci(n: int) -> int:\n    """Return the n-th Fibonacci number; 10 gives 55."""\n',
]
NEW_TOKENS = 32
LAYERS = tuple(range(30))


@pytest.fixture(scope="module")
def target(smollm2) -> Target:
    return load_target(smollm2)


@pytest.fixture(scope="module")
def model(smollm2):
    return LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(smollm2) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


@eqx.filter_jit
def run(target, tokens, lengths, position_offset):
    """One compile for all tests of this file: every layer's features, the logits, and a cache with room to go on."""
    output = prefill(
        target, tokens, lengths=lengths, position_offset=position_offset, capture_layers=LAYERS, capacity=64
    )
    return output, jnp.einsum("bsh,vh->bsv", output.hidden, target.head), next_ids(target, output.hidden)


def run_padded(target, rows, position_offset):
    """`rows` padded to 7 x 32."""
    tokens = np.zeros((7, 32), np.int32)
    lengths = np.ones(7, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    offsets = np.zeros(7, np.int32)
    offsets[: len(rows)] = position_offset
    return run(target, jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(offsets))


def relative(got, want):
    """Largest difference over the largest value."""
    got, want = (np.asarray(side, np.float64) for side in (got, want))
    return np.abs(got - want).max() / np.abs(want).max()


def test_every_layer_and_the_logits_are_transformers(target, model, prompts):
    output, logits, greedy = run_padded(target, prompts, 0)
    for row, prompt in enumerate(prompts):
        last = []
        hook = model.model.layers[-1].register_forward_hook(lambda _, __, out, last=last: last.append(out))
        with torch.no_grad():
            theirs = model(torch.tensor([prompt]), output_hidden_states=True)
        hook.remove()
        # hidden_states[30] is what the final norm made of the last layer's output
        wanted = [*theirs.hidden_states[1:30], last[0]]
        features = np.split(np.asarray(output.features[row, : len(prompt)]), 30, axis=-1)
        for layer in LAYERS:
            assert relative(features[layer], wanted[layer][0]) < 1e-4, layer  # measured 1.9e-5
        assert relative(output.hidden[row, : len(prompt)], theirs.hidden_states[30][0]) < 1e-4
        assert relative(logits[row, : len(prompt)], theirs.logits[0]) < 1e-4  # measured 3.3e-6
        assert greedy[row, : len(prompt)].tolist() == theirs.logits[0].argmax(-1).tolist()


def test_a_screen_of_the_head_changes_no_token(target, prompts):
    output, _, greedy = run_padded(target, prompts, 0)
    screened = eqx.filter_jit(next_ids)(replace(target, screen=make_screen(target.head)), output.hidden)
    np.testing.assert_array_equal(screened, greedy)
    # and it is the screen that says so, of most of them
    hidden, own = output.hidden[0, : len(prompts[0])], greedy[0, : len(prompts[0])]
    for count in (len(prompts[0]), few_rows_for_8_bits()):
        rows = hidden[-count:]
        tokens, settled = jax.jit(lambda rows, head: screened_tokens(rows, head, make_screen(head)))(rows, target.head)
        assert settled.mean() > 0.8
        np.testing.assert_array_equal(tokens[settled], own[-count:][settled])


def test_greedy_continuations_are_transformers(target, model, prompts):
    output, _, greedy = run_padded(target, prompts, [0, 65536])
    lengths = np.array([len(prompt) for prompt in prompts])
    kv = jax.tree.map(lambda part: part[:2], output.kv)
    token = np.asarray(greedy)[np.arange(2), lengths - 1]

    @eqx.filter_jit
    def step(target, kv, token):
        output = extend(target, kv, token[:, None])
        return output.kv, next_ids(target, output.hidden)[:, 0]

    tokens = [token.tolist()]
    for _ in range(NEW_TOKENS - 1):
        kv, token = step(target, kv, jnp.asarray(token))
        tokens.append(token.tolist())
    assert kv.lengths.tolist() == (lengths + NEW_TOKENS - 1).tolist()
    for prompt, ours in zip(prompts, zip(*tokens, strict=True), strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(prompt) :]
        assert len(theirs) == NEW_TOKENS
        assert list(ours) == theirs.tolist()


def test_an_offset_changes_no_feature_and_no_token(target, prompts):
    offsets = [0, 4096, 65536, 131072, 2**20, 2**24, 2**30]
    output, _, greedy = run_padded(target, [prompts[1]] * 7, offsets)
    length = len(prompts[1])
    for row in range(1, 7):
        for layer, (far, near) in enumerate(
            zip(*(np.split(np.asarray(output.features[i, :length]), 30, axis=-1) for i in (row, 0)), strict=True)
        ):
            # measured 2.6e-6; float32 products give 3e-4 at 131072 and garbage at 2^24
            assert relative(far, near) < 1e-5, (offsets[row], layer)
        assert greedy[row, :length].tolist() == greedy[0, :length].tolist()


def test_a_description_of_smollm2(smollm2):
    told = describe_target(smollm2)
    assert told["num_parameters"] == 134_515_008  # as its model card says: 135M
    assert told["default_capture_layers"]["4"] == [1, 10, 18, 27]
    assert told["kv_bytes_per_token"] == 46_080
    assert (told["num_layers"], told["num_heads"], told["num_kv_heads"], told["head_dim"]) == (30, 9, 3, 64)
