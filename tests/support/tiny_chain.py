"""Prompts to caches and runs on the tiny target, by the package's own commands.

Run as a program it trains and kills itself again and again:
`python tiny_chain.py TARGET CACHE HELD_OUT FOLDER KILLS SEED`.
"""

import json
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax

from dflash_jax import targets, text
from dflash_jax.cache import CacheBuildConfig, build
from dflash_jax.generate import ResponsesConfig, generate_responses
from dflash_jax.train import TrainConfig, train
from support import tiny


@contextmanager
def quick_compiles():
    """Let XLA try less: on tiny models it works longer than its code then runs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_cache(folder, target, texts, *, max_new_tokens=24, **settings):
    """Prompts, greedy responses and their cache in `folder`; returns the cache."""
    folder.mkdir(parents=True)
    prompts = tiny.write_prompts(folder / "prompts.jsonl", texts)
    responses = folder / "responses.jsonl"
    generate_responses(
        ResponsesConfig(target=target, prompts=str(prompts), out=responses, max_new_tokens=max_new_tokens)
    )
    return build_cache(folder / "cache", target, responses, **settings)


def build_cache(out, target, responses, *, position_offsets=(0,), top_k=0):
    """A cache of responses that are there already, with float32 features; returns it."""
    config = CacheBuildConfig(
        target=target,
        responses=responses,
        out=out,
        capture_layers=tiny.CAPTURE_LAYERS,
        position_offsets=position_offsets,
        features="float32",
        top_k=top_k,
    )
    build(config, fingerprint=targets.fingerprint(target) | text.load_tokenizer(target).fingerprint())
    return out


def train_config(target, cache, out, **changes):
    """A run of seconds; `changes` replaces any of it."""
    settings = {
        "steps": 12,
        "block_size": 5,
        "num_layers": 2,
        "sequences_per_step": 3,
        "anchors_per_sequence": 7,
        "learning_rate": 3e-3,
        "checkpoint_every": 4,
    }
    return TrainConfig(target=target, cache=cache, out=out, **settings | changes)


def main():
    target, cache, held_out, folder = map(Path, sys.argv[1:5])
    kills, draw = int(sys.argv[5]), random.Random(int(sys.argv[6]))
    settings = {"num_layers": 1, "steps": 40, "checkpoint_every": 2, "keep": 3, "eval_every": 6}

    def fork(out, *, resume):
        # fork before jax has threads: the import, which takes seconds, is paid once
        child = os.fork()
        if child == 0:
            with quick_compiles():
                train(train_config(target, cache, out, eval_cache=held_out, resume=resume, **settings))
            os._exit(0)
        return child

    def finish(out, *, resume):
        assert os.waitpid(fork(out, resume=resume), 0)[1] == 0

    def steps(name):
        return sorted(int(path.name.removeprefix("run-")) for path in (folder / "killed").glob(name))

    def newest():
        return max(steps("run-*"), default=0)

    finish(folder / "whole", resume=False)
    seen = []
    for kill in range(kills):
        child = fork(folder / "killed", resume=kill > 0)
        # the first is killed before it has any state, the others in the middle of writing or somewhat later
        wanted = newest() + 2 * draw.randint(1, 4) if kill else 0
        while not (folder / "killed" / "config.json").exists() or newest() < wanted:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was to be killed"
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1) if kill else 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states = steps("state/*[0-9]") if kill else []
        seen.append({"newest": newest(), "drafters": steps("run-*"), "states": states})
    finish(folder / "killed", resume=True)
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main()
