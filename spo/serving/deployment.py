"""The endpoint on Ray Serve: gateways, engines and one registry.

A gateway (ingress) checks keys, limits and names, and sheds load; an engine replica holds the model
and answers from vectors that it fetches from the registry. Nothing here repairs by answering
differently: a lost engine means a repeated or a refused request, never an unsteered one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig

from spo.artifact import SteeringArtifact
from spo.config import EngineConfig
from spo.config.serving import ServeConfig
from spo.engines.base import KEPT_VERSIONS
from spo.engines.chat import ChatAnswer, ChatDelta, ChatEngine, ChatRequest, PlainChatEngine
from spo.engines.factory import open_engine
from spo.records import Operator, Positions
from spo.serving.access_log import log_to_stderr
from spo.serving.app import build_app
from spo.serving.backend import RayBackend, cause_of
from spo.serving.engine_host import EngineHost
from spo.serving.keys import Key, KeyRing
from spo.serving.metrics import EngineGauges, RayMeter
from spo.serving.registry import Snapshot, VectorRegistry, Version
from spo.serving.service import Service

APP = "spo"
_FAST = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
"""Ray Serve's settings for throughput, of gateways and engines: once started, nothing of ours
blocks their loops, so that one is enough, and pictures go to the engine without a detour through
the object store. Errors of the other side then arrive as they are, not as a `RayTaskError`."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Everything that the replicas need. Travels to other nodes: plain values only."""

    model: str
    """Folder or hub id of the frozen model."""
    revision: str | None
    name: str
    """Name that clients use."""
    engine: EngineConfig
    serve: ServeConfig
    state_dir: Path
    artifacts: Mapping[str, Path]
    """Vectors that are live from the start."""
    keys: tuple[Key, ...] = ()
    """Keys beside those of the key file."""
    seed: int = 0


async def open_chat_engine(settings: ServeSettings) -> ChatEngine:
    """The engine of a replica."""
    engine, limits = settings.engine, settings.serve
    if engine.backend != "vllm":
        plain = open_engine(settings.model, settings.revision, engine, seed=settings.seed)
        return PlainChatEngine(plain)
    from spo.engines.vllm.chat import VllmChatEngine
    from spo.engines.vllm.launch import VllmSettings

    vllm = VllmSettings(
        **engine.engine_arguments(),
        slots=limits.slots,
        capture_rows=0,
        seed=settings.seed,
        engine_options={
            "limit_mm_per_prompt": {"image": limits.max_images, "video": 0},
            **limits.engine_options,
        },
    )
    chat = await VllmChatEngine.start(settings.model, revision=settings.revision, settings=vllm)
    chat.stream_interval_s = limits.stream_interval_ms / 1e3
    # The start-up canary needs a stronger dose than requests may ask for.
    chat.desk.max_dose = limits.max_dose
    return chat


def _names(limits: ServeConfig) -> int:
    """Vectors that fit an engine: so many versions of each, and the start-up canary's place."""
    return limits.slots // KEPT_VERSIONS - 1


class Registry:
    """`VectorRegistry` as a deployment of one replica."""

    def __init__(self, settings: ServeSettings) -> None:
        limits = settings.serve
        self._vectors = VectorRegistry(
            settings.state_dir,
            keep_versions=limits.keep_versions,
            max_names=_names(limits),
        )
        for name, folder in settings.artifacts.items():
            artifact = SteeringArtifact.load(folder, model_id=None)
            version = self._vectors.stage(name, artifact)
            known = self._vectors.snapshot.entries.get(name)
            if known is None or version.number not in known.versions:
                self._vectors.commit(version)

    def snapshot(self) -> Snapshot:
        """What is live."""
        return self._vectors.snapshot

    def stage(self, name: str, folder: str) -> Version:
        """See `VectorRegistry.stage`."""
        return self._vectors.stage(name, SteeringArtifact.load(Path(folder), model_id=None))

    def commit(self, version: Version, share: float | None) -> Snapshot:
        """See `VectorRegistry.commit`."""
        return self._vectors.commit(version, share)

    def rollback(self, name: str, number: int | None) -> Snapshot:
        """See `VectorRegistry.rollback`."""
        return self._vectors.rollback(name, number)

    def unload(self, name: str, number: int | None) -> Snapshot:
        """See `VectorRegistry.unload`."""
        return self._vectors.unload(name, number)

    def artifact(self, name: str, number: int) -> dict[str, Any]:
        """A version's vector and how to use it, in types that need no trust."""
        artifact = self._vectors.artifact(name, number)
        return {
            "vector": artifact.vector.to_bytes(),
            "operator": artifact.operator.value,
            "coefficient": artifact.coefficient,
            "positions": artifact.positions.value,
            "method": artifact.method,
        }


class EngineReplica:
    """One engine. It is ready once every live vector has passed its canary here."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, settings: ServeSettings, registry: Any
    ) -> None:
        self._limits = settings.serve
        self._registry = registry
        engine = await open_chat_engine(settings)
        self._host = EngineHost(engine, self._fetch, _names(settings.serve))
        self._gauges = EngineGauges()
        self._running = 0
        try:
            snapshot: Snapshot = await registry.snapshot.remote()
            await self._host.prepare(
                entry.versions[entry.live] for entry in snapshot.entries.values()
            )
        except BaseException:
            engine.close()
            raise

    async def _fetch(self, name: str, number: int) -> SteeringArtifact:
        from spo.vector import SteeringVector

        try:
            row = await self._registry.artifact.remote(name, number)
        except Exception as error:
            raise cause_of(error) from error
        return SteeringArtifact(
            vector=SteeringVector.from_bytes(row["vector"]),
            operator=Operator(row["operator"]),
            coefficient=row["coefficient"],
            positions=Positions(row["positions"]),
            method=row["method"],
        )

    async def prove(self, version: Version) -> None:
        """Publish a version and run its canary."""
        try:
            await self._host.prepare([version])
        except Exception:
            self._leave_if_dead()
            raise

    async def complete(self, request: ChatRequest) -> ChatAnswer:
        """The whole answer."""
        self._count(1)
        try:
            return await self._host.complete(request)
        except Exception:
            self._leave_if_dead()
            raise
        finally:
            self._count(-1)

    async def stream(self, request: ChatRequest) -> AsyncIterator[ChatDelta | ChatAnswer]:
        """The answer in pieces."""
        self._count(1)
        try:
            async for event in self._host.stream(request):
                yield event
        except Exception:
            self._leave_if_dead()
            raise
        finally:
            self._count(-1)

    async def check_health(self) -> None:
        """A token within the deadline, or Serve replaces this replica."""
        self._leave_if_dead()
        await self._host.engine.check(self._limits.health_timeout_s)

    async def processes(self) -> list[int]:
        """Process ids of this actor and of the engine's own processes, for fault tests."""
        inner = getattr(self._host.engine, "processes", list)
        return [os.getpid(), *inner()]

    def _count(self, change: int) -> None:
        self._running += change
        self._gauges.running(self._running)

    def _leave_if_dead(self) -> None:
        """A living actor around a dead engine would fail every request sent to it, for ever."""
        if self._host.engine.dead:
            _LOG.error("the engine's process died; leaving, so that Serve starts a new replica")
            os._exit(1)


@serve.ingress()
class Gateway:
    """The ingress."""

    async def __init__(  # type: ignore[misc]  # Serve awaits constructors
        self, settings: ServeSettings, engines: Any, registry: Any
    ) -> None:
        limits = settings.serve
        log_to_stderr()
        self._backend = RayBackend(engines, registry, limits)
        self._meter = RayMeter()
        self._service = Service(limits, settings.name, self._backend)
        self._ring = KeyRing(settings.keys, limits.keys_file, open_to_all=limits.auth == "none")
        self._following = await self._backend.follow(self._meter)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._service, self._ring, self._meter)


def application(settings: ServeSettings) -> serve.Application:
    """The deployments, bound together, for `serve.run` and `serve deploy`."""
    limits, engine = settings.serve, settings.engine
    environment = _environment()
    health = {
        "health_check_period_s": limits.health_period_s,
        "health_check_timeout_s": limits.health_timeout_s + 5.0,
        "graceful_shutdown_timeout_s": limits.drain_s,
        "graceful_shutdown_wait_loop_s": 1.0,
    }
    registry = serve.deployment(Registry).options(
        name="registry",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        # Gateways ask every second.
        logging_config={"enable_access_log": False},
    )
    scaling: dict[str, Any] = {"num_replicas": limits.min_engines}
    if limits.max_engines > limits.min_engines:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=limits.min_engines,
                max_replicas=limits.max_engines,
                target_ongoing_requests=limits.target_requests,
            )
        }
    engines = serve.deployment(EngineReplica).options(
        name="engine",
        max_ongoing_requests=2 * engine.max_num_seqs + 8,
        ray_actor_options={"num_cpus": 1, **engine.ray_options(), "runtime_env": environment},
        **scaling,
        **health,
    )
    gateway = serve.deployment(Gateway).options(
        name="gateway",
        num_replicas=limits.gateways,
        # Well above what is admitted, so that refusals come at once and from us, with 429.
        max_ongoing_requests=8 * limits.max_in_flight + 64,
        ray_actor_options={"num_cpus": 0, "runtime_env": environment},
        **health,
    )
    held = registry.bind(settings)
    return gateway.bind(settings, engines.bind(settings, held), held)


def _environment() -> dict[str, Any]:
    """This job's runtime environment with `_FAST`: Serve gives none to what has one of its own."""
    if not ray.is_initialized():
        return {"env_vars": _FAST}
    own = dict(ray.get_runtime_context().runtime_env)
    return {**own, "env_vars": {**own.get("env_vars", {}), **_FAST}}


def http_options(limits: ServeConfig) -> dict[str, Any]:
    """Options of `serve.start`."""
    return {"host": limits.host, "port": limits.port, "keep_alive_timeout_s": 75}


__all__: Sequence[str] = ["APP", "ServeSettings", "application", "http_options"]
