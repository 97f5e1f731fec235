"""A GGUF file opened for reading: typed metadata and tensors, with errors that name the file and the key."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGUFReader
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from jaxtyping import Float

from dflash_jax.core import InputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """An open GGUF file. Tensors stay in the file (memory-mapped) until they are dequantised."""

    path: Path
    metadata: Mapping[str, Any]
    """GGUF key to plain Python value; arrays are lists."""
    tensors: Mapping[str, ReaderTensor]
    """GGUF tensor name to its still quantised data."""

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return a metadata value of an exact type (a GGUF bool is no int).

        Args:
            key: the GGUF key.
            kind: the Python type it must have.
            default: what a missing key means; None makes the key required.

        Raises:
            InputError: the key is missing and required, or has another type.
        """
        value = self.metadata.get(key, default)
        if value is None:
            raise InputError(f"{self.path} lacks the GGUF key {key}, which an import needs")
        if type(value) is not kind:
            raise InputError(f"{self.path}: GGUF key {key} is a {type(value).__name__}, {kind.__name__} is needed")
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in numpy's order; GGUF lists the fastest axis first."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def dequantized(self, name: str) -> Float[np.ndarray, "..."]:
        """Return one tensor in float32.

        Raises:
            InputError: its quantisation has no decoder in the gguf package.
        """
        tensor = self.tensors[name]
        try:
            return dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise InputError(
                f"{self.path}: tensor {name} is {kind}, which cannot be dequantised; use another file"
            ) from error


def open_gguf(path: Path) -> GgufFile:
    """Open a GGUF file and read its metadata (seconds: vocabularies are long).

    Raises:
        InputError: the file is missing, is not GGUF, is cut short, or is one part of several.
    """
    if not path.is_file():
        raise InputError(f"GGUF file is missing: {path}")
    # The reader logs what it also raises; our one line is enough.
    logging.getLogger("gguf.gguf_reader").setLevel(logging.CRITICAL)
    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        # A file cut short shows as whatever numpy says of the missing bytes.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a GGUF file, or is truncated ({reason}): fetch it again") from error
    if metadata.get("split.count", 1) > 1:
        raise InputError(f"{path} is one of {metadata['split.count']} parts: join them with llama-gguf-split --merge")
    return GgufFile(path=path, metadata=metadata, tensors={tensor.name: tensor for tensor in reader.tensors})
