"""Who calls: FastAPI dependencies that find the key of a request, or refuse it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from spo.serving.keys import Key, Scope
from spo.serving.problems import Problem

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
