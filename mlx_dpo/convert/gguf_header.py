"""The header of a GGUF file, walked with suspicion before any reader believes it."""

import mmap
import struct
from itertools import pairwise
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from mlx_dpo.refusal import Refusal

_SIZES = {
    GGUFValueType.UINT8: 1, GGUFValueType.INT8: 1, GGUFValueType.BOOL: 1, GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2, GGUFValueType.UINT32: 4, GGUFValueType.INT32: 4, GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8, GGUFValueType.INT64: 8, GGUFValueType.FLOAT64: 8,
}  # fmt: skip
_MOST_ENTRIES = 65_536  # of metadata, and of tensors: two hundred times what real files have
_LONGEST_ARRAY = 2_000_000  # eight times the largest vocabulary
_LONGEST_KEY = 65_535  # the format's own limit


class _Cursor:
    """A place in the file that never runs past its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def refused(self, what: str) -> Refusal:
        return Refusal(f"{self.path} {what}: fetch the file again.")

    def skipped(self, count: int) -> int:
        start = self.at
        if count > len(self.data) - start:
            raise self.refused("is cut off, or its header lies about a length")
        self.at = start + count
        return start

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        return struct.unpack_from(form, self.data, self.skipped(size))[0]

    def text(self, longest: int) -> str:
        length = self.number("<Q")
        if length > longest:
            raise self.refused(f"has a header with a name of {length} bytes")
        start = self.skipped(length)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.refused("has a header with a name that is not UTF-8") from None


def check_header(path: Path) -> None:
    """Raise Refusal unless `path` is a GGUF file whose header fits the file.

    Source: the GGUF specification, versions 2 and 3.
    """
    if path.stat().st_size < 24:
        raise Refusal(f"{path} is too short to be a GGUF file: fetch the file again.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path)
        tensors, entries = _counts(cursor)
        alignment = _checked_metadata(cursor, entries)
        spans = [_tensor_span(cursor, alignment) for _ in range(tensors)]
        start = -(-cursor.at // alignment) * alignment
        _check_spans(cursor, spans, len(data) - start)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    if cursor.data[:4] != b"GGUF":
        raise Refusal(f"{cursor.path} is not a GGUF file (it does not begin with GGUF): give a .gguf file.")
    cursor.skipped(4)
    version = cursor.number("<I")
    if version not in (2, 3):
        raise Refusal(f"{cursor.path} has GGUF version {version}, and 2 and 3 are read here: get a newer file.")
    tensors, entries = cursor.number("<Q"), cursor.number("<Q")
    if max(tensors, entries) > _MOST_ENTRIES:
        raise cursor.refused(f"has a header that claims {tensors} tensors and {entries} metadata entries")
    return tensors, entries


def _checked_metadata(cursor: _Cursor, entries: int) -> int:
    seen, alignment = set(), GGUF_DEFAULT_ALIGNMENT
    for _ in range(entries):
        key = cursor.text(_LONGEST_KEY)
        if key in seen:
            raise cursor.refused(f"has the metadata {key} twice")
        seen.add(key)
        kind = cursor.number("<I")
        if key == "general.alignment" and kind == GGUFValueType.UINT32:
            alignment = cursor.number("<I")
            if alignment == 0 or alignment & (alignment - 1):
                raise cursor.refused(f"has the alignment {alignment}, which is no power of two")
        else:
            _skip_value(cursor, kind, key)
    return alignment


def _skip_value(cursor: _Cursor, kind: int, key: str) -> None:
    if kind == GGUFValueType.STRING:
        cursor.skipped(cursor.number("<Q"))
    elif kind in _SIZES:
        cursor.skipped(_SIZES[GGUFValueType(kind)])
    elif kind == GGUFValueType.ARRAY:
        inner, count = cursor.number("<I"), cursor.number("<Q")
        if count > _LONGEST_ARRAY:
            raise cursor.refused(f"has a header that claims {count} values of {key}")
        if inner == GGUFValueType.STRING:
            for _ in range(count):
                cursor.skipped(cursor.number("<Q"))
        elif inner in _SIZES:
            cursor.skipped(count * _SIZES[GGUFValueType(inner)])
        else:
            raise cursor.refused(f"has the metadata {key} in a nested list, which no model has")
    else:
        raise cursor.refused(f"has the metadata {key} of the unknown type {kind}")


def _tensor_span(cursor: _Cursor, alignment: int) -> tuple[int, int, str]:
    name = cursor.text(_LONGEST_KEY)
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= 4:
        raise cursor.refused(f"gives tensor {name} {dimensions} dimensions")
    shape = [cursor.number("<Q") for _ in range(dimensions)]
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise Refusal(
            f"{cursor.path}: tensor {name} has the type {kind}, which the installed gguf package does not know: "
            "update it, or get another quantisation."
        ) from None
    count = 1
    for extent in shape:
        count *= extent
    if count == 0 or shape[0] % block or offset % alignment:
        raise cursor.refused(f"has a damaged entry for tensor {name}")
    return offset, offset + count // block * size, name


def _check_spans(cursor: _Cursor, spans: list[tuple[int, int, str]], available: int) -> None:
    names = [name for _, _, name in spans]
    if len(set(names)) != len(names):
        raise cursor.refused("names a tensor twice")
    ordered = sorted(spans)
    for (_, stop, name), (start, _, after) in pairwise(ordered):
        if start < stop:
            raise cursor.refused(f"has tensors {name} and {after} overlapping")
    for _, stop, name in ordered:
        if stop > available:
            raise cursor.refused(f"is cut off: tensor {name} should end {stop - available} bytes past its end")
