"""speculators' own DFlash model, in a process of its own: `speculators_reader` replaces its package by an empty one.

python speculators_drafter.py JOB...      one process for all: its imports take ten seconds

draft:FOLDER:INPUTS.npz:OUT.npz    logits of a checkpoint, loaded as its users do
convert:FOLDER:TARGET:OUT          z-lab's layout by its own converter
"""

import os
import sys

import numpy as np
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


def draft(folder, inputs, out):
    """Logits of every block: [anchor, block, vocab]. Anchors are what their model would have drawn at random."""
    from speculators.models.dflash import DFlashSpeculatorConfig, core

    config = DFlashSpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = core.DFlashDraftModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    given = {name: torch.from_numpy(value) for name, value in np.load(inputs).items()}
    anchors, tokens = given["anchors"], given["token_ids"][None]
    setattr(core, "select_anchors", lambda *_: (anchors, torch.ones(len(anchors), dtype=torch.bool)))  # noqa: B010
    seq = tokens.shape[1]
    with torch.inference_mode():
        logits = model._backbone_forward(
            given["features"][None],
            tokens,
            torch.ones(1, seq, dtype=torch.long),
            torch.zeros(1, seq, model.hidden_size),
            torch.zeros(1, seq, dtype=torch.long),
            max_anchors=len(anchors),
        )[1]
    np.savez(out, logits=logits.reshape(len(anchors), model.block_size, -1).numpy())


def convert(folder, target, out):
    """Let speculators make its own layout of z-lab's."""
    from speculators.convert.dflash.converter import DFlashConverter

    DFlashConverter().convert(folder, out, base_model=target, validate=False)


if __name__ == "__main__":
    for job in sys.argv[1:]:
        name, *arguments = job.split(":")
        {"draft": draft, "convert": convert}[name](*arguments)
