"""Our tokenizer against transformers' own on the same folder, and what a folder may lack."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken
from transformers import AutoTokenizer

from dflash_jax.core import InputError
from dflash_jax.text import Prompt, Tokenizer, load_prompts, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def reference(smollm2: Path):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A word tokenizer with a special token of every kind: 0 to 3 words, 4 to 7 specials, 8 added, not special."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for token in ("<s>", "</s>", "<free>", "<turn>"):
        backend.add_special_tokens([AddedToken(token, special=True)])
    backend.add_tokens(["<word>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {
        "bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE,
    })  # fmt: skip
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def chat(*contents: str) -> Prompt:
    roles = ["user", "assistant"]
    messages = tuple({"role": roles[index % 2], "content": content} for index, content in enumerate(contents))
    return Prompt(id="p", messages=messages, set="s")


@pytest.mark.slow
def test_humaneval_and_stdlib_encode_as_transformers_does(tokenizer: Tokenizer, reference, stdlib_prompts):
    for prompt in load_prompts("humaneval") + stdlib_prompts[:100]:
        messages = list(prompt.messages or ())
        wanted = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.encode_prompt(prompt)
        assert ids == wanted
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference.decode(ids)


@pytest.mark.slow
def test_stdlib_prompts_are_short(tokenizer: Tokenizer, stdlib_prompts):
    # Chars are capped; tokens, the template's 30 included, follow.
    longest = sorted(stdlib_prompts, key=lambda prompt: len(str(prompt.messages)))[-200:]
    assert max(len(tokenizer.encode_prompt(prompt)) for prompt in longest) < 300


def test_conversations_and_system_messages(tokenizer: Tokenizer, reference):
    for messages in (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 42"}],
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "+ 1?"},
        ],
    ):
        wanted = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_prompt(Prompt(id="p", messages=tuple(messages), set="s")) == wanted


def test_plain_text_gets_no_template(tokenizer: Tokenizer):
    assert tokenizer.encode_prompt(Prompt(id="p", prompt="The capital of France is", set="s")) == [
        504,
        3575,
        282,
        4649,
        314,
    ]


def test_smollm2s_stop_mask_and_fingerprint(tokenizer: Tokenizer, smollm2: Path):
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.mask_token_id(49152) == 16, "<empty_output>, the last of its specials"
    template = json.loads((smollm2 / "tokenizer_config.json").read_text())["chat_template"]
    assert tokenizer.fingerprint() == {
        "tokenizer_sha256": hashlib.sha256((smollm2 / "tokenizer.json").read_bytes()).hexdigest(),
        "chat_template_sha256": hashlib.sha256(template.encode()).hexdigest(),
    }


def test_pieces_hold_each_character_once(tokenizer: Tokenizer):
    text = "naïve 😀👩‍🚀 你好 12<|im_end|>"
    ids = tokenizer.encode(text)
    pieces = tokenizer.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "" in pieces, "an emoji is several tokens: only its last shows it"
    # Cut inside the emoji: nothing is lost, the broken character shows as a replacement at the end.
    cut = ids[: pieces.index("") + 1]
    assert "".join(tokenizer.pieces(cut)) == tokenizer.decode(cut, skip_special_tokens=False)
    assert tokenizer.pieces(cut)[-1].endswith("\ufffd")
    assert tokenizer.pieces([]) == []


def test_template_and_specials_of_a_folder(folder: Path):
    tokenizer = load_tokenizer(folder)
    # "[user]a" is no word of the vocabulary: 3 is <unk>.
    assert tokenizer.encode_prompt(chat("a")) == [4, 3, 7]
    # Plain text gets the first token that the tokenizer itself adds; `encode` adds nothing.
    assert tokenizer.encode_prompt(Prompt(id="p", prompt="a b", set="s")) == [4, 0, 1]
    assert tokenizer.encode("a b") == [0, 1]
    assert tokenizer.decode([4, 0, 1, 5]) == "a b"


def test_newer_folders_keep_the_template_in_a_file(folder: Path):
    (folder / "chat_template.jinja").write_text("a{% for m in messages %} {{ m.content }}{% endfor %}")
    assert load_tokenizer(folder).encode_prompt(chat("b", "c")) == [0, 1, 2]


def test_named_templates_use_the_default(folder: Path):
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    write(folder / "tokenizer_config.json", {"chat_template": named})
    assert load_tokenizer(folder).encode_prompt(chat("a")) == [2]


@pytest.mark.parametrize(
    ("generation", "stops"), [({"eos_token_id": [7, 5]}, (5, 7)), ({"eos_token_id": 7}, (7,)), ({}, (5,))]
)
def test_stop_ids_come_from_the_generation_config_first(folder: Path, generation: dict, stops: tuple):
    write(folder / "generation_config.json", generation)
    assert load_tokenizer(folder).stop_ids == stops


def test_stop_ids_without_a_generation_config(folder: Path):
    assert load_tokenizer(folder).stop_ids == (5,)
    write(folder / "tokenizer_config.json", {})
    assert load_tokenizer(folder).stop_ids == ()


def test_mask_token_is_own_then_highest_unused_special(folder: Path):
    # <turn> (7) is written by the template, <word> (8) is not special, <s> and </s> have roles.
    assert load_tokenizer(folder).mask_token_id(9) == 6
    write(folder / "generation_config.json", {"eos_token_id": [5, 6]})
    with pytest.raises(InputError, match="pass --mask-token-id"):
        load_tokenizer(folder).mask_token_id(9)
    write(folder / "tokenizer_config.json", {"mask_token": "c"})
    assert load_tokenizer(folder).mask_token_id(9) == 2


def test_mask_token_must_be_a_row_of_the_embedding(folder: Path):
    with pytest.raises(InputError, match="no unused special token among its 6 ids: pass --mask-token-id"):
        load_tokenizer(folder).mask_token_id(6)


def test_prompts_that_a_target_cannot_take(folder: Path):
    write(folder / "tokenizer_config.json", {"chat_template": "{{ raise_exception('roles must alternate') }}"})
    with pytest.raises(InputError, match="refuses prompt 'p': roles must alternate"):
        load_tokenizer(folder).encode_prompt(chat("a"))
    write(folder / "tokenizer_config.json", {"chat_template": "{{ messages[0].content"})
    with pytest.raises(InputError, match="the chat template of .* refuses prompt 'p'"):
        load_tokenizer(folder).encode_prompt(chat("a"))
    write(folder / "tokenizer_config.json", {"chat_template": "{# nothing #}"})
    with pytest.raises(InputError, match="prompt 'p' has no tokens"):
        load_tokenizer(folder).encode_prompt(chat("a"))
    write(folder / "tokenizer_config.json", {})
    assert load_tokenizer(folder).fingerprint()["chat_template_sha256"] is None
    with pytest.raises(
        InputError, match='has no chat template, which the messages of prompt .p. need: give rows of {"id"'
    ):
        load_tokenizer(folder).encode_prompt(chat("a"))


def test_folders_that_are_no_target(folder: Path):
    with pytest.raises(InputError, match="target folder is missing: .*absent"):
        load_tokenizer(folder / "absent")
    write(folder / "tokenizer_config.json", [])
    with pytest.raises(InputError, match="the target's tokenizer config is a JSON list, an object is needed"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="the target's tokenizer config is missing"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer file"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer.json"):
        load_tokenizer(folder)


def test_code_in_a_folder_is_never_run(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    target = tmp_path_factory.mktemp("hostile") / "target"
    shutil.copytree(folder, target)
    trace = target / "ran"
    (target / "tokenizer.py").write_text(f"open({str(trace)!r}, 'w')")
    config = json.loads((target / "tokenizer_config.json").read_text())
    write(target / "tokenizer_config.json", config | {"auto_map": {"AutoTokenizer": ["tokenizer.Hostile", None]}})
    load_tokenizer(target).encode_prompt(chat("a"))
    assert not trace.exists()
    # Templates are code too: the sandbox keeps them from reaching Python's own.
    write(target / "tokenizer_config.json", {"chat_template": "{{ messages.__class__.__mro__ }}"})
    with pytest.raises(InputError, match="refuses prompt 'p': access to attribute '__class__'"):
        load_tokenizer(target).encode_prompt(chat("a"))
