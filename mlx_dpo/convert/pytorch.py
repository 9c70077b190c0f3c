"""PyTorch weight files, read without torch and without running anything that is in them.

torch.save writes a zip: a pickle that describes the tensors, and one uncompressed member of raw numbers per storage.
The pickle here may name only the functions that rebuild tensors; the numbers are mapped from the file.
"""

import io
import math
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_dpo.models.weights import read_json
from mlx_dpo.refusal import Refusal

_STORAGES: dict[str, tuple[str, mx.Dtype | None]] = {
    "FloatStorage": ("<f4", None),
    "HalfStorage": ("<f2", None),
    "BFloat16Storage": ("<u2", mx.bfloat16),
    "DoubleStorage": ("<f8", mx.float32),
    "LongStorage": ("<i8", None),
    "IntStorage": ("<i4", None),
    "ShortStorage": ("<i2", None),
    "CharStorage": ("<i1", None),
    "ByteStorage": ("<u1", None),
    "BoolStorage": ("?", None),
}
_LARGEST_PICKLE = 64 << 20
# What the standard library raises on damaged archives, and on ones with features that torch does not use.
_BROKEN_ZIP = (
    zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError, OSError, struct.error, zlib.error,
)  # fmt: skip
_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name


class _StorageKind(NamedTuple):
    name: str


class _Storage(NamedTuple):
    """Where a storage's numbers lie in the file."""

    kind: str
    offset: int
    numbers: int


class _Tensor(NamedTuple):
    storage: _Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def pytorch_files(folder: Path) -> list[Path]:
    """The PyTorch weight files of a model folder, in order; empty where it has none."""
    index = folder / "pytorch_model.bin.index.json"
    if index.exists():
        names = sorted({str(name) for name in read_json(index).get("weight_map", {}).values()})
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise Refusal(f"{index} names {name}, which is not in the folder: copy the missing file.")
        return [folder / name for name in names]
    return sorted(folder.glob("pytorch_model*.bin"))


def pytorch_tensors(path: Path) -> Iterator[tuple[str, mx.array]]:
    """The tensors of a file by name, one at a time.

    Raises Refusal for a file that wants to run code, is damaged, or is older than torch's zip format.
    """
    for name, tensor in _described(path).items():
        yield name, _numbers(path, name, tensor)


def _described(path: Path) -> dict[str, _Tensor]:
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise Refusal(
                f"{path} is not in the zip format that torch has written since version 1.6, and older pickles are not "
                "read here: get the model's safetensors."
            )
    try:
        with zipfile.ZipFile(path) as archive:
            table = _unpickled(archive, path)
    except _BROKEN_ZIP:
        raise Refusal(f"{path} is cut off or damaged: fetch the file again.") from None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table):
        raise Refusal(f"{path} holds no table of named tensors: give a file of weights.")
    for name, tensor in table.items():
        if not isinstance(tensor, _Tensor):
            raise Refusal(f"{path}: {name} is no tensor: give a file that holds weights alone.")
    return table


def _unpickled(archive: zipfile.ZipFile, path: Path) -> Any:
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise Refusal(f"{path} is a zip without torch's data.pkl: give a file that torch.save has written.")
    if members[pickles[0]].file_size > _LARGEST_PICKLE:
        raise Refusal(f"{path} has a table of {members[pickles[0]].file_size} bytes: do not use this file.")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(root + "byteorder")
    if order is not None and order.file_size < 16 and archive.read(order) == b"big":
        raise Refusal(f"{path} was written on a big-endian machine, which is not read here: get safetensors.")
    data = archive.read(pickles[0])
    unpickler = _Unpickler(data, path, {name: members[name] for name in members if name.startswith(root)}, root)
    try:
        _check_memo(data)
        return unpickler.load()
    except Refusal:
        raise
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise Refusal(f"{path} has a damaged table of tensors ({error}): fetch the file again.") from None
    except (RecursionError, MemoryError, OverflowError, ImportError):
        raise Refusal(f"{path} has a table of tensors that is no such table: do not use this file.") from None


def _check_memo(data: bytes) -> None:
    """A memo's place far beyond the pickle's own length would make the unpickler allocate that many places."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > len(data):
            raise ValueError("a memo place beyond its end")


class _Unpickler(pickle.Unpickler):
    """Knows how to rebuild tensors and nothing else: any other name in the pickle is refused before it is looked up."""

    def __init__(self, data: bytes, path: Path, members: dict[str, zipfile.ZipInfo], root: str) -> None:
        super().__init__(io.BytesIO(data))
        self.path, self.members, self.root = path, members, root

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *values: _rebuilt(*values),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module_name, global_name) in known:
            return known[module_name, global_name]
        if module_name == "torch" and global_name in _STORAGES:
            return _StorageKind(global_name)
        raise Refusal(
            f"{self.path} wants to run {module_name}.{global_name}, which no weights need: do not use this file."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, key, _, count = pid
        name = f"{self.root}data/{key}"
        if not isinstance(kind, _StorageKind) or name not in self.members:
            raise Refusal(f"{self.path} is damaged: its table names the storage {key}, which it does not hold.")
        info = self.members[name]
        size = int(count) * np.dtype(_STORAGES[kind.name][0]).itemsize
        if info.compress_type != zipfile.ZIP_STORED or not 0 <= size <= info.file_size:
            raise Refusal(f"{self.path} is damaged: storage {key} is not {size} bytes long as its table says.")
        return _Storage(kind.name, _data_offset(self.path, info, size), int(count))


def _data_offset(path: Path, info: zipfile.ZipInfo, size: int) -> int:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise Refusal(f"{path} is damaged: the member {info.filename} is not where its directory says.")
    name, extra = struct.unpack("<HH", header[26:30])
    start = info.header_offset + _LOCAL_HEADER + name + extra
    if start + size > path.stat().st_size:
        raise Refusal(f"{path} is cut off: fetch the file again.")
    return start


def _rebuilt(storage: Any, start: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = [start, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor is described by something else than numbers")
    if len(shape) != len(strides) or len(shape) > 8:
        raise ValueError("a tensor has shape and strides that do not fit")
    last = start + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.numbers or (math.prod(shape) and last >= storage.numbers):
        raise ValueError("a tensor reaches past the end of its storage")
    return _Tensor(storage, start, tuple(shape), tuple(strides))


def _numbers(path: Path, name: str, tensor: _Tensor) -> mx.array:
    kind, recast = _STORAGES[tensor.storage.kind]
    dtype = np.dtype(kind)
    if not math.prod(tensor.shape):
        raise Refusal(f"{path}: tensor {name} is empty: fetch the file again.")
    flat = np.memmap(path, dtype=dtype, mode="r", offset=tensor.storage.offset, shape=(tensor.storage.numbers,))
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat[tensor.start :], tensor.shape, strides, writeable=False)
    whole = np.array(view, order="C")
    if recast is None:
        return mx.array(whole)
    return mx.array(whole).view(recast) if kind == "<u2" else mx.array(whole.astype(np.float32))
