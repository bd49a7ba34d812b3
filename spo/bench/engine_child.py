"""One engine of the benchmark, in a process of its own; JSON lines in, lines that start with @ out.

Started by `spo.bench.engine`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from spo.bench.shapes import write_random_weights, write_shape
from spo.engines.base import LogprobRequest, Sampler
from spo.engines.vllm.engine import VllmEngine
from spo.engines.vllm.launch import VllmSettings, start_llm
from spo.engines.vllm.plugin.wire import REQUEST_KEY, cache_salt
from spo.errors import SpoError
from spo.records import Operator, Prompt, PromptKind, SteeringSpec
from spo.vector import SteeringVector

_NAME = "bench"


class BenchEngine:
    """A plain or steered engine with prompts ready to be timed."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        folder = write_shape(settings["shape"], Path(settings["folder"]))
        if settings.get("weights"):
            write_random_weights(folder, settings["dtype"])
        begin = time.monotonic()
        ranks = settings["tensor_parallel"]
        start = VllmSettings(
            dtype=settings["dtype"],
            slots=max(8, settings["pairs"] + 1),
            lanes=settings["lanes"],
            capture_rows=0,
            body="kernel" if settings["engine"] == "plain" else settings["engine"],
            max_model_len=2048,
            max_num_seqs=max(settings["batches"]),
            kv_cache_gib=settings["kv_cache_gib"],
            tensor_parallel_size=ranks,
            enforce_eager=settings["eager"],
            in_process=settings["eager"] and ranks == 1,
            # Cached prompts would make the second run of a pair faster, whatever the engine.
            engine_options={
                "load_format": "auto" if settings.get("weights") else "dummy",
                "enable_prefix_caching": False,
                **settings["options"],
            },
        )
        self.engine: VllmEngine | None = None
        if settings["engine"] == "plain":
            self.llm = start_llm(str(folder), None, start, None)
        else:
            self.engine = VllmEngine(str(folder), settings=start)
            self.llm = self.engine.session.llm
        self.start_seconds = time.monotonic() - begin
        self.runs = 0
        self.warm: set[int] = set()

    def facts(self) -> dict[str, Any]:
        """What is running, and how long publishing takes."""
        import vllm

        config = self.llm.llm_engine.vllm_config
        facts: dict[str, Any] = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "compilation": str(config.compilation_config.mode),
            "cudagraphs": str(config.compilation_config.cudagraph_mode),
            "start_seconds": round(self.start_seconds, 1),
        }
        if torch.cuda.is_available():
            facts["device"] = torch.cuda.get_device_name()
            facts["driver"] = _driver()
        if self.engine is not None:
            facts["canary"] = {k: f"{v:.3g}" for k, v in self.engine.canary.items()}
            facts["publish_ms"] = self.publish_all()
            if self.settings.get("weights"):
                facts["mixed_batch"] = self.mixed_batch()
                facts["parity"] = self.parity()
            facts.update(self.describe())
        return facts

    def describe(self) -> dict[str, Any]:
        """Runner, captured CUDA graphs and how many steps each mode served, from the workers."""
        assert self.engine is not None
        ranks = [json.loads(text) for text in self.engine.session.rpc("spo_describe")]
        names = ("runner", "twin_graphs", "graphs", "steps")
        return {"ranks": len(ranks), **{name: ranks[0][name] for name in names}}

    def mixed_batch(self) -> dict[str, float]:
        """Unsteered and steered requests that decode together in one CUDA graph, against solo runs.

        Every request is made to say the same token; its log-probability is what is compared.
        """
        kinds = ("none", "add", "adaptive")
        alone = {kind: self._decoded([kind])[0] for kind in kinds}
        names = [kinds[i % 3] for i in range(max(self.settings["batches"]))]
        gap = max(
            _distance(values, alone[name])
            for name, values in zip(names, self._decoded(names), strict=True)
        )
        effect = min(
            _distance(alone[one], alone[other])
            for one, other in (("none", "add"), ("none", "adaptive"), ("add", "adaptive"))
        )
        return {"largest gap": gap, "least effect of steering": effect}

    def _decoded(self, kinds: Sequence[str]) -> list[list[float]]:
        """Log-probability of one forced token at each of 8 decoding steps, for each request."""
        from vllm import SamplingParams

        assert self.engine is not None
        session, token = self.engine.session, 65
        specs = [self._specs(kind, 0) for kind in kinds]
        strong = [tuple(replace(spec, coefficient=0.5) for spec in chosen) for chosen in specs]
        with session.bound(strong) as bindings:
            jobs = []
            for binding in bindings:
                params = SamplingParams(
                    max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0, detokenize=False
                )
                params.allowed_token_ids = [token]
                jobs.append(session.builder.ask_tokens(binding, range(40, 60), params))
            outputs = session.run(jobs)
            session.receipts(bindings, jobs, outputs)
        return [[step[token].logprob for step in output.outputs[0].logprobs] for output in outputs]

    def logprobs(self) -> dict[str, list[float]]:
        """Log-probability of fixed tokens after fixed prompts, unsteered and steered."""
        assert self.engine is not None
        return self._scored(self.engine)

    def parity(self) -> dict[str, dict[str, float]]:
        """The same against Transformers with a forward hook, same weights and precision."""
        from spo.engines.hf.engine import HfEngine

        assert self.engine is not None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reference = HfEngine(
            self.settings["folder"], dtype=self.settings["dtype"], device=device, batch_size=1
        )
        for version in range(self.settings["lanes"]):
            reference.publish(f"{_NAME}{version}", self._vector(version), 1)
        ours, theirs = self._scored(self.engine), self._scored(reference)
        reference.close()
        return {
            name: {
                "mean gap": _mean_distance(values, theirs[name]),
                "mean effect": _mean_distance(theirs[name], theirs["none"]),
            }
            for name, values in ours.items()
        }

    def _scored(self, engine: Sampler) -> dict[str, list[float]]:
        path = Path(self.settings["folder"]) / "picture.png"
        self._picture(0).save(path)
        prompts = [
            Prompt(prompt_id=str(i), text="Why? " * (8 + i), kind=PromptKind.BENIGN, image=image)
            for i, image in enumerate((str(path), None))
        ]
        values = {}
        for operator in (None, *Operator):
            # Strong enough that a rank or a graph that leaves it out cannot go unseen.
            spec = operator and SteeringSpec(
                vector=f"{_NAME}0", version=1, coefficient=0.5, operator=operator
            )
            requests = [
                LogprobRequest(
                    request_id=prompt.prompt_id,
                    prompt=prompt,
                    token_ids=tuple(range(40, 72)),
                    steering=spec,
                )
                for prompt in prompts
            ]
            scored = [value for row in engine.logprobs(requests) for value in row]
            values[operator.value if operator else "none"] = scored
        return values

    def _vector(self, seed: int) -> SteeringVector:
        """A random vector on all layers that opens every gate."""
        assert self.engine is not None
        info = self.engine.info
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(info.num_layers, info.hidden_size, generator=generator)
        return SteeringVector(
            layers=tuple(range(info.num_layers)),
            directions=directions,
            mean_norms=torch.full((info.num_layers,), info.hidden_size**0.5),
            calibration=-10.0 * directions,
            model_id=info.model_id,
            model_revision=info.model_revision,
        )

    def publish_all(self) -> dict[str, float]:
        """Publish one vector for each pair; latency in milliseconds."""
        assert self.engine is not None
        times = []
        for version in range(self.settings["pairs"]):
            vector = self._vector(version)
            begin = time.perf_counter()
            self.engine.publish(f"{_NAME}{version}", vector, 1)
            times.append(1e3 * (time.perf_counter() - begin))
        return {"median": round(median(times), 2), "max": round(max(times), 2)}

    def measure(self, workload: Mapping[str, Any]) -> dict[str, float]:
        """Time one batch; the first of its size runs once before, untimed."""
        tokens = self.settings["tokens"]
        if workload["batch"] not in self.warm:
            self._timed(workload["batch"], "none", 8)
            self.warm.add(workload["batch"])
        self.runs += 1
        seconds, count = self._timed(workload["batch"], workload["steering"], tokens)
        return {"seconds": seconds, "tokens": count}

    def _specs(self, steering: str, i: int) -> tuple[SteeringSpec, ...]:
        if steering in ("none", "idle"):
            return ()
        if steering == "stacked":
            return tuple(
                SteeringSpec(vector=f"{_NAME}{lane}", version=1, coefficient=0.02)
                for lane in range(self.settings["lanes"])
            )
        pairs = self.settings["pairs"]
        return (
            SteeringSpec(
                vector=f"{_NAME}{i % pairs if steering == 'pairs' else 0}",
                version=1,
                coefficient=spread(pairs)[i % pairs] if steering == "pairs" else 0.05,
                operator=Operator.ADAPTIVE if steering == "adaptive" else Operator.ADD,
            ),
        )

    def _timed(self, batch: int, steering: str, tokens: int) -> tuple[float, int]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        bindings = []
        if self.engine is not None:
            bindings = self.engine.desk.bind([self._specs(steering, i) for i in range(batch)])
        jobs = []
        for i in range(batch):
            params = SamplingParams(
                max_tokens=tokens,
                temperature=0.0,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            entry = self._entry(i)
            if bindings and bindings[i].lanes:
                params.extra_args = {REQUEST_KEY: bindings[i].wire()}
                entry["cache_salt"] = cache_salt(bindings[i].lanes)
            key = bindings[i].key if bindings else f"{self.runs}-{i}"
            jobs.append((key, self.llm._preprocess_cmpl_one(entry), params))
        core = self.llm.llm_engine
        begin = time.perf_counter()
        for job in jobs:
            core.add_request(*job)
        count = 0
        while core.has_unfinished_requests():
            for output in core.step():
                count += len(output.outputs[0].token_ids)
        seconds = time.perf_counter() - begin
        if self.engine is not None:
            self._check(bindings, tokens)
            self.engine.desk.release(bindings)
        return seconds, count

    def _check(self, bindings: list[Any], tokens: int) -> None:
        """Every request was steered on every token that went through the model."""
        assert self.engine is not None
        steered = [binding for binding in bindings if binding.lanes]
        if not steered:
            return
        for rank in self.engine.session.figures([binding.key for binding in steered]):
            for binding, figure in zip(steered, rank, strict=True):
                wanted = figure["until"] - figure["first"]
                least = figure["prompt_length"] + tokens - 1
                if set(figure["steered"]) != {wanted} or figure["until"] < least:
                    raise SpoError(f"request {binding.key} was not steered throughout: {figure}")

    def _picture(self, i: int) -> Image.Image:
        side = self.settings["image"]
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def _entry(self, i: int) -> dict[str, Any]:
        tokenizer = self.llm.get_tokenizer()
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}
        text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        return {
            "prompt_token_ids": tokenizer(text).input_ids,
            "multi_modal_data": {"image": self._picture(i)},
        }


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest difference."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _mean_distance(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def spread(count: int) -> list[float]:
    """`count` different small doses."""
    return [0.01 + 0.04 * (math.sin(3.0 * i) + 1.0) for i in range(count)]


def _driver() -> str:
    """Version of the GPU driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return lines.stdout.split()[0]


def main() -> None:
    """Serve until the input ends."""
    engine: BenchEngine | None = None
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if "start" in message:
                engine = BenchEngine(message["start"])
                answer: dict[str, Any] = {"start_seconds": round(engine.start_seconds, 1)}
            elif engine is None:
                answer = {"error": "the engine did not start"}
            elif "measure" in message:
                answer = engine.measure(message["measure"])
            elif "facts" in message:
                answer = engine.facts()
            else:
                answer = engine.logprobs() if "logprobs" in message else engine.describe()
        except (SpoError, RuntimeError, ValueError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write("@" + json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
