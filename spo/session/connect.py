"""Connected to Ray, on nodes that fit, with the run's folder locked for this job."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spo.config import RayConfig
from spo.errors import StageError
from spo.session.placement import Role

_NODES_S = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Which cluster a run works on, and where it writes."""

    ray: RayConfig
    storage: str
    """Folder or URL that only one job at a time may write to."""
    run_dir: Path
    """Folder that every node must see."""
    needs_plugin: bool
    """Whether every node must have vLLM and the steering plugin."""


@contextmanager
def cluster(site: Site, phases: Mapping[str, Sequence[Role]]) -> Iterator[None]:
    """Connected to Ray: the cluster of the submitted job, the configured one, or a local one.

    Args:
        site: the cluster.
        phases: roles that will work at the same time; must fit on the nodes.

    Raises:
        StageError: within seconds, when the cluster cannot be used; says why and what to do.
    """
    import ray

    local = connect(site.ray)
    try:
        _check_room(phases, site.ray.node_wait_s)
        if not local:
            _check_nodes(site)
        lock = _RunLock(site.storage)
        try:
            yield
        finally:
            lock.release()
    finally:
        ray.shutdown()


def connect(config: RayConfig) -> bool:
    """Connect to Ray; True for a local cluster, started here.

    Raises:
        StageError: nothing answers, the token is refused, or the versions differ.
    """
    import logging

    import ray
    import ray.data

    from spo.session.head import check_head

    local = config.address is None and "RAY_ADDRESS" not in os.environ
    address = config.address or os.environ.get("RAY_ADDRESS") or ""
    host, _, port = address.rpartition(":")
    if not local and host and port.isdigit() and "://" not in address:
        check_head(address)
    cpus = config.num_cpus or max(4, os.cpu_count() or 1)
    # Roles work in turn on a small machine, so each may use every core; threads that spin while
    # they wait would stop the others (measured: twenty times slower).
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        context = ray.init(
            # "local" by name: without it Ray joins any cluster that it finds on this machine.
            address="local" if local else config.address,
            num_cpus=cpus if local else None,
            namespace=config.namespace,
            log_to_driver=bool(os.environ.get("SPO_WORKER_LOGS")),
            logging_level=logging.WARNING,
            runtime_env={"env_vars": {**threads, "GOMP_SPINCOUNT": "0"}} if local else None,
        )
    except Exception as error:  # Ray raises a bare Exception when a node does not start in time
        raise StageError(
            f"cannot connect to Ray at {address or 'a local cluster'}: {error}; look at the "
            "address, RAY_AUTH_MODE and the versions with `python -m jobs.doctor`"
        ) from error
    session = context.address_info.get("session_dir")
    if local and session:
        print(f"logs of engines and workers: {session}/logs", flush=True)
    ray.data.DataContext.get_current().enable_progress_bars = sys.stdout.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return local


def _check_nodes(site: Site) -> None:
    from spo.session.nodes import Question, ask_here, ask_nodes, check_nodes, marker_in

    with marker_in(site.run_dir) as marker:
        question = Question(marker=marker)
        answers = ask_nodes(question, timeout_s=_NODES_S)
        here = ask_here(question, "driver", 0.0)
    for node in answers.late:
        # Busy, or hung: the roles that it gets have deadlines of their own.
        print(f"warning: {node} did not answer within {_NODES_S:.0f} s", file=sys.stderr)
    check_nodes(here, answers, needs_plugin=site.needs_plugin)


def _check_room(phases: Mapping[str, Sequence[Role]], wait_s: float) -> None:
    """Refuse what does not fit; with `ray.node_wait_s` give an autoscaler that long."""
    if not phases:
        return
    import ray
    from ray.autoscaler.sdk import request_resources

    from spo.session.placement import Room, bundles_of, check_room

    end = time.monotonic() + wait_s
    asked = False
    try:
        while True:
            rooms = [Room.of(node) for node in ray.nodes() if node["Alive"]]
            try:
                check_room(phases, rooms)
                return
            except StageError as error:
                if time.monotonic() >= end:
                    raise
                if not asked:
                    bundles, labels = bundles_of(phases)
                    request_resources(bundles=bundles, bundle_label_selectors=labels)
                    print(f"{error}\nwaiting up to {wait_s} s for the autoscaler")
                    asked = True
                time.sleep(2.0)
    finally:
        if asked:  # a request stands until it is taken back, and would hold the nodes for ever
            request_resources(num_cpus=0)


class _RunLock:
    """One job at a time writes to a run: a named actor that Ray ends with its job, however it ends.

    A second one would mix its history and checkpoints into the first one's.
    """

    def __init__(self, storage: str) -> None:
        import hashlib

        import ray

        name = f"run-{hashlib.sha256(storage.encode()).hexdigest()[:16]}"
        job = ray.get_runtime_context().get_job_id()
        try:
            self._actor = (
                ray.remote(_Holder).options(name=name, num_cpus=0, max_restarts=-1).remote(job)
            )
        except ValueError as error:
            raise StageError(
                f"another job{_holder_of(name)} on this cluster is working on {storage}; "
                "wait for it, stop it with `ray job stop`, or give this run another name="
            ) from error

    def release(self) -> None:
        """Let the next job in."""
        import ray

        ray.kill(self._actor)


class _Holder:
    """The actor behind a lock."""

    def __init__(self, job: str) -> None:
        self._job = job

    def job(self) -> str:
        """Ray's number of the job that holds the lock."""
        return self._job


def _holder_of(name: str) -> str:
    import ray

    try:
        found: str = ray.get(ray.get_actor(name).job.remote(), timeout=5)
    except (ValueError, ray.exceptions.RayError):
        return ""
    return f" (Ray job {found})"


def ray_dashboard() -> str | None:
    """Address of the connected cluster's own dashboard; None where it has none."""
    import ray

    url: str | None = ray.init(ignore_reinit_error=True, logging_level="error").dashboard_url
    return url or None
