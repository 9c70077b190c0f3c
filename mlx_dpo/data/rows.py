"""The raw rows of one JSON Lines, JSON, CSV or Parquet file, each with the place where it stands."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from mlx_dpo.data.examples import ASKED, COLUMNS, Kind, Repeated, missing_columns
from mlx_dpo.data.problems import Problem, refusal

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# A CSV file has no other way than text to write a label.
_LABELS = {"true": True, "false": False, "1": True, "0": False}


class Row(NamedTuple):
    """A row as the file has it, and its place: "pairs.jsonl, line 12"."""

    where: str
    value: object


Found = tuple[list[Row], list[Problem]]
_Parsed = TypeVar("_Parsed")


def rows(path: Path, *, kind: Kind) -> Found:
    """Every row of a file and everything that keeps one from being read; nothing in a file makes it raise."""
    if path.suffix.lower() not in SUFFIXES:
        return [], [Problem(path.name, f"is none of {', '.join(SUFFIXES)}")]
    if not path.is_file():
        return [], [Problem(path.name, "is not a file that can be read")]
    try:
        data = path.read_bytes()
    except OSError as error:
        return [], [Problem(path.name, f"cannot be read ({error.strerror})")]
    if not data.removeprefix(codecs.BOM_UTF8).strip():
        return [], [Problem(path.name, "the file is empty")]
    found, problems = _READERS[path.suffix.lower()](data, path.name, kind)
    if not found and not problems:
        problems = [Problem(path.name, "the file holds no rows")]
    return found, problems


def parsed(path: Path, kind: Kind, parse: Callable[[object, str], _Parsed | list[str]]) -> list[_Parsed]:
    """What `parse` makes of every row of a file and its place; Refusal with every reason why a row is none."""
    found, problems = rows(path, kind=kind)
    made: list[_Parsed] = []
    for where, value in found:
        result = parse(value, where)
        if isinstance(result, list):
            problems += [Problem(where, reason) for reason in result]
        else:
            made.append(result)
    if problems:
        raise refusal(problems, path)
    return made


def _text_lines(data: bytes, name: str) -> tuple[list[str | None], list[Problem]]:
    """Lines split at line feeds only, as JSON strings may hold other separators; None where not UTF-8."""
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            return [], [Problem(name, f"line 1 is {encoding}, not UTF-8: save the file as UTF-8")]
    lines: list[str | None] = []
    problems = []
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            lines.append(None)
            place = f"byte {error.start + 1} of the line (0x{line[error.start]:02x})"
            problems.append(Problem(f"{name}, line {number}", f"{place} is not UTF-8: save the file as UTF-8"))
    return lines, problems


def _json_lines(data: bytes, name: str, kind: Kind) -> Found:
    lines, problems = _text_lines(data, name)
    while lines and lines[-1] is not None and not lines[-1].strip():
        lines.pop()
    found = []
    for number, line in enumerate(lines, start=1):
        if line is None:
            continue
        where = f"{name}, line {number}"
        if not line.strip():
            problems.append(Problem(where, "the line is blank"))
            continue
        value = _parsed(line, where)
        if not isinstance(value, Problem):
            found.append(Row(where, value))
        elif number == len(lines):
            problems.append(value._replace(reason=f"{value.reason}; it is the last line, so the file may be cut off"))
        else:
            problems.append(value)
    return found, problems


def _json_list(data: bytes, name: str, kind: Kind) -> Found:
    lines, problems = _text_lines(data, name)
    if problems:
        return [], problems
    value = _parsed("\n".join(line or "" for line in lines), name)
    if isinstance(value, Problem):
        if "Extra data" in value.reason:
            value = value._replace(reason=f"{value.reason}; one object a line is named .jsonl")
        return [], [value]
    if not isinstance(value, list):
        return [], [Problem(name, "holds no list of rows: a .json file is one list of objects")]
    return [Row(f"{name}, row {number}", row) for number, row in enumerate(value, start=1)], []


def _parsed(text: str, where: str) -> object:
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}" if "\n" in text else f"character {error.colno}"
        return Problem(where, f"broken JSON at {place} ({error.msg})")
    except RecursionError:
        return Problem(where, "is nested too deeply")
    except ValueError:
        return Problem(where, "has a number of too many digits")


def _object(items: list[tuple[str, object]]) -> dict[str, object] | Repeated:
    made = dict(items)
    if len(made) == len(items):
        return made
    keys = [key for key, _ in items]
    return Repeated(next(key for key in keys if keys.count(key) > 1))


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _csv_table(data: bytes, name: str, kind: Kind) -> Found:
    lines, problems = _text_lines(data, name)
    if problems:
        return [], problems
    text = "\n".join(line or "" for line in lines)
    before = csv.field_size_limit(len(text) + 1)  # a field cannot be longer than its file
    try:
        return _csv_rows(_records(text), name, kind)
    finally:
        csv.field_size_limit(before)


def _records(text: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Records with the physical line each starts on; ends after the first that is not one."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            yield start, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, error
            return


def _csv_rows(records: Iterator[tuple[int, list[str] | csv.Error]], name: str, kind: Kind) -> Found:
    start, header = next(records)
    if isinstance(header, csv.Error):
        return [], [Problem(f"{name}, line {start}", f"the header cannot be read ({header})")]
    if fault := _header_fault(header, kind):
        return [], [Problem(f"{name}, line {start}", fault)]
    found, problems, blank = [], [], []
    for start, record in records:
        where = f"{name}, line {start}"
        if isinstance(record, list) and not record:
            blank.append(Problem(where, "the line is blank"))
            continue
        problems += blank  # blank lines at the very end do no harm
        blank = []
        if isinstance(record, csv.Error):
            problems.append(Problem(where, f"{_csv_reason(record)}; what follows was not looked at"))
        elif len(record) != len(header):
            problems.append(Problem(where, f"has {len(record)} fields, the header has {len(header)}"))
        else:
            found.append(Row(where, {column: _cell(column, text) for column, text in zip(header, record, strict=True)}))
    return found, problems


def _cell(column: str, text: str) -> str | float:
    # The only two spellings in which tables write their missing numbers as text.
    if text in ("nan", "NaN"):
        return float("nan")
    return _LABELS.get(text.lower(), text) if column == "label" else text


def _csv_reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quote that opens here is never closed"
    return f"the record is broken CSV ({error})"


def _header_fault(columns: list[str], kind: Kind) -> str | None:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        return f"the header has the column {twice[0]!r} more than once"
    lack = missing_columns(columns, kind=kind)
    shown = ", ".join(map(repr, columns[:8])) + (", …" if len(columns) > 8 else "")
    return f"the header has {shown or 'nothing'}, and {lack}" if lack else None


def _parquet(data: bytes, name: str, kind: Kind) -> Found:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = [str(column) for column in file.schema_arrow.names]
        if fault := _header_fault(columns, kind):
            return [], [Problem(name, fault)]
        table = file.read(columns=[column for column in (*COLUMNS, *ASKED) if column in columns])
        table.validate(full=True)
        values = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [], [Problem(name, f"is not a whole Parquet file ({first[:200]})")]
    return [Row(f"{name}, row {number}", value) for number, value in enumerate(values, start=1)], []


_READERS: dict[str, Callable[[bytes, str, Kind], Found]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv_table,
    ".parquet": _parquet,
}
