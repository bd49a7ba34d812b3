#!/usr/bin/env python3
"""A Ray cluster of several nodes on this machine, for trying what runs on a real one.

    python cluster/local.py start --workers 2                 # head and two workers
    python cluster/local.py start --auth --role rollout --role learner
    eval "$(python cluster/local.py env)"                     # RAY_ADDRESS, token, for this shell
    python cluster/local.py status
    python cluster/local.py stop

`stop` ends the processes that this `start` began and no others; `ray stop` would end every Ray
process on the machine. State, logs and the token are in the state folder.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

_START_S = 180.0
_STOP_S = 15.0
_SLOW = "timed out during startup"
"""Ray gives a node 30 s, which on a busy machine are short: it is started again."""


class LocalCluster:
    """The nodes that one `start` began, remembered in a state folder.

    Args:
        state: folder of state.json, token and logs.
    """

    def __init__(self, state: Path) -> None:
        self._folder = state
        self._file = state / "state.json"
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._again: dict[str, Callable[[], None]] = {}

    def start(
        self,
        *,
        workers: list[str | None],
        cpus: int,
        gpus: int,
        port: int,
        dashboard_port: int,
        auth: bool,
    ) -> dict[str, Any]:
        """Start a head and one worker for each entry of `workers` (its role label, or None)."""
        if self.processes():
            raise SystemExit(f"already running (state in {self._folder}); stop it first")
        taken = [p for p in (port, dashboard_port) if p and not _free(p)]
        if taken:
            raise SystemExit(
                f"port(s) {taken} are in use, perhaps by another Ray; choose others with --port "
                "and --dashboard-port, or 0 for any"
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, mode=0o700)
        port, dashboard_port = port or _any_port(), dashboard_port or _any_port()
        variables = {"RAY_AUTH_MODE": "disabled"}
        if auth:
            token = self._folder / "token"
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        state: dict[str, Any] = {
            "address": f"127.0.0.1:{port}",
            "dashboard": f"http://127.0.0.1:{dashboard_port}",
            "environment": variables,
            "nodes": [],
        }
        # Ray Client's server too gets a port of its own: another head here has the default one.
        client = f"--ray-client-server-port={_any_port()}"
        head = ["--head", f"--port={port}", f"--dashboard-port={dashboard_port}", client]
        join = [f"--address=127.0.0.1:{port}"]
        try:
            self._node(state, "head", [*head, f"--num-cpus={cpus}", "--num-gpus=0"], variables)
            # A worker that comes before the head knows itself gives up.
            self._await_nodes(state)
            for i, role in enumerate(workers):
                label = [f"--labels=role={role}"] if role else []
                size = [f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
                self._node(state, f"worker-{i}", [*join, *size, *label], variables)
            self._await_nodes(state)
        except BaseException:
            self.stop()
            raise
        return state

    @staticmethod
    def _own_folder(state: dict[str, Any], name: str) -> list[str]:
        """Ray's folder of a worker: in a shared one, a node that unpacks a job's working_dir
        clears it under the job that another node runs from it.
        """
        port = state["address"].rpartition(":")[2]
        folder = Path(tempfile.gettempdir()) / f"ray-{port}-{name}"  # short: it holds sockets
        shutil.rmtree(folder, ignore_errors=True)
        return [f"--temp-dir={folder}"]

    def _node(
        self, state: dict[str, Any], name: str, arguments: list[str], variables: dict[str, str]
    ) -> None:
        """`ray start --block` in a session of its own: its processes can be told from others."""
        ray = Path(sys.executable).with_name("ray")
        # Nodes of one machine would share the agent's default port.
        agent = [f"--dashboard-agent-listen-port={_any_port()}", "--disable-usage-stats"]
        folder = [] if name == "head" else self._own_folder(state, name)
        # A driver gets 30 s for its last words on `ray job stop`, not Ray's three.
        own = {"RAY_JOB_STOP_WAIT_TIME_S": "30", "PYTHONUNBUFFERED": "1"}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH_")}
        environment.pop("RAY_ADDRESS", None)
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(ray), "start", "--block", *arguments, *agent, *folder],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment | own | variables,
            )
        self._started[name] = process
        self._again[name] = lambda: self._node(state, name, arguments, variables)
        state["nodes"] = [node for node in state["nodes"] if node["name"] != name]
        born = psutil.Process(process.pid).create_time()
        state["nodes"].append({"name": name, "pid": process.pid, "born": born})
        self._file.write_text(json.dumps(state, indent=2))

    def _await_nodes(self, state: dict[str, Any]) -> None:
        """Wait until every node has joined; a node that ended says why in its log."""
        end = time.monotonic() + _START_S
        # Ray reads the authentication mode once a process: ask in another one.
        ask = "import ray; ray.init(address='auto', logging_level='ERROR'); print(len(ray.nodes()))"
        environment = os.environ | state["environment"] | {"RAY_ADDRESS": state["address"]}
        while True:
            for name, process in list(self._started.items()):
                if process.poll() is not None:
                    log = (self._folder / f"{name}.log").read_text(errors="replace")
                    if _SLOW in log and time.monotonic() < end:
                        self._again[name]()
                        continue
                    raise SystemExit(f"{name} ended while it started:\n{log[-1500:]}")
            joined = self._ask(ask, environment)
            if joined == str(len(state["nodes"])):
                return
            if time.monotonic() > end:
                raise SystemExit(
                    f"waited {_START_S:.0f} s for {len(state['nodes'])} nodes, {joined or 0} "
                    f"joined; logs are in {self._folder}"
                )

    @staticmethod
    def _ask(program: str, environment: dict[str, str]) -> str:
        """Last line that a Python program prints; "" if it fails or takes too long."""
        try:
            done = subprocess.run(
                [sys.executable, "-c", program],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_START_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout.strip().rpartition("\n")[2]

    def stop(self) -> int:
        """End what `start` began: each node, its Ray processes, their workers and job drivers."""
        family = self.processes()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=_STOP_S)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_STOP_S)
        self._file.unlink(missing_ok=True)
        return len(family)

    def processes(self) -> list[psutil.Process]:
        """Living processes of this cluster: descendants of its nodes and members of their sessions.

        A number that the system gave to another process since is told by its birth.
        """
        leaders = {node["pid"]: node["born"] for node in self.state().get("nodes", [])}
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                leader = os.getsid(process.pid)
                if leader in leaders and process.create_time() >= leaders[leader] - 1:
                    found[process.pid] = process
                    for child in process.children(recursive=True):
                        found[child.pid] = child
        return list(found.values())

    def state(self) -> dict[str, Any]:
        """What `start` wrote; empty when nothing runs."""
        return json.loads(self._file.read_text()) if self._file.is_file() else {}


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_lines(state: dict[str, Any]) -> list[str]:
    """Shell lines that point `ray` and the jobs to the cluster."""
    variables = {
        "RAY_ADDRESS": state["address"],
        "RAY_API_SERVER_ADDRESS": state["dashboard"],
        **state["environment"],
    }
    return [f"export {name}={value}" for name, value in variables.items()]


def main(arguments: list[str] | None = None) -> None:
    """Parse and act."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("XDG_STATE_HOME", "~/.local/state")) / "spo-vlm" / "cluster"
    parser.add_argument("--state", type=Path, default=default, metavar="DIR")
    verbs = parser.add_subparsers(dest="verb", required=True)
    start = verbs.add_parser("start", help="start a head and workers")
    start.add_argument("--workers", type=int, default=0, help="workers without a role")
    start.add_argument("--role", action="append", default=[], help="one more worker, so labelled")
    start.add_argument("--cpus", type=int, default=4, help="CPUs that each node reports")
    start.add_argument("--gpus", type=int, default=0, help="GPUs that each worker reports")
    start.add_argument("--port", type=int, default=6379, help="0 takes any free one")
    start.add_argument("--dashboard-port", type=int, default=8265, help="0 takes any free one")
    start.add_argument("--auth", action="store_true", help="token authentication")
    verbs.add_parser("env", help='print exports for eval "$(...)"')
    verbs.add_parser("status", help="say what runs")
    verbs.add_parser("stop", help="end it")
    chosen = parser.parse_args(arguments)
    folder = chosen.state.expanduser()
    cluster = LocalCluster(folder)
    if chosen.verb == "start":
        state = cluster.start(
            workers=[None] * chosen.workers + chosen.role,
            cpus=chosen.cpus,
            gpus=chosen.gpus,
            port=chosen.port,
            dashboard_port=chosen.dashboard_port,
            auth=chosen.auth,
        )
        print(
            f"{len(state['nodes'])} node(s) at {state['address']}, dashboard {state['dashboard']}"
        )
        print('next: eval "$(python cluster/local.py env)"')
        return
    if chosen.verb == "stop":
        print(f"ended {cluster.stop()} process(es)")
        return
    state = cluster.state()
    if not state or not cluster.processes():
        raise SystemExit(f"no cluster of {folder} is running; see `start`")
    if chosen.verb == "env":
        print("\n".join(environment_lines(state)))
    else:
        names = ", ".join(node["name"] for node in state["nodes"] if psutil.pid_exists(node["pid"]))
        print(f"{state['address']}: {names}; {len(cluster.processes())} processes")


if __name__ == "__main__":
    main()
