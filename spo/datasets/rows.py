"""Rows out of CSV, JSON, JSONL, Parquet, text and hub data sets; each row knows where it stands."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo.errors import DataError

_READABLE = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
_LARGEST_CELL = 64 << 20
"""Characters; MMBench keeps pictures in its cells."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One row of a data set.

    Example:
        Row(where="harmful_behaviors.csv:2", fields={"goal": "...", "target": "Sure, ..."})
    """

    where: str
    """File and line (or key) for messages."""
    fields: Mapping[str, Any]

    def bad(self, problem: str) -> DataError:
        """The error of this row."""
        return DataError(f"{self.where}: {problem}")

    def text(self, *names: str) -> str:
        """Text of the first of the columns that exists; it must not be blank."""
        name = next((name for name in names if name in self.fields), None)
        if name is None:
            raise self.bad(
                f"expected a column {' or '.join(map(repr, names))}, found {list(self.fields)}; "
                "check the format of the data set"
            )
        value = self.fields[name]
        if not isinstance(value, str) or not value.strip():
            raise self.bad(f"column {name!r} must hold text, got {value!r}; mend or remove the row")
        return value

    def optional(self, *names: str) -> str | None:
        """Text of the first of the columns that exists, None where there is none or it is blank."""
        found = (self.fields[name] for name in names if name in self.fields)
        value = next(found, None)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return str(value)

    def part(self, name: str) -> Row:
        """A nested object."""
        value = self.fields.get(name)
        if not isinstance(value, Mapping):
            raise self.bad(f"field {name!r} must be an object, got {value!r}")
        return Row(where=f"{self.where}, {name}", fields=value)

    def share(self, name: str) -> float:
        """A number in 0..1; null counts 0 (not every text was scored)."""
        value = self.fields.get(name)
        if value is None:
            return 0.0
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise self.bad(f"field {name!r} must be a number in 0..1, got {value!r}")
        return float(value)

    def flag(self, name: str) -> bool:
        """A boolean."""
        value = self.fields.get(name)
        if not isinstance(value, bool):
            raise self.bad(f"field {name!r} must be true or false, got {value!r}")
        return value


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, or of all readable files of a folder in name order.

    Raises:
        DataError: nothing is there, or a row cannot be read; names the file and the row.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in _READABLE)
        if not files:
            raise DataError(f"{path} holds no file of {', '.join(_READABLE)}")
        for file in files:
            yield from read_rows(file)
        return
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected the data set's file or folder")
    readers = {".csv": _csv, ".tsv": _csv, ".json": _json, ".jsonl": _jsonl, ".txt": _lines}
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    if path.suffix not in readers:
        raise DataError(f"{path}: expected a file of {', '.join(_READABLE)}, got {path.suffix!r}")
    try:
        yield from readers[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}; expected UTF-8 text") from error


def hub_rows(
    name: str, *, subset: str | None, split: str, revision: str | None, pictures: Sequence[str]
) -> Iterator[Row]:
    """Rows of a `datasets` id or local folder, streamed; picture columns stay encoded bytes.

    Raises:
        DataError: the data set, its split or a picture column does not exist.
    """
    import datasets

    try:
        stream = datasets.load_dataset(name, subset, split=split, revision=revision, streaming=True)
        for column in pictures:
            if isinstance((stream.features or {}).get(column), datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
        for number, fields in enumerate(stream):
            yield Row(where=f"{name}[{split}] row {number}", fields=fields)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"cannot load data set {name!r} (subset {subset}, split {split!r}): {error}"
        ) from error


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LARGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        bars = "|" in header and "," not in header
        delimiter = "\t" if path.suffix == ".tsv" else "|" if bars else ","
        reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=bars, strict=True)
        try:
            names = [name.strip() for name in reader.fieldnames or ()]
            if len(set(names)) < len(names) or not names:
                raise DataError(f"{path.name}:1: expected a header of different names, got {names}")
            reader.fieldnames = names
            for fields in reader:
                row = Row(where=f"{path.name}:{reader.line_num}", fields=fields)
                if None in fields or None in fields.values():
                    raise row.bad(
                        f"expected {len(names)} columns as in the header, got "
                        f"{sum(v is not None for k, v in fields.items() if k is not None)}"
                        f"{' and more' if None in fields else ''}; is a quote missing?"
                    )
                yield row
        except csv.Error as error:
            raise DataError(
                f"{path.name}, after line {reader.line_num}: not CSV ({error})"
            ) from error


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not JSON ({error.msg} at column {error.colno})"
                ) from error
            yield _object(where, value)


def _json(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); is the "
            "file cut short?"
        ) from error
    if isinstance(content, list):
        keyed: Iterator[tuple[Any, Any]] = ((str(i), value) for i, value in enumerate(content))
    elif isinstance(content, dict):
        keyed = iter(content.items())
    else:
        raise DataError(f"{path.name}: expected a list or an object of rows, got {type(content)}")
    for key, value in keyed:
        found = {"text": value} if isinstance(value, str) else value
        row = _object(f"{path.name}[{key}]", found)
        yield Row(where=row.where, fields={"_key": key, "_file": path.stem, **row.fields})


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            yield Row(where=f"{path.name}:{number}", fields={"text": line.strip()})


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return Row(where=where, fields=value)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    yield Row(where=f"{path.name} row {number}", fields=fields)
                    number += 1
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path.name} cannot be read after row {number} ({error}); the file is damaged or cut "
            "short: fetch it again"
        ) from error
