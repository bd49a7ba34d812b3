"""Files that readers see whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from spo.errors import ArtifactError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that readers see either the old content or the whole new one."""
    # Not tempfile: its files are for their owner only, and a server may run under another account.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> ArtifactError:
    """The error of a file that cannot be written."""
    return ArtifactError(f"cannot write {path}: {error}; free space or choose another folder")
