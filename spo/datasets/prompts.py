"""Reading prompts from JSONL files: bad rows are kept aside with a reason, never just dropped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from spo.errors import DataError
from spo.records import Prompt, PromptFormat, PromptKind, QuarantinedRow, Side, Split

_ENUMS = {"kind": PromptKind, "format": PromptFormat, "split": Split}
_NAMES = tuple(field.name for field in fields(Prompt))
_REQUIRED = ("prompt_id", "text", "kind")


def read_prompts(path: Path) -> tuple[list[Prompt], list[QuarantinedRow]]:
    """Prompts of a JSONL file (one object a line, fields of `spo.records.Prompt`).

    Relative picture paths count from the file's folder.

    Raises:
        DataError: the file cannot be read, or holds no usable prompt.
    """
    prompts: dict[str, Prompt] = {}
    bad: list[QuarantinedRow] = []
    for where, row in _rows(path):
        try:
            prompt = _prompt(row, path.parent)
            if prompt.prompt_id in prompts:
                raise DataError(f"prompt_id {prompt.prompt_id!r} occurs twice; make ids unique")
            prompts[prompt.prompt_id] = prompt
        except DataError as error:
            bad.append(QuarantinedRow(row_id=where, reason=str(error)))
    if not prompts:
        reasons = "; ".join(f"{row.row_id}: {row.reason}" for row in bad[:3])
        raise DataError(f"{path} has no usable prompt ({len(bad)} bad rows). {reasons}".strip())
    return list(prompts.values()), bad


def read_contrast(path: Path) -> tuple[list[tuple[Side, Prompt]], list[QuarantinedRow]]:
    """Rows of a Stage I contrast: JSONL with `id`, `text`, `side`, optionally `image`, `format`.

    Raises:
        DataError: the file cannot be read, or a side has no usable row.
    """
    rows: list[tuple[Side, Prompt]] = []
    bad: list[QuarantinedRow] = []
    for where, row in _rows(path):
        try:
            _refuse_broken(row)
            side = _enum(Side, row.pop("side", None), "side")
            kind = PromptKind.HARM if side is Side.HARM else PromptKind.BENIGN
            fixed = {"prompt_id": row.pop("id", where), "kind": kind.value}
            rows.append((side, _prompt({"format": "plain", **row, **fixed}, path.parent)))
        except DataError as error:
            bad.append(QuarantinedRow(row_id=where, reason=str(error)))
    for side in Side:
        if all(found is not side for found, _ in rows):
            reasons = "; ".join(f"{row.row_id}: {row.reason}" for row in bad[:3])
            raise DataError(f"{path} has no usable row of side {side.value!r}. {reasons}".strip())
    return rows, bad


def write_prompts(prompts: list[Prompt], path: Path) -> Path:
    """Write prompts as JSONL, the inverse of `read_prompts`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(prompt)) + "\n" for prompt in prompts))
    return path


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}; expected a UTF-8 JSONL file, one object a line"
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = {"_error": f"not JSON ({error.msg} at column {error.colno})"}
        yield where, row if isinstance(row, dict) else {"_error": "expected a JSON object"}


def _refuse_broken(row: dict[str, Any]) -> None:
    if "_error" in row:
        raise DataError(row["_error"])


def _prompt(row: dict[str, Any], folder: Path) -> Prompt:
    _refuse_broken(row)
    missing = [name for name in _REQUIRED if name not in row]
    unknown = sorted(set(row) - set(_NAMES))
    if missing or unknown:
        raise DataError(
            f"expected the fields {list(_NAMES)}, missing {missing}, unknown {unknown}; "
            f"{list(_REQUIRED)} are required"
        )
    values = {
        name: _enum(_ENUMS[name], value, name) if name in _ENUMS else value
        for name, value in row.items()
    }
    for name in ("prompt_id", "text", "category"):
        if not isinstance(values.get(name, ""), str):
            raise DataError(f"field {name!r} must be a string, got {type(values[name]).__name__}")
    for name in ("image", "reference"):
        if not isinstance(values.get(name), str | None):
            raise DataError(f"field {name!r} must be a string, got {type(values[name]).__name__}")
    if not values["text"].strip():
        raise DataError("field 'text' is empty")
    if values.get("image"):
        values["image"] = str((folder / values["image"]).absolute())
        if not Path(values["image"]).is_file():
            raise DataError(f"picture {values['image']!r} does not exist")
    return Prompt(**values)


def _enum(kind: Any, value: Any, name: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        allowed = [item.value for item in kind]
        raise DataError(f"field {name!r} must be one of {allowed}, got {value!r}") from error
