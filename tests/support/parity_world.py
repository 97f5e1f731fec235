"""A tiny world for parity: a target, prompts that a drafter was trained on and others, their responses and caches."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dflash_jax import targets, text
from dflash_jax.cache import CacheBuildConfig, build
from dflash_jax.parity import ParityConfig, parity
from dflash_jax.train import train
from support import tiny, tiny_chain

SEEN = ("a", "hello th", "0123 (ab) tho", "q.", "zz top, of", "th!", "bcd 9", "mmm a")
UNSEEN = ("x:", "k2?", "yes: no", "n o p", "(d) e", "7 8", "of th", "!!")
SEED, OTHER_SEED = 3, 99  # greedy text of seed 3 hardly repeats itself, so that it must be known to be guessed
NEW_TOKENS, STEPS, FAR = 28, 100, 65536


@dataclass(frozen=True, kw_only=True)
class World:
    """Folders and files; nobody writes into them."""

    folder: Path
    target: Path
    other: Path
    drafter: Path
    prompts: Path
    unseen: Path
    both: Path
    responses: Path

    def cache(self, name, **settings):
        """A cache of the seen prompts' responses as a real build makes it, once per name."""
        out = self.folder / f"cache-{name}"
        if not out.exists():
            target = settings.pop("target", self.target)
            defaults: dict[str, Any] = {
                "capture_layers": tiny.CAPTURE_LAYERS,
                "position_offsets": (0, 4096, FAR),
                "features": "float32",
            }
            build(
                CacheBuildConfig(target=target, responses=self.responses, out=out, **defaults | settings),
                fingerprint=targets.fingerprint(target) | text.load_tokenizer(target).fingerprint(),
            )
        return out

    def parity(self, **settings):
        """The command's JSON; by default the seen prompts' responses at three offsets through a sound engine."""
        if not settings.keys() & {"prompts", "cache"}:
            settings = {"responses": self.responses} | settings
        if "cache" not in settings:
            settings = {"position_offsets": (0, 4096, FAR)} | settings
        base: dict[str, Any] = {
            "target": self.target,
            "drafter": self.drafter,
            "max_new_tokens": NEW_TOKENS,
            "bootstrap_samples": 400,
            "margin": 0.2,  # wide, since prompts are few
        }
        return parity(ParityConfig(**base | settings))


def make_world(folder):
    """A target, 8 prompts and a drafter that knows them, about 15 s."""
    target = tiny.write_tiny_target(folder / "target", seed=SEED)
    cache = tiny_chain.make_cache(folder / "chain", target, SEEN, max_new_tokens=NEW_TOKENS)
    config = tiny_chain.train_config(
        target,
        cache,
        folder / "run",
        steps=STEPS,
        checkpoint_every=STEPS,
        sequences_per_step=len(SEEN),
        anchors_per_sequence=24,
        learning_rate=5e-3,
        adam_b2=0.95,
        init="random",
    )
    train(config)
    return World(
        folder=folder,
        target=target,
        other=tiny.write_tiny_target(folder / "other", seed=OTHER_SEED),
        drafter=folder / "run" / f"run-{STEPS}",
        prompts=folder / "chain" / "prompts.jsonl",
        unseen=tiny.write_prompts(folder / "unseen.jsonl", UNSEEN),
        both=tiny.write_prompts(folder / "both.jsonl", SEEN + UNSEEN),
        responses=folder / "chain" / "responses.jsonl",
    )
