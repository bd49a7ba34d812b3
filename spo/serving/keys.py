"""API keys: long random secrets of which only the hash is stored, each with its scopes.

A key file is JSON: {"keys": [{"name": "alice", "sha256": "...", "scopes": ["use"]}]}. It is read
again when it changes, so a key is revoked by deleting its line. (A fast hash is enough: a secret of
256 random bits cannot be guessed, whatever the hash costs.)
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from spo.errors import ConfigError
from spo.files import write_atomic
from spo.serving.problems import Problem

_PREFIX = "spo-"
_REREAD_S = 1.0


class Scope(StrEnum):
    """What a key may do."""

    USE = "use"
    """Ask steered models."""
    UNSTEERED = "unsteered"
    """Ask the model without a vector."""
    MANAGE = "manage"
    """Load, unload and roll back vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key, without its secret."""

    name: str
    sha256: str
    scopes: frozenset[Scope]


def hash_secret(secret: str) -> str:
    """What a key file keeps of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def new_key(name: str, scopes: Iterable[Scope]) -> tuple[str, Key]:
    """A fresh secret, to be shown once, and its record."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    return secret, Key(name=name, sha256=hash_secret(secret), scopes=frozenset(scopes))


def parse_scopes(text: str) -> frozenset[Scope]:
    """Scopes from "use,manage"; ConfigError names the unknown one."""
    try:
        return frozenset(Scope(part.strip()) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            f"scopes are {', '.join(Scope)}, separated by commas, got {text!r}"
        ) from error


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; ConfigError says what is wrong with it."""
    try:
        rows = json.loads(path.read_text())["keys"]
        keys = tuple(
            Key(
                name=str(row["name"]),
                sha256=str(row["sha256"]).lower(),
                scopes=frozenset(Scope(scope) for scope in row["scopes"]),
            )
            for row in rows
        )
    except OSError as error:
        raise ConfigError(
            f"cannot read the key file {path}: {error.strerror}; make one with "
            "`python -m jobs.serve --add-key NAME serve.keys_file=FILE`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'{path}: expected {{"keys": [{{"name", "sha256", "scopes"}}]}}, got {error!r}'
        ) from error
    wrong = [key.name for key in keys if len(key.sha256) != 64]
    names = [key.name for key in keys]
    if wrong or len(set(names)) < len(names):
        raise ConfigError(
            f"{path}: every key needs a name of its own and a SHA-256 of 64 digits; see {names}"
        )
    return keys


def add_key(path: Path, key: Key) -> None:
    """Append a key to a file that only its owner can read; makes the file if needed."""
    keys = read_keys(path) if path.exists() else ()
    if key.name in {other.name for other in keys}:
        raise ConfigError(f"{path} has a key named {key.name!r}; delete its line first")
    rows: list[dict[str, Any]] = [
        {"name": k.name, "sha256": k.sha256, "scopes": sorted(k.scopes)} for k in (*keys, key)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"keys": rows}, indent=1).encode(), mode=0o600)


class KeyRing:
    """Finds the key that a secret belongs to.

    Args:
        keys: fixed keys.
        path: file of further keys, read again when it changes.
        open_to_all: no secret is needed; everybody has every scope.
    """

    def __init__(
        self, keys: Sequence[Key] = (), path: Path | None = None, *, open_to_all: bool = False
    ) -> None:
        self._fixed = tuple(keys)
        self._path = path
        self._open = open_to_all
        self._stamp: tuple[int, int] | None = None
        self._looked = 0.0
        self._read: tuple[Key, ...] = ()
        if path is not None:
            self._reread()
        if not open_to_all and not (self._fixed or self._read):
            raise ConfigError(
                "the endpoint has no key that would open it; make one with "
                "`python -m jobs.serve --add-key NAME serve.keys_file=FILE`"
            )

    def find(self, authorization: str) -> Key | None:
        """The key of an `Authorization: Bearer SECRET` header, or None."""
        if self._open:
            return Key(name="anybody", sha256="", scopes=frozenset(Scope))
        kind, _, secret = authorization.partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            return None
        if self._path is not None and time.monotonic() - self._looked > _REREAD_S:
            self._reread()
        digest = hash_secret(secret.strip())
        found = None
        for key in (*self._fixed, *self._read):
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def _reread(self) -> None:
        assert self._path is not None
        self._looked = time.monotonic()
        try:
            status = self._path.stat()
        except OSError as error:
            raise ConfigError(f"cannot read the key file {self._path}: {error.strerror}") from error
        stamp = (status.st_mtime_ns, status.st_ino)
        if stamp != self._stamp:
            self._read, self._stamp = read_keys(self._path), stamp


_bearer = HTTPBearer(auto_error=False, description="An API key of this server")


async def caller(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Key:
    """The key of the request; the application keeps its ring in `app.state.ring`."""
    header = f"{credentials.scheme} {credentials.credentials}" if credentials else ""
    key: Key | None = request.app.state.ring.find(header)
    if key is None:
        raise Problem(
            401, "invalid_api_key", "expected `Authorization: Bearer KEY`, a key of this server"
        )
    return key


async def manager(key: Annotated[Key, Depends(caller)]) -> Key:
    """A key that may change vectors."""
    if Scope.MANAGE not in key.scopes:
        raise Problem(403, "not_allowed", "this key has no scope 'manage'")
    return key


Caller = Annotated[Key, Depends(caller)]
Manager = Annotated[Key, Depends(manager)]
