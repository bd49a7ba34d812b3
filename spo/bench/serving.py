"""The endpoint against plain vLLM's own server: same model, same clients, same run.

Both servers are processes of their own. On a GPU both are resident and take turns; on a CPU one
runs after the other. Then, under load: vectors swapped, and the engine's process killed. Every
answer's receipt is held against what was published; an unsteered answer is counted as wrong.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import torch

from spo.artifact import SteeringArtifact
from spo.bench.engine import visible_cards
from spo.bench.serving_load import ClientRecord, Load, run_load
from spo.bench.serving_server import Server, free_port
from spo.bench.serving_table import Result
from spo.engines.identity import folder_revision, model_identity
from spo.errors import EngineError
from spo.records import Operator, Positions
from spo.serving.keys import Scope, add_key, new_key
from spo.vector import SteeringVector

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "shape": "llava-tiny",
        "dtype": "float32",
        "max_model_len": 512,
        "memory_gib": 0.5,
        "clients": 64,
        "tokens": 32,
        "picture": 56,
        "seconds": 15.0,
        "rounds": 1,
        "together": False,
        "gpu_memory": 0.0,
    },
    "testbed": {
        "shape": "",
        "dtype": "auto",
        "max_model_len": 512,
        "memory_gib": 1.0,
        "clients": 64,
        "tokens": 32,
        "picture": 112,
        "seconds": 60.0,
        "rounds": 1,
        "together": False,
        "gpu_memory": 0.0,
    },
    "h200": {
        "shape": "llava-1.5-7b",
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "memory_gib": 1.0,
        "clients": 64,
        "tokens": 128,
        "picture": 336,
        "seconds": 20.0,
        "rounds": 2,
        "together": True,
        "gpu_memory": 0.4,
    },
}


class Bench:
    """One comparison.

    Args:
        sizes: an entry of `PRESETS`.
        model: model folder.
        output: folder for logs, artifacts and results.
        time_limit: seconds after which nothing new is begun.
        say: receives progress lines.
    """

    def __init__(
        self,
        sizes: Mapping[str, Any],
        model: Path,
        output: Path,
        time_limit: float,
        say: Callable[[str], None],
    ) -> None:
        self.sizes = sizes
        self.model = model
        self.output = output
        self.begin = time.monotonic()
        self.deadline = self.begin + time_limit
        self.say = say
        self.secret = ""
        self.versions: dict[int, str] = {}
        self.dummy = ["--load-format", "dummy"] if sizes["shape"] else []

    def plain(self) -> tuple[Server, Load]:
        """vLLM's own server."""
        port, sizes = free_port(), self.sizes
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.model), "--served-model-name", "plain"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", sizes["dtype"]]
        command += ["--max-model-len", str(sizes["max_model_len"]), "--max-num-seqs", "64"]
        command += ["--limit-mm-per-prompt", '{"image": 4, "video": 0}', *self.dummy]
        if sizes["gpu_memory"]:
            command += ["--gpu-memory-utilization", str(sizes["gpu_memory"])]
            devices = {"CUDA_VISIBLE_DEVICES": visible_cards()[-1]}
        else:
            bytes_ = int(sizes["memory_gib"] * (1 << 30))
            command += ["--kv-cache-memory-bytes", str(bytes_), "--enforce-eager"]
            devices = {}
        base = f"http://127.0.0.1:{port}"
        server = Server("plain vLLM", command, self.output / "plain.log", f"{base}/health", devices)
        return server, self._load(f"{base}/v1", "plain", "none")

    def steered(self) -> tuple[Server, Load]:
        """Our server with two vectors to swap."""
        port, sizes = free_port(), self.sizes
        store = self.output / "artifacts"
        for number in (1, 2):
            artifact = self._artifact(number)
            artifact.save(store / f"v{number}")
            self.versions[number] = artifact.vector.sha256
        keys = self.output / "keys.json"
        keys.unlink(missing_ok=True)
        self.secret, key = new_key("bench", Scope)
        add_key(keys, key)
        options = {"load_format": "dummy"} if self.dummy else {}
        on_gpu = bool(sizes["gpu_memory"])
        command = [sys.executable, "-m", "jobs.serve", "--artifact", f"bench={store / 'v1'}"]
        command += [
            f"model.id={self.model}",
            f"output_dir={self.output}",
            f"name=serve-{port}",
            f"engine.dtype={sizes['dtype']}",
            f"engine.max_model_len={sizes['max_model_len']}",
            "engine.max_num_seqs=64",
            f"engine.memory_gib={sizes['memory_gib']}",
            f"engine.num_gpus={1 if on_gpu else 0}",
            f"engine.gpu_memory_utilization={sizes['gpu_memory'] or 0.5}",
            f"serve.port={port}",
            "serve.model_name=model",
            f"serve.keys_file={keys}",
            f"serve.artifacts_dir={store}",
            "serve.deadline_s=300",
            "serve.drain_s=301",
            "serve.max_in_flight=256",
            "serve.max_per_key=256",
            "serve.health_timeout_s=120",
            f"serve.engine_options={json.dumps(options)}",
        ]
        base = f"http://127.0.0.1:{port}"
        environment = {"CUDA_VISIBLE_DEVICES": visible_cards()[0]} if on_gpu else {}
        server = Server(
            "our server", command, self.output / "serve.log", f"{base}/readyz", environment
        )
        return server, self._load(f"{base}/v1", "model:bench", self.secret)

    def _load(self, url: str, model: str, key: str) -> Load:
        sizes = self.sizes
        return Load(
            url=url,
            model=model,
            key=key,
            clients=sizes["clients"],
            seconds=sizes["seconds"],
            tokens=sizes["tokens"],
            picture=sizes["picture"],
        )

    def _artifact(self, seed: int) -> SteeringArtifact:
        config = json.loads((self.model / "config.json").read_text())
        text = config.get("text_config", config)
        count, hidden = text["num_hidden_layers"], text["hidden_size"]
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(count, hidden, generator=generator)
        vector = SteeringVector(
            layers=tuple(range(count)),
            directions=rows / rows.norm(dim=-1, keepdim=True) * hidden**0.5,
            mean_norms=torch.full((count,), float(hidden**0.5)),
            calibration=torch.zeros(count, hidden),
            model_id=model_identity(str(self.model)),
            model_revision=folder_revision(str(self.model)),
        )
        return SteeringArtifact(
            vector=vector,
            operator=Operator.ADD,
            coefficient=0.1,
            positions=Positions.ALL,
            method="random, for measurements",
        )

    def check(self, seen: ClientRecord) -> dict[str, int]:
        """Answers whose receipt is not that of a published version, and unsteered ones."""
        wrong = sum(
            receipt is not None and self.versions.get(receipt["version"]) != receipt["sha256"]
            for receipt in seen.receipts
        )
        return {"wrong": wrong, "unsteered": sum(receipt is None for receipt in seen.receipts)}

    async def measure(self, phase: str, load: Load, result: Result) -> None:
        """One timed phase, after a short one that warms up."""
        if time.monotonic() + load.seconds > self.deadline:
            self.say(f"{phase}: left out, no time")
            return
        await run_load(replace(load, seconds=1.0))
        seen = await run_load(load)
        row = seen.row()
        if load.model.endswith(":bench"):
            row["checks"] = self.check(seen)
        result.add(phase, row)
        self.say(f"{time.monotonic() - self.begin:6.1f} s  {phase}: {json.dumps(row)}")

    async def swap(self, load: Load, count: int, result: Result) -> None:
        """Make one version live, then the other, under load."""
        seen = ClientRecord()
        running = asyncio.create_task(run_load(load, seen))
        times = []
        headers = {"Authorization": f"Bearer {self.secret}"}
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            for number in range(count):
                body = {"name": "bench", "artifact": f"v{1 + (number + 1) % 2}"}
                begin = time.monotonic()
                async with session.post(f"{load.url}/steering/vectors", json=body) as answer:
                    if answer.status != 200:
                        raise EngineError(f"swap {number}: {await answer.text()}")
                times.append(time.monotonic() - begin)
                await asyncio.sleep(max(0.0, load.seconds / count - times[-1]))
        await running
        used = {receipt["version"] for receipt in seen.receipts if receipt}
        checks = {**self.check(seen), "swaps": count, "versions": len(used)}
        checks["swap_ms"] = round(1e3 * sorted(times)[len(times) // 2])
        result.add("swapping", {**seen.row(), "checks": checks})
        self.say(f"swapping: {seen.row()} {checks}")

    async def kill(self, server: Server, load: Load, result: Result, what: str = "engine") -> None:
        """Kill vLLM's "engine" process, or the "replica" that owns it, under load; wait until
        answers come again."""
        seen = ClientRecord()
        running = asyncio.create_task(run_load(load, seen))
        await asyncio.sleep(load.seconds / 3)
        for process in server.processes(what):
            process.kill()
        begin, before = time.monotonic(), len(seen.latencies)
        await running
        while len(seen.latencies) <= before and time.monotonic() < self.deadline:
            await run_load(replace(load, clients=4, seconds=5.0), seen)
        checks = {**self.check(seen), "back_after_s": round(time.monotonic() - begin)}
        checks["answered_after"] = len(seen.latencies) - before
        result.add(f"{what} killed", {**seen.row(), "checks": checks})
        self.say(f"{what} killed: {seen.row()} {checks}")

    async def stress(
        self, server: Server, load: Load, result: Result, *, swaps: int, soak: float, kill: bool
    ) -> None:
        """A long phase, swaps, and kills, as far as there is time."""
        if soak:
            await self.measure(f"steered, {soak:.0f} s", replace(load, seconds=soak), result)
        if swaps and time.monotonic() + load.seconds < self.deadline:
            await self.swap(load, swaps, result)
        for what in ("engine", "replica") if kill else ():
            if time.monotonic() + load.seconds < self.deadline:
                await self.kill(server, load, result, what)


async def _measure(bench: Bench, result: Result, *, swaps: int, soak: float, kill: bool) -> None:
    sizes = bench.sizes
    servers: list[Server] = []
    try:
        plain, load = bench.plain()
        servers.append(plain)
        pair = bench.steered() if sizes["together"] else None
        servers += pair[:1] if pair else []
        result.facts["plain start, s"] = round(await plain.wait_ready(bench.deadline))
        if not sizes["together"]:
            for _ in range(sizes["rounds"]):
                await bench.measure("plain vLLM", load, result)
            plain.stop()
        ours, steered = pair or bench.steered()
        if pair is None:
            servers.append(ours)
        result.facts["our start, s"] = round(await ours.wait_ready(bench.deadline))
        bench.say(f"started: {result.facts}")
        for _ in range(sizes["rounds"]):
            if sizes["together"]:
                await bench.measure("plain vLLM", load, result)
            await bench.measure("ours, unsteered", replace(steered, model="model"), result)
            await bench.measure("ours, steered", steered, result)
        await bench.stress(ours, steered, result, swaps=swaps, soak=soak, kill=kill)
    finally:
        for server in servers:
            server.stop()


def run(  # noqa: PLR0913 - what is measured, and for how long
    preset: str,
    output: Path,
    *,
    time_limit: float,
    model: Path | None = None,
    seconds: float | None = None,
    swaps: int = 50,
    soak: float = 0.0,
    kill: bool = True,
    say: Callable[[str], None] = print,
) -> Result:
    """Compare, swap and kill; results.json in `output` is complete after every phase.

    Args:
        preset: key of `PRESETS`.
        output: folder for logs and results.
        time_limit: seconds after which nothing new is begun.
        model: model folder; the preset's shape with random weights if absent.
        seconds: length of a phase; the preset's own if absent.
        swaps: how often the live vector changes under load; 0 leaves the phase out.
        soak: seconds of one long steered phase; 0 leaves it out.
        kill: whether to kill the engine's process, then its replica, under load.
        say: receives progress lines.
    """
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    sizes = {**PRESETS[preset], **({"seconds": seconds} if seconds else {})}
    if model is None:
        from spo.bench.shapes import write_shape

        model = write_shape(sizes["shape"], output / "models" / sizes["shape"])
    result = Result(preset=preset, path=output / "results.json")
    bench = Bench(sizes, model.absolute(), output, time_limit, say)
    try:
        asyncio.run(_measure(bench, result, swaps=swaps, soak=soak, kill=kill))
    finally:
        (output / "table.md").write_text(result.table() + "\n")
    return result
