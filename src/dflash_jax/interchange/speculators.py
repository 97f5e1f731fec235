"""The layout of speculators' offline hidden states, read and written.

    DATA/state.json, data-*.arrow      an HF `datasets` folder: input_ids, loss_mask, seq_len
    HS/hs_<row>.safetensors            token_ids i64 [T], hidden_states bf16 [T, n+1, H]: n aux layers, then the last
                                       layer's output, not normed (FP8: with hidden_states_scales f32 [T, 1, 1])

**Source:** vllm-project/speculators 0.9.0 `train/data.py` (`ArrowDataset`), `data_generation/offline.py`;
hs-connectors 0.9.0 `transfer.py`, `fp8_utils.py`. Its reader warns and drops a row whose token ids differ;
ours refuses the import.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int32, UInt8
from safetensors import SafetensorError, safe_open

from dflash_jax.core import InputError, read_header, read_json, save_tensors, write_json

_ROWS_PER_BATCH = 1024
_SCALES = "hidden_states_scales"
_DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
_FLOATS = {np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32)}


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculatorsRow:
    """One row of the dataset with its hidden states.

    Attributes:
        index: row of the dataset, the number in the file's name.
        token_ids: the conversation.
        loss_mask: 1 on tokens that are trained on.
        aux: outputs of the aux layers, joined in order.
        last: output of the last layer, not normed.
    """

    index: int
    token_ids: Int32[np.ndarray, " seq"]
    loss_mask: UInt8[np.ndarray, " seq"]
    aux: Float[np.ndarray, "seq features"]
    last: Float[np.ndarray, "seq hidden"]


def from_speculators_layer(layer: int) -> int:
    """Return our id of a speculators layer id: its k is the input of layer k, which is the output of layer k - 1."""
    return layer - 1


def to_speculators_layer(layer: int) -> int:
    """Return the speculators id of the output of our layer: `k + 1`, HF's `hidden_states[k + 1]`."""
    return layer + 1


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise InputError("speculators' datasets need pyarrow: pip install 'dflash-jax[speculators]'") from error
    return pyarrow


def dataset_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a saved dataset, in order.

    Raises:
        InputError: there is no such folder, it has no state.json of the form that `datasets` writes, or that names a
            file that is not there or not in the folder.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: name speculators' data folder (the one with state.json)")
    state = read_json(folder / "state.json", what="the dataset's state.json")
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'state.json'} is not of a saved dataset: it has no _data_files") from error
    if state.get("_indices_data_files"):
        raise InputError(f"{folder} is a view of a dataset by indices: save it again with flatten_indices()")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"{folder / 'state.json'} names {name!r}, which is not a file of that folder")
    return [folder / name for name in names]


def _table_rows(path: Path) -> Iterator[tuple[list[int], list[int]]]:
    """`input_ids` and `loss_mask` of every row of an Arrow stream."""
    pyarrow = _pyarrow()
    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            missing = {"input_ids", "loss_mask"} - set(stream.schema.names)
            if missing:
                raise InputError(f"{path} has no column {sorted(missing)[0]}: it is not speculators' data")
            for batch in stream:
                for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                    part = batch.slice(start, _ROWS_PER_BATCH)
                    columns = (part.column("input_ids").to_pylist(), part.column("loss_mask").to_pylist())
                    yield from zip(*columns, strict=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Arrow stream: {error}") from error


def _integers(values: Any, *, lowest: int, highest: int, what: str) -> np.ndarray:
    """A column's list as int64, or an InputError."""
    try:
        array = np.asarray(values, np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} is not a list of whole numbers") from error
    if array.ndim != 1 or not array.size or array.min() < lowest or array.max() > highest:
        raise InputError(f"{what} is empty, nested, or holds something that is not {lowest} to {highest}")
    return array


def _tensors(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors. By hand, for safetensors' own numpy reader knows no FP8."""
    header = read_header(path, what="the hidden-states file")
    try:
        with safe_open(path, framework="numpy"):  # its strict parser makes the header trustworthy
            raw = np.fromfile(path, np.uint8)
    except SafetensorError as error:
        raise InputError(f"the hidden-states file is not readable safetensors: {path}: {error}") from error
    data, tensors = raw[8 + int(raw[:8].view("<u8")[0]) :], {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{path}: {name} is of dtype {entry['dtype']}, one of {', '.join(_DTYPES)} is needed")
        first, end = entry["data_offsets"]
        # a copy: a tensor may begin at an odd byte
        tensors[name] = data[first:end].copy().view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _hidden_states(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`token_ids` and `hidden_states` of one file."""
    tensors = _tensors(path)
    for name in ("token_ids", "hidden_states"):
        if name not in tensors:
            raise InputError(f"{path} has no tensor {name}: it is not speculators' hidden states")
    hidden = tensors["hidden_states"]
    if _SCALES in tensors and hidden.ndim == 3 and tensors[_SCALES].shape == (len(hidden), 1, 1):
        # the product in bfloat16, as hs-connectors has it
        hidden = np.multiply(hidden.astype(ml_dtypes.bfloat16), tensors[_SCALES].astype(ml_dtypes.bfloat16))
    if hidden.ndim != 3 or hidden.dtype not in _FLOATS:
        raise InputError(f"{path}: hidden_states is {hidden.dtype} {list(hidden.shape)}, floats [T, n+1, H] are needed")
    return tensors["token_ids"], hidden.astype(np.float32) if hidden.dtype == np.float16 else hidden


def read_rows(
    source: Path, hidden_states: Path, *, aux_layers: int, hidden_size: int, vocab_size: int
) -> Iterator[SpeculatorsRow | int]:
    """Give every row that has hidden states, and the number of every row that has none.

    Args:
        source: the dataset's folder.
        hidden_states: the folder of the rows' files.
        aux_layers: how many aux layers a file holds, besides the last.
        hidden_size: the target's.
        vocab_size: the target's.

    Raises:
        InputError: a file that is not what the layout asks for, or token ids that differ from the dataset's.
    """
    files = dataset_files(source)
    if not hidden_states.is_dir():
        raise InputError(f"no folder {hidden_states}: name the one with hs_0.safetensors by --hidden-states")
    index = -1
    for file in files:
        for ids, mask in _table_rows(file):
            index += 1
            path = hidden_states / f"hs_{index}.safetensors"
            if not path.exists():
                yield index
                continue
            what = f"row {index} of {source}"
            token_ids = _integers(ids, lowest=0, highest=vocab_size - 1, what=f"{what}: input_ids")
            loss_mask = _integers(mask, lowest=0, highest=1, what=f"{what}: loss_mask")
            stored_ids, hidden = _hidden_states(path)
            if not np.array_equal(stored_ids, token_ids) or len(loss_mask) != len(token_ids):
                raise InputError(f"{path}: token_ids are not the input_ids of {what}: it is of another dataset")
            if hidden.shape != (len(token_ids), aux_layers + 1, hidden_size):
                raise InputError(
                    f"{path}: hidden_states is {list(hidden.shape)}, {aux_layers} aux layers and the last one of this "
                    f"target are {[len(token_ids), aux_layers + 1, hidden_size]}: correct --aux-layers or --target"
                )
            yield SpeculatorsRow(
                index=index,
                token_ids=token_ids.astype(np.int32),
                loss_mask=loss_mask.astype(np.uint8),
                aux=hidden[:, :-1].reshape(len(token_ids), -1),
                last=hidden[:, -1],
            )


def write_dataset(folder: Path, rows: Iterator[tuple[list[int], list[int]]], *, fingerprint: str) -> int:
    """Write `input_ids` and `loss_mask` of rows as a saved dataset that gives torch tensors; return their number.

    Args:
        folder: an existing folder.
        rows: token ids and loss mask of each.
        fingerprint: 16 hexadecimal digits that name the content, as `datasets` has it.
    """
    pyarrow = _pyarrow()
    integers = pyarrow.list_(pyarrow.int64())
    value = {"dtype": "int64", "_type": "Value"}
    features = {name: {"feature": value, "_type": "List"} for name in ("input_ids", "loss_mask")} | {"seq_len": value}
    schema = pyarrow.schema(
        [("input_ids", integers), ("loss_mask", integers), ("seq_len", pyarrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    name, count = "data-00000-of-00001.arrow", 0
    with (folder / name).open("wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for ids, mask in rows:
            stream.write_batch(pyarrow.record_batch([[ids], [mask], [len(ids)]], schema=schema))
            count += 1
    write_json(
        folder / "dataset_info.json",
        {"citation": "", "description": "", "features": features, "homepage": "", "license": ""},
    )
    write_json(
        folder / "state.json",
        {
            "_data_files": [{"filename": name}],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": "torch",
            "_output_all_columns": False,
            "_split": None,
        },
    )
    return count


def write_hidden_states(
    folder: Path, row: int, token_ids: Int32[np.ndarray, " seq"], hidden: Float[np.ndarray, "seq layers hidden"]
) -> None:
    """Write one row's file."""
    tensors = {"token_ids": token_ids.astype(np.int64), "hidden_states": hidden}
    save_tensors(folder / f"hs_{row}.safetensors", tensors)
