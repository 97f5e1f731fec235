"""A tiny cache build without a model: a target's config, responses, and a forward made of whole numbers.

Run as a program it builds and kills itself again and again: `python toy_cache.py FOLDER KILLS SEED`, with the folder of
`write_inputs`; the last line tells what each kill left, and the shards of each build that was finished on the way.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dflash_jax.cache import CacheBuildConfig, build_cache
from dflash_jax.cache.features import store_features
from dflash_jax.cache.forward import Captured
from dflash_jax.cache.manifest import write_manifest
from dflash_jax.core import sha256_file

VOCAB, HIDDEN, LAYERS, CONTEXT = 97, 3, 5, 200
SINCE_2 = ("prefix_start", "prefix_len", "prompt_set")  # tensors that format_version 1 had not
FINGERPRINT = {"target_weights": "w1", "target_config": "c1", "chat_template_sha256": "t1"}
TARGET = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 7,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}


def write_responses(path, rows):
    """`rows`: (prompt_ids, response_ids) each; ids are r0, r1, ..., sets toy-0, toy-1, toy-2, toy-0, ..."""
    lines = [
        {"id": f"r{i}", "set": f"toy-{i % 3}", "prompt_ids": p, "response_ids": r, "finish": "length", "text": ""}
        for i, (p, r) in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def toy_rows(count, responses=1):
    """Sequences of 2 to 150 tokens, all different; `responses` in a row answer one prompt."""
    draw = random.Random(5)
    ids = lambda most: [draw.randrange(VOCAB) for _ in range(draw.randint(1, most))]
    if responses == 1:
        return [(ids(60), ids(90)) for _ in range(count)]
    prompts = [ids(60) for _ in range(-(-count // responses))]
    return [(prompts[i // responses], ids(90)) for i in range(count)]


def write_inputs(folder, rows):
    (folder / "target").mkdir(parents=True)
    (folder / "target" / "config.json").write_text(json.dumps(TARGET))
    write_responses(folder / "responses.jsonl", rows)


def toy_config(folder, **changes):
    defaults = {
        "target": folder / "target",
        "responses": folder / "responses.jsonl",
        "out": folder / "cache",
        "capture_layers": (1, 3),
        "position_offsets": (0, 1000),
        "tokens_per_batch": 256,
        "tokens_per_shard": 600,
    }
    return CacheBuildConfig(**defaults | changes)


def toy_capture(tokens, lengths, position_offset):
    """Small whole numbers, exact in bfloat16, that tell token, place, column and offset apart; padding gets NaN."""
    place = np.arange(tokens.shape[1])[None]
    base = (tokens * 3 + place + position_offset[:, None] // 1000) % 200
    features = (base[..., None] + np.arange(2 * HIDDEN)).astype(ml_dtypes.bfloat16)
    features[place >= lengths[:, None]] = np.nan
    return features, ((tokens * 5 + place) % VOCAB).astype(np.int32)


class ToyCapture:
    """A `Capture` made of a function of tokens, lengths and offsets; it remembers the tokens it was given."""

    def __init__(self, function, layout):
        self.function, self.layout = function, layout

    def start(self, tokens, lengths, position_offset, *, keep):
        features, next_ids = self.function(tokens, lengths, position_offset)
        return self._captured(features, next_ids), (tokens, position_offset) if keep else None

    def extend(self, memory, sources, starts, tokens):
        whole, offsets, count = memory[0][sources].copy(), memory[1][sources], tokens.shape[1]
        for row, start in enumerate(starts):
            whole[row, start : start + count] = tokens[row]
        features, next_ids = self.function(whole, starts + count, offsets)
        rows, places = np.arange(len(sources))[:, None], starts[:, None] + np.arange(count)
        return self._captured(features[rows, places], next_ids[rows, places])

    def _captured(self, features, next_ids):
        return replace(self._without_top(features, next_ids), **self._top(next_ids))

    def _top(self, next_ids):
        """The greedy token and those after it, half as likely each."""
        if not self.layout.top_k:
            return {}
        places = np.arange(self.layout.top_k)
        logprobs = np.broadcast_to(-(places + 1) * np.log(2), (*next_ids.shape, len(places)))
        ids = (next_ids[..., None] + places) % VOCAB
        return {"top_ids": ids.astype(np.int32), "top_logprobs": logprobs.astype(np.float16)}

    def _without_top(self, features, next_ids):
        if not self.layout.quantised:  # without jax, whose start would take most of the time of a build that is killed
            scales = np.zeros((*next_ids.shape, 0), ml_dtypes.bfloat16)
            return Captured(features=features.astype(self.layout.numpy_dtype), feature_scales=scales, next_ids=next_ids)
        stored, scales = store_features(jnp.asarray(features), self.layout)
        return Captured(features=np.asarray(stored), feature_scales=np.asarray(scales), next_ids=next_ids)


def build_toy(folder, *, capture=toy_capture, fingerprint=FINGERPRINT, progress=None, **changes):
    config = toy_config(folder, **changes)
    capture = ToyCapture(capture, config.feature_layout(HIDDEN))
    return build_cache(config, fingerprint=fingerprint, capture=capture, progress=progress)


def shard_bytes(cache):
    return {path.name: path.read_bytes() for path in sorted(cache.glob("*.safetensors"))}


def as_version_1(cache):
    """Rewrite a cache as format_version 1 had it."""
    manifest = json.loads((cache / "manifest.json").read_text())
    for entry in manifest["shards"]:
        path = cache / entry["file"]
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name).copy() for name in file.keys() if name not in SINCE_2}  # noqa: SIM118
        save_file(tensors, path, metadata={"format": "pt"})
        entry |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    del manifest["prompt_sets"]
    write_manifest(cache, manifest | {"format_version": 1})


def build_and_die(folder, step):
    """Build in this process, which is killed at its `step`-th call or return of any function, Python's or C's.

    Steps, not seconds: on a fast machine or a loaded one the kills fall at the same places of the build.
    """
    left = step

    def count(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)
    sys.setprofile(count)
    build_toy(folder)
    sys.setprofile(None)
    return step - left


def in_child(work):
    """Run `work()` in a fork, made before jax has threads, so that the import, which takes seconds, is paid once.

    Returns what it returned, or None if it was killed.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, str(work()).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return int(text) if text else None


def is_complete(cache):
    return (cache / "manifest.json").exists() and json.loads((cache / "manifest.json").read_text())["complete"]


def main():
    """Count only kills that left a build unfinished; when one is finished, tell its shards' bytes and begin anew."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    draw, cache = random.Random(seed), folder / "cache"
    counted = shutil.copytree(folder, folder.with_name(folder.name + "-counted"))
    steps = in_child(lambda: build_and_die(counted, 10**12))
    assert steps, "the build that was left alone failed"
    killed, finished = [], []
    while len(killed) < kills:
        last = draw.randint(1, steps)
        died = in_child(lambda last=last: build_and_die(folder, last)) is None
        if is_complete(cache):
            finished.append({path.name: sha256_file(path) for path in cache.glob("*.safetensors")})
            shutil.rmtree(cache)
        else:
            assert died, "a build that was left alone is not complete"
            killed.append(sorted(path.name for path in cache.glob("*")) if cache.exists() else [])
    sys.stdout.write(json.dumps({"killed": killed, "finished": finished}) + "\n")


if __name__ == "__main__":
    main()
