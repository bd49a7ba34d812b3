"""The command line that every job shares: `--config FILE key.sub=value ... [--dry-run]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spo.config import RunConfig, load_config
from spo.errors import SpoError


def parser(description: str) -> argparse.ArgumentParser:
    """Argument parser with the options that every job has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--config", type=Path, metavar="FILE", help="YAML file, see tune_configs/")
    made.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a setting")
    made.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and stop"
    )
    return made


def main(
    made: argparse.ArgumentParser, call: Callable[[argparse.Namespace, RunConfig], None]
) -> None:
    """Parse, validate, then `call`; errors meant for people come without a traceback."""
    arguments = made.parse_intermixed_args()
    with errors_for_people():
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            print(config.to_yaml(), end="")
            return
        call(arguments, config)


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Errors that say what to do end the program without a traceback (SPO_TRACEBACK=1 shows it)."""
    try:
        yield
    except SpoError as error:
        if os.environ.get("SPO_TRACEBACK"):
            raise
        # An error that crossed Ray carries the remote traceback in its text; people need the cause.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if os.environ.get("SPO_TRACEBACK"):
            raise
        print(f"error: {error}; check the path and the free space", file=sys.stderr)
        sys.exit(1)


@contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """Connected to Ray: the cluster of the submitted job, the configured one, or a local one."""
    import logging

    import ray
    import ray.data

    local = config.ray.address is None and "RAY_ADDRESS" not in os.environ
    cpus = config.ray.num_cpus or max(4, os.cpu_count() or 1)
    # Roles work in turn on a small machine, so each may use every core; threads that spin while
    # they wait would stop the others (measured: twenty times slower).
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "OMP_WAIT_POLICY": "PASSIVE"}
    ray.init(
        # "local" by name: without it Ray joins any cluster that it finds on this machine.
        address="local" if local else config.ray.address,
        num_cpus=cpus if local else None,
        namespace=config.ray.namespace,
        log_to_driver=bool(os.environ.get("SPO_WORKER_LOGS")),
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {**threads, "GOMP_SPINCOUNT": "0"}} if local else None,
    )
    ray.data.DataContext.get_current().enable_progress_bars = sys.stdout.isatty()
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def ray_dashboard() -> str | None:
    """Address of the connected cluster's own dashboard; None where it has none."""
    import ray

    url: str | None = ray.init(ignore_reinit_error=True, logging_level="error").dashboard_url
    return url or None
