"""Foreign weight files to target folders: GGUF in, an ordinary Hugging Face folder out.

It promises a folder that transformers, vLLM and `dflash_jax.targets` load as it is: float32 safetensors under Hugging
Face's names, a fast tokenizer that cuts text as the original does, the chat template, stop ids, and a record of the
source's hash. What it cannot translate faithfully it refuses, with one line that names it. Imports only `core`.
"""

from dflash_jax.importer.folder import import_gguf, import_smollm2

__all__ = ["import_gguf", "import_smollm2"]
