"""The capture self-test: what goes wrong in captures, looked for on a few tokens before hours are spent on all of them.

Everything is computed by the target's own forward, operation by operation and on the build's own texts, and compared
with something that must be equal to it: the features with what the layers after them make of them, a sequence with
itself among others, under padding, at an offset.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from dflash_jax.cache.build import BuildPlan
from dflash_jax.core import InputError
from dflash_jax.nn import product
from dflash_jax.targets import Target, TargetOutput, next_ids, prefill
from dflash_jax.text import Prompt, Tokenizer

Forward = Callable[..., TargetOutput]
"""A forward with the signature of `targets.prefill`."""
Findings = dict[str, dict[str, Any]]
"""By check: `holds`, and `found`, one line for people."""

_ROWS, _TOKENS = 3, 32
_FAR = 131072  # where the build has no offset but 0
_SAMPLE = 64  # responses that are looked at for special tokens and the template
# Relative, root mean square. float32 differs by some 1e-6 from one order of sums to another, and by less than 1e-5 at
# any offset (docs/positions.md); an off-by-one, a norm or a leak by 1e-2 and more.
_BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """A few short texts of the build, right-padded with zeros; the last row is one token that nobody looks at."""

    tokens: Int32[np.ndarray, "batch seq"]
    lengths: Int32[np.ndarray, " batch"]

    @property
    def real(self) -> np.ndarray:
        """Which tokens are looked at."""
        real = np.arange(self.tokens.shape[1])[None] < self.lengths[:, None]
        real[-1] = False
        return real


def _texts(plan: BuildPlan) -> _Texts:
    """The first rows, cut to lengths that differ."""
    count = min(_ROWS, plan.responses.num_rows)
    tokens, lengths = np.zeros((count + 1, _TOKENS), np.int32), np.ones(count + 1, np.int32)
    for row in range(count):
        ids = plan.responses.tokens(row)[: _TOKENS - 9 * row]
        tokens[row, : len(ids)], lengths[row] = ids, len(ids)
    return _Texts(tokens=tokens, lengths=lengths)


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference over that of what is wanted."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.sqrt(((found - wanted) ** 2).mean() / max((wanted**2).mean(), 1e-300)))


class _Probe:
    """The target's forward on a few texts, with the features of the build's layers and of the last one."""

    def __init__(self, target: Target, plan: BuildPlan, forward: Forward) -> None:
        self.target, self.forward = target, forward
        self.layers = sorted({*(plan.config.capture_layers or ()), target.config.num_layers - 1})
        self.texts = _texts(plan)
        self.bound = _BOUNDS.get(str(target.embed_tokens.dtype), _BOUNDS["bfloat16"])
        self.output = self.run(self.texts.tokens, self.texts.lengths)

    def run(
        self,
        tokens: Int32[np.ndarray, "batch seq"],
        lengths: Int32[np.ndarray, " batch"],
        *,
        position_offset: int = 0,
    ) -> TargetOutput:
        return self.forward(
            self.target,
            jnp.asarray(tokens),
            lengths=jnp.asarray(lengths),
            position_offset=jnp.full(len(tokens), position_offset, jnp.int32),
            capture_layers=tuple(self.layers),
        )

    def columns(self, output: TargetOutput) -> list[Float[Array, "batch seq hidden"]]:
        """The features by layer."""
        return jnp.split(output.features, len(self.layers), axis=-1)

    def real(self, array: Array) -> np.ndarray:
        """What an array of every token says of those that are looked at."""
        return np.asarray(array)[self.texts.real]

    def worst(self, others: Sequence[TargetOutput]) -> float:
        """The largest difference of any features to those of the first run."""
        wanted = self.real(self.output.features)
        return max(_difference(self.real(other.features), wanted) for other in others)

    def from_features(self, index: int) -> np.ndarray:
        """What the layers after a captured one make of its features: the next captured column, or the head's input.

        They run as a target of their own, whose embedding table is the features.
        """
        rows = self.columns(self.output)[index]
        if index + 1 == len(self.layers):  # the last layer's: only the final norm is left
            return self.real(self.target.norm(rows))
        batch, seq, hidden = rows.shape
        layers = self.target.layers[self.layers[index] + 1 : self.layers[index + 1] + 1]
        part = Target(
            embed_tokens=rows.reshape(-1, hidden),
            layers=layers,
            norm=self.target.norm,
            lm_head=None,
            config=replace(self.target.config, num_layers=len(layers)),
        )
        output = prefill(
            part,
            jnp.arange(batch * seq, dtype=jnp.int32).reshape(batch, seq),
            lengths=jnp.asarray(self.texts.lengths),
            position_offset=jnp.zeros(batch, jnp.int32),
            capture_layers=(len(layers) - 1,),
        )
        return self.real(output.features)


def _within(difference: float, bound: float, text: str) -> dict[str, Any]:
    return {"holds": bool(difference <= bound), "found": f"{text} ({difference:.1e}, at most {bound:.0e})"}


def _layers(plan: BuildPlan, _: _Probe) -> dict[str, Any]:
    layers = plan.config.capture_layers or ()
    return {
        "holds": all(0 <= layer < plan.target.num_layers for layer in layers),
        "found": f"outputs of {', '.join(map(str, layers))} of 0 to {plan.target.num_layers - 1} "
        f"(Hugging Face's hidden_states {', '.join(str(layer + 1) for layer in layers)})",
    }


def _residual(_: BuildPlan, probe: _Probe) -> dict[str, Any]:
    wanted = [*probe.columns(probe.output)[1:], probe.output.hidden]
    differences = [_difference(probe.from_features(i), probe.real(each)) for i, each in enumerate(wanted)]
    return _within(max(differences), probe.bound, "residual, not normed: the layers after each column give the next")


def _offsets(plan: BuildPlan) -> list[int]:
    """Where features are compared with those at 0."""
    return [offset for offset in plan.config.position_offsets if offset] or [_FAR]


def _rope(plan: BuildPlan, probe: _Probe) -> dict[str, Any]:
    texts, offsets = probe.texts, _offsets(plan)
    outputs = [probe.run(texts.tokens, texts.lengths, position_offset=offset) for offset in offsets]
    difference, where = probe.worst(outputs), ", ".join(map(str, offsets))
    if plan.config.rope != "exact":
        return {"holds": True, "found": f"--rope {plan.config.rope} was asked for: {difference:.1e} off at {where}"}
    return _within(difference, probe.bound, f"the features at {where} are those at 0")


def _padding(_: BuildPlan, probe: _Probe) -> dict[str, Any]:
    texts = probe.texts
    real = np.arange(texts.tokens.shape[1])[None] < texts.lengths[:, None]
    noise = np.random.default_rng(0).integers(0, probe.target.config.vocab_size, texts.tokens.shape, np.int32)
    output = probe.run(np.where(real, texts.tokens, noise), texts.lengths)
    return _within(probe.worst([output]), probe.bound, "other tokens behind the texts change nothing")


def _batch(_: BuildPlan, probe: _Probe) -> dict[str, Any]:
    texts, differences = probe.texts, []
    for row in range(len(texts.tokens) - 1):
        length = texts.lengths[row]
        alone = probe.run(texts.tokens[row : row + 1], texts.lengths[row : row + 1])  # padded: one shape for all
        wanted = np.asarray(probe.output.features)[row, :length]
        differences.append(_difference(np.asarray(alone.features)[0, :length], wanted))
    return _within(max(differences), probe.bound, f"{len(differences)} texts together as each alone")


def _head(_: BuildPlan, probe: _Probe) -> dict[str, Any]:
    target = probe.target
    hidden = probe.output.hidden[:-1, 0]  # few rows: all their logits exist at once
    logits = np.asarray(product("rh,vh->rv", hidden, target.head, out=jnp.float32))
    chosen = np.take_along_axis(logits, np.asarray(next_ids(target, hidden[:, None])), axis=-1)[:, 0]
    tied = target.lm_head is None
    return {
        "holds": tied == target.config.tie_embeddings
        and bool((chosen >= logits.max(-1) - 1e-3 * np.abs(logits).max()).all()),
        "found": f"{'tied to the embedding' if tied else 'of its own'}; next_ids are its largest logits",
    }


def _mask_token(plan: BuildPlan, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"holds": True, "found": "not looked for: the target has no tokenizer.json"}
    try:
        mask = tokenizer.mask_token_id(plan.target.vocab_size)
    except InputError:
        return {"holds": True, "found": "none in the tokenizer: `train` will need --mask-token-id"}
    rows = range(min(_SAMPLE, plan.responses.num_rows))
    used = [plan.responses.name(row) for row in rows if mask in plan.responses.tokens(row)]
    if used:
        return {"holds": False, "found": f"{mask} ({tokenizer.decode([mask], skip_special_tokens=False)}) is a token "
                f"of {used[0]!r}"}  # fmt: skip
    text = tokenizer.decode([mask], skip_special_tokens=False)
    return {"holds": True, "found": f"{mask} ({text}) is in none of {len(rows)} texts"}


def _template(plan: BuildPlan, tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None or tokenizer.chat_template is None:
        return {"holds": True, "found": "the target has none"}
    try:
        rendered = tokenizer.encode_prompt(
            Prompt(id="self-test", messages=({"role": "user", "content": "a"},), set="self-test")
        )
    except InputError as error:
        return {"holds": False, "found": str(error)}
    rows = range(min(_SAMPLE, plan.responses.num_rows))
    prompts = [plan.responses.tokens(row)[: plan.responses.prompt_len[row]].tolist() for row in rows]
    # a conversation begins as the template begins one, and ends where the assistant is to speak
    used = sum(prompt[:1] == rendered[:1] and prompt[-2:] == rendered[-2:] for prompt in prompts)
    return {"holds": True, "found": f"present, written round {used} of {len(prompts)} prompts"}


def self_test_shapes(plan: BuildPlan) -> Counter[tuple[int, int]]:
    """Return how often the self-test runs the target, by rows and tokens of a forward."""
    count = min(_ROWS, plan.responses.num_rows)
    # as it is, with other padding, from its own features (the layers in turn); at every offset; each text alone
    return Counter({(count + 1, _TOKENS): 3 + len(_offsets(plan)), (1, _TOKENS): count})


def self_test(
    plan: BuildPlan, target: Target, *, tokenizer: Tokenizer | None = None, forward: Forward = prefill
) -> Findings:
    """Look for what goes wrong in captures and return what was found; some seconds, nothing is compiled as a whole.

    Args:
        plan: the build.
        target: its target.
        tokenizer: the target's; None where it has none.
        forward: the target's forward.
    """
    probe = _Probe(target, plan, forward)
    checks = {
        "capture layers": _layers,
        "residual or normed": _residual,
        "rope at the offsets": _rope,
        "padding": _padding,
        "batch of many, of one": _batch,
        "head": _head,
    }
    return {name: check(plan, probe) for name, check in checks.items()} | {
        "mask token": _mask_token(plan, tokenizer),
        "chat template": _template(plan, tokenizer),
    }


def require(findings: Findings) -> None:
    """Stop where a check does not hold.

    Raises:
        InputError: one does not; all that do not are named.
    """
    failed = [f"{name}: {finding['found']}" for name, finding in findings.items() if not finding["holds"]]
    if failed:
        raise InputError(
            f"the capture self-test failed, nothing was written: {'; '.join(failed)}: a cache built so would be wrong"
        )
