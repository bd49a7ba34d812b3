"""The HTTP application: OpenAI's routes, the vectors' routes, the playground, health.

`build_app` needs no Ray: tests run it in process, `spo.serving.deployment` in a Serve replica.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from spo.errors import ArtifactError, ConfigError, SpoError, SteeringError
from spo.serving import keys
from spo.serving.access_log import Meter
from spo.serving.chat_route import ERRORS, as_problem, chat_route
from spo.serving.keys import Caller, Manager
from spo.serving.middleware import BodyLimit, SecurityHeaders
from spo.serving.problems import Problem
from spo.serving.schema import LoadRequest, RollbackRequest, vectors_json
from spo.serving.service import Service

_PAGE = Path(__file__).with_name("playground.html")


def build_app(service: Service, ring: keys.KeyRing, meter: Meter) -> FastAPI:
    """The ASGI application.

    Args:
        service: checks and answers requests.
        ring: who may come in.
        meter: receives figures.
    """
    app = FastAPI(title="SPO-VLM", version="1", docs_url=None, redoc_url=None)
    config = service.config
    app.add_middleware(BodyLimit, max_bytes=int(config.max_body_mib * (1 << 20)))
    app.add_middleware(SecurityHeaders)
    _handle_errors(app)

    app.state.ring = ring
    _health_routes(app, service)
    _model_routes(app, service)
    _vector_routes(app, service)
    chat_route(app, service, meter)
    return app


def _handle_errors(app: FastAPI) -> None:
    async def problem(_: Request, error: Problem) -> JSONResponse:
        return JSONResponse(error.body(), error.status, headers=error.headers())

    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # The input itself is left out: it may be long, or not for other eyes.
        lines = [
            f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}"
            for item in error.errors()[:8]
        ]
        found = Problem(400, "invalid_request", "; ".join(lines))
        return JSONResponse(found.body(), found.status)

    async def http(_: Request, error: HTTPException) -> JSONResponse:
        cause = error.__cause__  # FastAPI wraps what happens while it reads a body
        if not isinstance(cause, Problem):
            cause = Problem(error.status_code, "http", str(error.detail))
        found = cause
        return JSONResponse(found.body(), found.status, headers=error.headers)

    async def ours(request: Request, error: SpoError) -> JSONResponse:
        return await problem(request, as_problem(error))

    app.add_exception_handler(Problem, problem)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http)  # type: ignore[arg-type]
    app.add_exception_handler(SpoError, ours)  # type: ignore[arg-type]


def _health_routes(app: FastAPI, service: Service) -> None:
    page = _PAGE.read_text().replace("{{model}}", json.dumps(service.model).replace("<", "\\u003c"))

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/healthz")
    async def alive() -> dict[str, str]:
        """The gateway's process answers."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        """An engine has passed its canary and answers."""
        missing = await service.backend.ready()
        if missing:
            raise Problem(503, "not_ready", missing, retry_after_s=2)
        return {"status": "ready"}


def _model_routes(app: FastAPI, service: Service) -> None:
    def described(name: str) -> dict[str, Any]:
        _, _, vector = name.partition(":")
        entry = service.backend.snapshot.entries.get(vector)
        steering = {"vector": vector, "version": entry.live} if entry else None
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "spo-vlm",
            "steering": steering,
        }

    def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: ERRORS[status] for status in statuses}

    @app.get("/v1/models", responses=refusals(401))
    async def list_models(key: Caller) -> dict[str, Any]:
        """The unsteered model, if the key may ask for it, and one model for each vector."""
        return {"object": "list", "data": [described(name) for name in service.models(key)]}

    @app.get("/v1/models/{name:path}", responses=refusals(400, 401, 404))
    async def get_model(name: str, key: Caller) -> dict[str, Any]:
        """One model."""
        if name not in service.models(key):
            raise Problem(404, "model_not_found", f"there are {service.models(key)}")
        return described(name)


def _vector_routes(app: FastAPI, service: Service) -> None:
    backend = service.backend

    async def changed(change: Awaitable[Any]) -> dict[str, Any]:
        try:
            return vectors_json(await change)
        except (ArtifactError, ConfigError, SteeringError) as error:
            raise Problem(409, "not_changed", f"nothing was changed: {error}") from error

    def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: ERRORS[status] for status in (400, 401, *statuses)}

    @app.get("/v1/steering/vectors", responses=refusals())
    async def list_vectors(_: Caller) -> dict[str, Any]:
        """Every vector with its versions and what is live."""
        return vectors_json(backend.snapshot)

    @app.post("/v1/steering/vectors", responses=refusals(403, 409, 413, 503))
    async def load_vector(body: LoadRequest, _: Manager) -> dict[str, Any]:
        """Load an artifact as the next version; live at once, or for a share of requests."""
        folder = _artifact_folder(service, body.artifact)
        return await changed(backend.load(body.name, folder, body.canary_share))

    @app.post("/v1/steering/vectors/{name}/rollback", responses=refusals(403, 409, 413, 503))
    async def roll_back(name: str, body: RollbackRequest, _: Manager) -> dict[str, Any]:
        """End a trial, or make an earlier version live again."""
        return await changed(backend.rollback(name, body.version))

    @app.delete("/v1/steering/vectors/{name}", responses=refusals(403, 409, 503))
    async def unload_vector(name: str, _: Manager, version: int | None = None) -> dict[str, Any]:
        """Forget a vector, or one version that is not in use."""
        return await changed(backend.unload(name, version))


def _artifact_folder(service: Service, name: str) -> Path:
    root = service.config.artifacts_dir
    if root is None:
        raise Problem(
            409, "loading_is_off", "this server loads no artifacts: serve.artifacts_dir is not set"
        )
    root = root.expanduser().resolve()
    folder = root
    try:
        folder = (root / name).resolve()
        inside = folder.is_relative_to(root) and folder.is_dir()
    except (OSError, ValueError):  # names that no file system knows, such as those with a zero byte
        inside = False
    if not inside:
        raise Problem(409, "no_artifact", "no such artifact folder in serve.artifacts_dir")
    return folder
