"""Look for what would make a job fail, on every node, and say how to mend it.

    python -m jobs.doctor --config tune_configs/testbed.yaml
    ray job submit --working-dir . -- python -m jobs.doctor output_dir=s3://bucket/runs

Versions, steering plugin, GPUs, memory, storage from every node, model and files, ports,
authentication, and room for each stage. Exit status 1 if there is a problem. `--self-test MODEL`
also runs the steering engine on a model (minutes).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

from jobs import command
from spo.config import RunConfig, load_config
from spo.errors import SpoError
from spo.session import connect
from spo.session.doctor import Finding, State, examine, good, problem, warning, worst
from spo.session.nodes import Question
from spo.session.placement import Room

_NODES_S = 180.0  # importing vLLM for the first time on a cold volume takes minutes
_HTTP_S = 5.0


def diagnose(config: RunConfig) -> list[Finding]:
    """Every finding; connects to the cluster of the job, the configured one, or a local one."""
    from spo.session.nodes import marker_in
    from spo.session.storage import check_writable

    findings = _authentication()
    try:
        check_writable(config.storage)
        findings.append(good("storage", f"{config.storage} is writable from here"))
    except SpoError as error:
        findings.append(problem("storage", str(error), "see the message; nothing can be saved"))
    try:
        with marker_in(config.cache) as marker:
            return findings + _on_cluster(config, question_of(config, marker))
    except OSError as error:
        return [*findings, problem("cache", str(error), "set cache_dir to a folder you can write")]


def question_of(config: RunConfig, marker: str) -> Question:
    """What the nodes are to look for: models, checkpoints and prompt files by their settings."""
    from spo.resolve import named_places

    named = named_places(config.corpus, config.reward)
    return Question(
        cache=str(config.cache),
        marker=marker,
        storage=config.storage,
        paths=named.paths,
        hub_models=named.hub_models,
        plugin_test=config.engine.backend == "vllm",
    )


def _on_cluster(config: RunConfig, question: Question) -> list[Finding]:
    from spo.session.nodes import ask_here, ask_nodes

    try:
        here = ask_here(question, "this process", 0.0)
        connect.connect(config.ray)
    except SpoError as error:
        return [problem("cluster", str(error), "see the message; nodes were not asked")]
    import ray

    try:
        findings = _dashboard() + _serve_port()
        answers = ask_nodes(question, timeout_s=_NODES_S)
        rooms = [Room.of(node) for node in ray.nodes() if node["Alive"]]
        return findings + examine(command.workload(config), question, here, answers, rooms)
    finally:
        ray.shutdown()


def _authentication() -> list[Finding]:
    """The token of this process, before anybody asks for it."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if mode == "token" and "RAY_AUTH_TOKEN" not in os.environ:
        if not path.is_file() or not path.read_text().strip():
            return [
                problem(
                    "authentication",
                    f"RAY_AUTH_MODE is token, and {path} holds none",
                    "copy the cluster's token there, or set RAY_AUTH_TOKEN_PATH",
                )
            ]
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            return [
                warning(
                    "authentication",
                    f"{path} can be read by other users; who has it can run code on the cluster",
                    f"chmod 600 {path}",
                )
            ]
    if mode == "disabled" and "RAY_ADDRESS" in os.environ:
        return [
            warning(
                "authentication",
                "off: anybody who reaches the ports of this cluster can run code on it",
                "RAY_AUTH_MODE=token on every node (cluster/kuberay does)",
            )
        ]
    return [good("authentication", mode or "Ray's default")]


def _dashboard() -> list[Finding]:
    """`ray job submit`, `ray logs` and Grafana go through the dashboard."""
    import ray
    from ray._private.authentication.http_token_authentication import (
        get_auth_headers_if_auth_enabled,
    )

    url = ray.get_runtime_context().gcs_address and ray._private.worker.get_dashboard_url()
    mend = "start the head with --include-dashboard=true, and open its port (8265) to this machine"
    if not url:
        return [warning("ports", "the cluster has no dashboard: no `ray job submit`", mend)]
    request = urllib.request.Request(
        f"http://{url}/api/version", headers=get_auth_headers_if_auth_enabled({})
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_HTTP_S):
            return [good("ports", f"dashboard answers at {url}")]
    except (OSError, urllib.error.URLError) as error:
        return [problem("ports", f"the dashboard at {url} does not answer: {error}", mend)]


def _serve_port(port: int = 8000) -> list[Finding]:
    """Ray Serve's port, unless Serve itself has it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            return [good("ports", f"{port} is free for Ray Serve")]
        except OSError:
            pass
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/-/healthz", timeout=_HTTP_S):
            return [good("ports", f"Ray Serve answers on {port}")]
    except (OSError, urllib.error.URLError) as error:
        return [
            warning(
                "ports",
                f"{port}, Ray Serve's port, is taken by something that is not Serve ({error})",
                "end that program, or serve on another port",
            )
        ]


def _self_test(model: str) -> Finding:
    """The engine's own check, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "spo.engines.vllm.self_test", model], check=False, timeout=1800
    )
    if done.returncode == 0:
        return good("self-test", f"{model} is steered, and equals the Hugging Face reference")
    return problem("self-test", f"failed on {model}, see above", "see the row that failed")


def _print(findings: list[Finding]) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    marks = {State.GOOD: "[green]ok  [/]", State.WARNING: "[yellow]look[/]"}
    for finding in findings:
        console.print(
            f"{marks.get(finding.state, '[red]BAD [/]')} [bold]{finding.check}[/]: ", end=""
        )
        console.print(finding.found, markup=False)
        if finding.mend:
            console.print(f"     mend: {finding.mend}", markup=False)
    problems = sum(finding.state is State.PROBLEM for finding in findings)
    console.print(f"{len(findings)} checks, {problems} problem(s)")


def main() -> None:
    """Parse, look, print."""
    made = command.parser(__doc__ or "")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the findings there")
    made.add_argument("--self-test", metavar="MODEL", help="also run the steering engine on MODEL")
    arguments: argparse.Namespace = made.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides)
        findings = diagnose(config)
    except SpoError as error:
        findings = [problem("configuration", str(error), "see the message; nothing was looked at")]
    if arguments.self_test:
        findings.append(_self_test(arguments.self_test))
    _print(findings)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(finding) for finding in findings], indent=2))
    sys.exit(1 if worst(findings) is State.PROBLEM else 0)


if __name__ == "__main__":
    main()
