"""The command line that every job shares: `--config FILE key.sub=value ... [--dry-run]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from spo.config import RunConfig, load_config
from spo.errors import SpoError
from spo.session import connect
from spo.session.connect import Site
from spo.session.placement import Workload, phases_of


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
        with mirrored(config):
            call(arguments, config)


def workload(config: RunConfig) -> Workload:
    """The slices that say which processes a run starts."""
    return Workload(
        extract=config.extract,
        engine=config.engine,
        reward=config.reward,
        learn=config.learn,
        attack=config.attack,
        loop_attacks=config.data.attacks,
        attacks=config.evaluate.attacks,
    )


def cluster(config: RunConfig, stages: Sequence[str] = ()) -> AbstractContextManager[None]:
    """Connected to Ray for `stages` ("extract", "train", "evaluate"); see `spo.session.connect`."""
    site = Site(
        ray=config.ray,
        storage=config.storage,
        run_dir=config.run_dir,
        needs_plugin=config.engine.backend == "vllm",
    )
    return connect.cluster(site, phases_of(workload(config), stages))


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
def mirrored(config: RunConfig) -> Iterator[None]:
    """With a URL as `output_dir`: its files here while the job works, and back when it ends."""
    if config.run_url is None:
        yield
        return
    from spo.session.storage import mirrored as keep_mirrored

    def warn(text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    with keep_mirrored(config.run_url, config.run_dir, warn=warn):
        yield
