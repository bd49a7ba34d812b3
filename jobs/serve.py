"""Serve a steered model behind an OpenAI-compatible endpoint, until Ctrl-C.

    python -m jobs.serve --config tune_configs/testbed.yaml --artifact outputs/testbed/spo
    python -m jobs.serve --artifact polite=my-vector --artifact strict=other serve.port=9000
    python -m jobs.serve --add-key alice:use serve.keys_file=keys.json

Without `serve.keys_file` a key is made for this run and printed. The vector's name is that of its
folder unless NAME=DIR gives another; clients then ask for the model MODEL:NAME. `serve deploy`
with cluster/serve/serve.yaml puts the same application on a running cluster.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import command
from spo.config import RunConfig, load_config
from spo.errors import ConfigError

if TYPE_CHECKING:
    from ray.serve import Application

    from spo.serving.deployment import ServeSettings
    from spo.serving.keys import Key


def build(args: Mapping[str, Any]) -> Application:
    """The application of a Serve config file: `import_path: jobs.serve:build`.

    Args:
        args: `config` (a YAML file), `overrides` (a list of key.sub=value) and `artifacts`
            (vector names and their folders).
    """
    from spo.serving.deployment import application

    unknown = set(args) - {"config", "overrides", "artifacts"}
    if unknown:
        raise ConfigError(f"args are config, overrides and artifacts, got {sorted(unknown)}")
    path = args.get("config")
    config = load_config(Path(path) if path else None, args.get("overrides", ()))
    artifacts = {name: Path(folder) for name, folder in args.get("artifacts", {}).items()}
    return application(settings_of(config, artifacts, ()))


def settings_of(
    config: RunConfig, artifacts: Mapping[str, Path], keys: Sequence[Key]
) -> ServeSettings:
    """What the replicas need, with bad artifacts and missing keys found out first."""
    from spo.artifact import SteeringArtifact
    from spo.engines.identity import folder_revision, model_identity
    from spo.resolve import resolve_model
    from spo.serving.deployment import ServeSettings
    from spo.serving.keys import KeyRing

    limits = config.serve
    KeyRing(keys, limits.keys_file, open_to_all=limits.auth == "none")
    fake = config.engine.backend == "fake"
    model = resolve_model(config.model, config.cache) if not fake else None
    for folder in artifacts.values():
        SteeringArtifact.load(
            folder,
            model_id=model_identity(model.path) if model else "fake",
            model_revision=(model.revision or folder_revision(model.path)) if model else "",
        )
    name = limits.model_name or Path(config.model.id).name
    if ":" in name or "@" in name:
        raise ConfigError(f"serve.model_name must not contain ':' or '@', got {name!r}")
    state = limits.state_dir or config.run_dir / "serve"
    return ServeSettings(
        model=model.path if model else "fake",
        revision=model.revision if model else None,
        name=name,
        engine=config.engine,
        serve=limits,
        state_dir=state.expanduser().absolute(),
        artifacts={key: folder.expanduser().absolute() for key, folder in artifacts.items()},
        keys=tuple(keys),
        seed=config.seed,
    )


def _named(arguments: Sequence[str]) -> dict[str, Path]:
    from spo.artifact import located

    artifacts: dict[str, Path] = {}
    for text in arguments:
        name, sign, folder = text.rpartition("=")
        path = located(folder)
        name = name if sign else path.resolve().name.lower()
        if name in artifacts:
            raise ConfigError(f"two vectors are named {name!r}; use --artifact NAME=DIR")
        artifacts[name] = path
    return artifacts


def _add_key(text: str, config: RunConfig) -> None:
    from spo.serving.keys import add_key, new_key, parse_scopes

    path = config.serve.keys_file
    if path is None:
        raise ConfigError("say which file keeps the keys: serve.keys_file=FILE")
    name, _, scopes = text.partition(":")
    secret, key = new_key(name, parse_scopes(scopes or "use"))
    add_key(path, key)
    print(f"key {name} ({', '.join(sorted(key.scopes))}), shown only now: {secret}")


def _run(arguments: argparse.Namespace, config: RunConfig) -> None:
    if arguments.add_key:
        _add_key(arguments.add_key, config)
        return
    from ray import serve

    from spo.serving.deployment import APP, application, http_options
    from spo.serving.keys import Scope, new_key

    limits = config.serve
    secret, keys = "", []
    if limits.keys_file is None and limits.auth == "keys":
        secret, key = new_key("this-run", Scope)
        keys.append(key)
    settings = settings_of(config, _named(arguments.artifact), keys)
    stop = threading.Event()
    # Ray Serve's own 5 s are too short for a proxy that starts on a busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    # Ray's workers run at niceness 15, as befits batch jobs; people wait for these answers.
    os.environ.setdefault("RAY_worker_niceness", "0")
    with command.cluster(config):
        # Not before: connecting to Ray puts a handler of its own in their place, which aborts.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(f"starting {config.engine.backend} on {settings.model} ...", flush=True)
        serve.start(http_options=http_options(limits))
        serve.run(
            application(settings),
            name=APP,
            route_prefix="/",
            # The gateway's own line for each request says more.
            logging_config={"enable_access_log": False},
        )
        host = f"http://{limits.host}:{limits.port}"
        for name in sorted(settings.artifacts):
            print(f"model: {settings.name}:{name}")
        if secret:
            print(f"key:   {secret}")
        print(f"page:  {host}/{f'#key={secret}' if secret else ''}")
        print(f"API:   {host}/v1   (Ctrl-C stops it and lets answers finish)", flush=True)
        stop.wait()
        print("stopping ...", flush=True)
        serve.shutdown()


if __name__ == "__main__":
    made = command.parser(__doc__ or "")
    made.add_argument(
        "--artifact",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="vector to load: a folder, or release:guarded/spo",
    )
    made.add_argument(
        "--add-key", metavar="NAME[:SCOPES]", help="make a key (use, unsteered, manage) and stop"
    )
    command.main(made, _run)
