"""The target's tokenizer: prompts to ids as transformers would, ids back to text."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from tokenizers.decoders import DecodeStream

from dflash_jax.core import InputError, read_json, sha256_file
from dflash_jax.text.prompts import Prompt

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "sep_token", "cls_token")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A target's tokenizer, chat template and stop ids; made by `load_tokenizer`.

    It stands on the `tokenizers` library, which imports in 0.1 s: transformers' wrapper of it takes 3 to 6 s where
    torch is installed, since it pulls torch in. Only the rendering of chat templates is transformers' own.
    """

    target: Path
    """The folder it was read from."""
    backend: tokenizers.Tokenizer
    chat_template: str | None
    """Jinja text; None where the target has none (a base model)."""
    special_tokens: Mapping[str, str]
    """Role (`bos_token`, `eos_token`, `pad_token`, ...) to token text, those that the target names."""
    stop_ids: tuple[int, ...]
    """Ids that end a response; empty where the target names none, and only a length ends it."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids.

        Messages go through the chat template and end where the assistant is to speak. Plain text gets no template, only
        what the tokenizer itself puts around any text (a first token in some families).

        Raises:
            InputError: messages for a target without a chat template or refused by it, or a prompt without a token.
        """
        if prompt.prompt is not None:
            ids = self.backend.encode(prompt.prompt, add_special_tokens=True).ids
        else:
            ids = self.encode(self.render(prompt))
        if not ids:
            raise InputError(f"prompt {prompt.id!r} has no tokens: remove it or give it some text")
        return ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text as it stands, with nothing put around it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return each token's own part of the text, special tokens included.

        A character spread over several tokens appears whole at the last of them, and the others give "":

            ids     "caf" | first byte of é | second byte of é
            pieces  "caf" | ""              | "é"

        The parts joined are `decode(ids, skip_special_tokens=False)`; what an unfinished last character leaves goes to
        the last token.
        """
        stream = DecodeStream(skip_special_tokens=False)
        parts = [stream.step(self.backend, int(token_id)) or "" for token_id in ids]
        if parts:
            parts[-1] += self.decode(ids, skip_special_tokens=False)[len("".join(parts)) :]
        return parts

    def mask_token_id(self, vocab_size: int) -> int:
        """Return the id that stands for a slot to be filled.

        The tokenizer's own mask token; else the special token of the highest id that has no other use: it is no bos,
        eos, pad, unk or stop token, and the chat template does not write it.

        Args:
            vocab_size: rows of the target's embedding; the id must be one of them.

        Raises:
            InputError: there is no such token.
        """
        if own := self.special_tokens.get("mask_token"):
            candidates = [self.backend.token_to_id(own)]
        else:
            used = set(self.special_tokens.values())
            candidates = [
                token_id
                for token_id, token in self.backend.get_added_tokens_decoder().items()
                if token.special
                and token.content not in used
                and token_id not in self.stop_ids
                and token.content not in (self.chat_template or "")
            ]
        fitting = [token_id for token_id in candidates if token_id is not None and token_id < vocab_size]
        if not fitting:
            raise InputError(
                f"{self.target} has no mask token and no unused special token among its {vocab_size} ids: "
                "pass --mask-token-id with an id that never occurs in text"
            )
        return max(fitting)

    def fingerprint(self) -> dict[str, str | None]:
        """Return what tells two tokenizers apart: SHA-256 of tokenizer.json and of the template (None without one)."""
        template = None if self.chat_template is None else hashlib.sha256(self.chat_template.encode()).hexdigest()
        return {"tokenizer_sha256": sha256_file(self.target / "tokenizer.json"), "chat_template_sha256": template}

    def render(self, prompt: Prompt) -> str:
        """Return a conversation as the chat template writes it, up to where the assistant is to speak.

        Raises:
            InputError: there is no chat template, or it refuses the messages.
        """
        if self.chat_template is None:
            raise InputError(
                f"{self.target} has no chat template, which the messages of prompt {prompt.id!r} need: "
                'give rows of {"id", "prompt"} instead'
            )
        # Imported late for its 0.6 s; this module of transformers leaves torch alone. Without torch, transformers would
        # advise every user to install it.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers.utils.chat_template_utils import render_jinja_template

        variables: dict[str, Any] = {"add_generation_prompt": True, **self.special_tokens}
        try:
            texts, _ = render_jinja_template(
                conversations=[list(prompt.messages or ())], chat_template=self.chat_template, **variables
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template of {self.target} refuses prompt {prompt.id!r}: {error}") from error
        return texts[0]


def load_tokenizer(target: Path) -> Tokenizer:
    """Read the tokenizer of a target folder. No code from the folder is ever run.

    Raises:
        InputError: the folder, its tokenizer.json or tokenizer_config.json is missing or not readable.
    """
    if not target.is_dir():
        raise InputError(f"target folder is missing: {target}")
    path = target / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{target} has no tokenizer.json: save the target's fast tokenizer into it")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} is not a tokenizer file: {error}") from error
    config = _read_object(target / "tokenizer_config.json", what="the target's tokenizer config")
    special_tokens = {
        role: value["content"] if isinstance(value, dict) else value for role in _ROLES if (value := config.get(role))
    }
    return Tokenizer(
        target=target,
        backend=backend,
        chat_template=_chat_template(target, config),
        special_tokens=special_tokens,
        stop_ids=_stop_ids(target, backend, special_tokens),
    )


def _read_object(path: Path, *, what: str) -> dict[str, Any]:
    value = read_json(path, what=what)
    if not isinstance(value, dict):
        raise InputError(f"{what} is a JSON {type(value).__name__}, an object is needed: {path}")
    return value


def _chat_template(target: Path, config: dict[str, Any]) -> str | None:
    """The template: a file of its own in newer folders, else in the config (a text, or a list of named ones)."""
    file = target / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _stop_ids(target: Path, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> tuple[int, ...]:
    """The generation config's eos ids, else the tokenizer's eos token: what transformers' generate stops at."""
    path = target / "generation_config.json"
    eos = _read_object(path, what="the target's generation config").get("eos_token_id") if path.is_file() else None
    if eos is None and "eos_token" in special_tokens:
        eos = backend.token_to_id(special_tokens["eos_token"])
    ids = eos if isinstance(eos, list) else [eos]
    return tuple(sorted({token_id for token_id in ids if token_id is not None}))
