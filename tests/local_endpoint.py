"""The endpoint in one process, without Ray: the real application over the real fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import torch
from fastapi import FastAPI

from spo.artifact import SteeringArtifact
from spo.config.serving import ServeConfig
from spo.engines.base import KEPT_VERSIONS
from spo.engines.chat import ChatAnswer, ChatDelta, ChatRequest, PlainChatEngine
from spo.engines.fake import FakeEngine
from spo.records import Operator, Positions
from spo.serving.access_log import LogMeter
from spo.serving.app import build_app
from spo.serving.engine_host import EngineHost
from spo.serving.keys import Key, KeyRing, Scope, hash_secret
from spo.serving.registry import Snapshot, VectorRegistry
from spo.serving.service import Service
from spo.vector import SteeringVector

ALL, USE, NOBODY = "spo-test-all", "spo-test-use", "spo-test-nobody"
MODEL = "fake"
RING_KEYS = (
    Key(name="all", sha256=hash_secret(ALL), scopes=frozenset(Scope)),
    Key(name="use", sha256=hash_secret(USE), scopes=frozenset({Scope.USE})),
)


def fake_artifact(scale: float, coefficient: float = 0.5) -> SteeringArtifact:
    """A vector that makes the fake engine kinder."""
    return SteeringArtifact(
        vector=SteeringVector(
            layers=(1, 2),
            directions=scale * FakeEngine().harm_direction.repeat(2, 1),
            mean_norms=torch.ones(2),
            calibration=torch.zeros(2, 8),
            model_id="fake",
            model_revision="1",
        ),
        operator=Operator.ADD,
        coefficient=coefficient,
        positions=Positions.ALL,
        method="planted",
    )


class LocalBackend:
    """`spo.serving.service.Backend` over one engine and one registry in this process."""

    def __init__(self, folder: Path, config: ServeConfig) -> None:
        self.registry = VectorRegistry(
            folder / "state",
            keep_versions=config.keep_versions,
            max_names=config.slots // KEPT_VERSIONS - 1,
        )
        self.host = EngineHost(
            PlainChatEngine(FakeEngine()), self._fetch, max_names=config.slots // KEPT_VERSIONS - 1
        )

    async def _fetch(self, name: str, number: int) -> SteeringArtifact:
        return self.registry.artifact(name, number)

    @property
    def snapshot(self) -> Snapshot:
        return self.registry.snapshot

    async def ready(self) -> str:
        return ""

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        return await self.host.complete(request)

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        async for event in self.host.stream(request):
            yield event

    async def load(self, name: str, folder: Path, share: float | None) -> Snapshot:
        version = self.registry.stage(name, SteeringArtifact.load(folder, model_id="fake"))
        await self.host.prepare([version])
        return self.registry.commit(version, share)

    async def rollback(self, name: str, number: int | None) -> Snapshot:
        return self.registry.rollback(name, number)

    async def unload(self, name: str, number: int | None) -> Snapshot:
        return self.registry.unload(name, number)


def local_endpoint(folder: Path, **settings: object) -> tuple[FastAPI, LocalBackend]:
    """The application with the vector `polite` live, and artifacts v1, v2, v3 and `idle` to load.

    Args:
        folder: for the registry and the artifacts.
        settings: fields of `ServeConfig`.
    """
    store = folder / "store"
    for number in (1, 2, 3):
        fake_artifact(number / 2).save(store / f"v{number}")
    fake_artifact(1e-9).save(store / "idle")
    config = ServeConfig(artifacts_dir=store, **settings)  # type: ignore[arg-type]
    backend = LocalBackend(folder, config)
    artifact = SteeringArtifact.load(store / "v1", model_id="fake")
    backend.registry.commit(backend.registry.stage("polite", artifact))
    app = build_app(Service(config, MODEL, backend), KeyRing(RING_KEYS), LogMeter())
    return app, backend
