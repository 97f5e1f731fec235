"""A tiny target folder and drafters for it: random weights, no download, everything a command needs, seconds on a CPU.

Sizes differ, so that a swapped axis fails: 5 layers, hidden 24, 4 heads on 2 of 6 channels; the drafter has 6 heads on
3 of 10 channels.
"""

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dflash_jax.core import save_tensors, write_json
from dflash_jax.drafter import Drafter, DrafterConfig, draft_blocks, init_drafter
from dflash_jax.targets import Target, load_target, prefill, read_target_config, tensor_shapes
from dflash_jax.text import load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>", "<spare>"]
# The last three are "é", U+2028 and U+0085 as byte-level BPE spells them: a text that is not ASCII, and two characters
# that Python counts as line ends and JSON lines do not.
TOKENS = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz0123456789.,:()?!", "Ġ", "Ċ", "th", "Ã©", "âĢ¨", "Âħ"]
MERGES = [("t", "h")]
STOP_ID, MASK_ID = SPECIAL.index("</s>"), SPECIAL.index("<spare>")
CONTEXT = 160
TARGET_SEED = 5  # its greedy text varies, holds U+2028, and sometimes stops
CAPTURE_LAYERS = (1, 3)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "rms_norm_eps": 3e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": STOP_ID,
    "pad_token_id": 0,
}


def _save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES, unk_token=SPECIAL[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": TEMPLATE,
        },
    )


def write_tiny_target(folder: Path, *, seed: int = 0, **changes: object) -> Path:
    """Make a target folder; weights are large enough that greedy text varies, and differ by seed.

    `changes` replace fields of its config.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG | changes)
    write_json(folder / "generation_config.json", {"eos_token_id": [STOP_ID], "pad_token_id": 0})
    _save_tokenizer(folder)
    draw = np.random.default_rng(seed)
    # In an order of our own, layer by layer with the norms last: the texts that tests know hang on it.
    shapes = sorted(
        tensor_shapes(read_target_config(folder)).items(),
        key=lambda item: (int(item[0].split(".")[2]), len(item[1]) == 1) if ".layers." in item[0] else (-1, False),
    )
    weights = {
        name: draw.uniform(0.5, 1.5, shape) if len(shape) == 1 else draw.normal(0, 0.3, shape) for name, shape in shapes
    }
    save_tensors(folder / "model.safetensors", {name: value.astype(np.float32) for name, value in weights.items()})
    return folder


def write_prompts(path: Path, texts: Sequence[str]) -> Path:
    """Prompts p0, p1, ... of plain text, as JSON lines."""
    rows = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_drafter_config(*, attention_bias: bool = False, block_size: int = 5, **changes: object) -> DrafterConfig:
    """A drafter for the tiny target: 2 layers, no size in common with the target but those that must be."""
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 29,
        "num_layers": 2,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 10,
        "attention_bias": attention_bias,
        "rms_norm_eps": 1e-5,
        "rope_theta": 7000.0,
        "max_positions": CONTEXT,
        "block_size": block_size,
        "mask_token_id": MASK_ID,
        "capture_layers": CAPTURE_LAYERS,
        "num_target_layers": 5,
        "vocab_size": len(TOKENS),
    }
    return DrafterConfig(**sizes | changes)  # pyright: ignore[reportArgumentType]


def random_drafter(config: DrafterConfig, *, seed: int = 1, scale: float = 0.2, norm_spread: float = 0.6) -> Drafter:
    """A drafter in which every tensor matters: matrices 10 times the usual size, norms and biases around 1."""
    skeleton = eqx.filter_eval_shape(lambda: init_drafter(config, key=jax.random.key(0)))
    draw = np.random.default_rng(seed)

    def weight(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = (
            draw.normal(0, scale, leaf.shape)
            if len(leaf.shape) == 2
            else draw.uniform(1 - norm_spread, 1 + norm_spread, leaf.shape)
        )
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map(weight, skeleton)


def memorised_drafter(target_folder: Path, prompts: Sequence[Sequence[int]], *, steps: int, length: int) -> Drafter:
    """A drafter fitted to the target's own greedy text after some prompts, so that it is often right and often wrong.

    The loop is plain on purpose: decoding is tested with a drafter that does not come from our trainer.
    """
    target = load_target(target_folder)
    config = tiny_drafter_config()
    tokens, features, labels = greedy_sequences(target, prompts, length=length)
    anchors = jnp.arange(1, length - config.block_size, 2, dtype=jnp.int32)

    # One vector of all weights: an optimizer over 27 arrays would take most of the compile time.
    start, unravel = ravel_pytree(random_drafter(config, seed=3, scale=0.02, norm_spread=0.0))

    def loss(weights: jax.Array) -> jax.Array:
        drafter = unravel(weights)

        def one(features: jax.Array, token_ids: jax.Array, next_ids: jax.Array) -> jax.Array:
            hidden = draft_blocks(
                drafter,
                target.embed_tokens,
                features,
                token_ids,
                anchors,
                block_lengths=jnp.full_like(anchors, config.block_size),
                block_size=config.block_size,
                position_offset=jnp.int32(0),
            )
            wanted = next_ids[anchors[:, None] + jnp.arange(config.block_size - 1, dtype=jnp.int32)[None]]
            scores = jax.nn.log_softmax(hidden @ target.head.T)
            return -jnp.take_along_axis(scores, wanted[..., None], axis=-1)

        return jax.vmap(one)(features, tokens, labels).mean()

    optimizer = optax.adam(3e-3)

    def step(carry, _):
        weights, moments = carry
        updates, moments = optimizer.update(jax.grad(loss)(weights), moments)
        return (weights + updates, moments), None

    # Compiling takes longer than running: let XLA try less.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0], compiler_options=quick)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its int32 count
        return unravel(run((start, optimizer.init(start)))[0])


def greedy_sequences(
    target: Target, prompts: Sequence[Sequence[int]], *, length: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts continued greedily to `length` tokens by recomputing everything for each; tokens, features, next ids."""
    tokens = np.zeros((len(prompts), length), np.int32)
    sizes = np.array([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    zeros = jnp.zeros(len(prompts), jnp.int32)
    forward = jax.jit(
        lambda t: prefill(target, t, lengths=zeros + length, position_offset=zeros, capture_layers=CAPTURE_LAYERS)
    )
    for end in range(int(sizes.min()), length):
        following = np.argmax(np.asarray(forward(jnp.asarray(tokens)).hidden[:, end - 1] @ target.head.T), axis=-1)
        tokens[:, end] = np.where(end < sizes, tokens[:, end], following)
    out = forward(jnp.asarray(tokens))
    return jnp.asarray(tokens), out.features, jnp.argmax(out.hidden @ target.head.T, axis=-1).astype(jnp.int32)


TEXTS = ("a", "hello th", "0123 (ab) tho", "q.", "zz top, of", "x:", "th!", "n o p q r s t u v w x y z 0 1 2 3 4 5 6")
"""Prompts of 1 to 40 tokens."""


@functools.cache
def tiny_target() -> Path:
    """The tiny target of this process; do not write into it."""
    return write_tiny_target(Path(tempfile.mkdtemp(prefix="tiny-target-")) / "target", seed=TARGET_SEED)


@functools.cache
def half_memorised() -> Drafter:
    """A drafter that knows the first three of `TEXTS` in part, made once per process in a few seconds."""
    tokenizer = load_tokenizer(tiny_target())
    return memorised_drafter(tiny_target(), [tokenizer.encode(text) for text in TEXTS[:3]], steps=60, length=48)
