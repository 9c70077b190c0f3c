"""Safetensors files, checked before anything believes their headers."""

import json
import struct
from pathlib import Path
from typing import Any

from mlx_dpo.refusal import Refusal

_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_LARGEST_HEADER = 100_000_000  # the format's own limit


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each with a header that tells the truth about the file.

    Raises Refusal where there is none, where the index names a file that is missing, or where one is damaged.
    """
    refuse_no_folder(folder)
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise Refusal(f"{index} has no weight_map: restore it from the model's source.")
        missing = sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()})
        if missing:
            raise Refusal(f"{index} names {missing[0]}, which is not in the folder: copy the missing file.")
    if not files:
        raise Refusal(f"{folder} holds no model*.safetensors: give the folder of a converted model.")
    for file in files:
        check_safetensors(file)
    return files


def refuse_no_folder(folder: Path) -> None:
    """Raise Refusal unless there is such a folder."""
    if not folder.is_dir():
        raise Refusal(f"There is no folder {folder}: give the path of a converted model.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; Refusal names the file where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise Refusal(f"{path} is not UTF-8, as JSON has to be: restore the file from its source.") from None
    except json.JSONDecodeError as error:
        raise Refusal(f"{path} is not valid JSON ({error}): restore the file from its source.") from None
    except RecursionError:
        raise Refusal(f"{path} is nested too deeply to be what it claims: do not use this file.") from None
    if not isinstance(value, dict):
        raise Refusal(f"{path} holds no JSON object: restore the file from its source.")
    return value


def check_safetensors(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file, or raise Refusal where header and file disagree.

    Source: the format's description in the safetensors documentation: 8 bytes of length, JSON, data without gaps.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, _LARGEST_HEADER):
            raise Refusal(f"{path} is cut off or not a safetensors file: fetch it again.")
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = sorted(_span(path, name, entry) for name, entry in tensors.items())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Refusal(f"{path} has a damaged safetensors header: fetch the file again.") from None
    end = 0
    for start, stop in spans:
        if start != end:
            raise Refusal(f"{path} has a header whose tensors overlap or leave gaps: do not use this file.")
        end = stop
    if end != size - 8 - length:
        raise Refusal(f"{path} holds {size - 8 - length} bytes of data, its header says {end}: fetch it again.")
    return tensors


def _span(path: Path, name: str, entry: dict[str, Any]) -> tuple[int, int]:
    start, stop = entry["data_offsets"]
    count = 1
    for extent in entry["shape"]:
        if not isinstance(extent, int) or extent < 0:
            raise ValueError(name)
        count *= extent
    if entry["dtype"] not in _BYTES:
        raise Refusal(f"{path}: tensor {name} has the type {entry['dtype']}, which cannot be read here.")
    if stop - start != count * _BYTES[entry["dtype"]]:
        raise Refusal(f"{path}: the header lies about the size of tensor {name}: do not use this file.")
    return start, stop
