"""Files that readers see whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spo.errors import ArtifactError


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which becomes `path` when the block ends without error.

    Raises:
        ArtifactError: it cannot be written.
    """
    # Not tempfile: its files are for their owner only, and a server may run under another account.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that readers see either the old content or the whole new one.

    `mode` are its permissions, less those that the account's umask takes away.
    """
    with replaced(path) as part:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def unwritable(path: Path, error: OSError) -> ArtifactError:
    """The error of a file that cannot be written."""
    return ArtifactError(f"cannot write {path}: {error}; free space or choose another folder")
