"""What the `demo` command is told."""

from dataclasses import dataclass
from pathlib import Path

from dflash_jax.core import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The whole chain on SmolLM2-135M-Instruct: prompts to a checked drafter and a report, in minutes on two cores."""

    out: Path = Path("demo")
    """Folder for everything that is made; a demo that was interrupted there is continued."""
    train_prompts: int = 96
    """Training prompts, from the built-in set stdlib."""
    check_prompts: int = 12
    """Held-out prompts, from the built-in set humaneval."""
    decode_prompts: int = 4
    """Held-out prompts decoded both ways."""
    max_new_tokens: int = 96
    """Most tokens of a response."""
    steps: int = 720
    """Training steps."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("train_prompts", "check_prompts", "decode_prompts", "max_new_tokens", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: a positive number is needed")
