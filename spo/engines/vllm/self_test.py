"""Self-test on your own machine and model: `python -m spo.engines.vllm.self_test MODEL`.

Prints a table: canary, parity with Hugging Face, mixed batch against solo runs, prefix-cache salt,
publishing, and throughput steered against unsteered. Exit status 1 if anything fails. MODEL is a
local folder in hub layout or a hub id.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from spo.engines.base import LogprobRequest
from spo.engines.vllm.plugin.wire import BODIES
from spo.records import (
    GenerateRequest,
    Operator,
    Prompt,
    PromptKind,
    Rollout,
    Sampling,
    SteeringSpec,
)

if TYPE_CHECKING:
    from spo.engines.vllm.engine import VllmEngine

_TEXT = "Describe what you think of this in a few words. " * 12
_GREEDY = Sampling(max_tokens=16, temperature=0.0)


class SelfTest:
    """The checks, each giving one figure or raising AssertionError with the reason."""

    def __init__(self, engine: VllmEngine, model: str, image: str | None) -> None:
        import torch

        from spo.vector import SteeringVector

        self.engine = engine
        self.model = model
        info = engine.info
        generator = torch.Generator().manual_seed(5)
        directions = torch.randn(info.num_layers, info.hidden_size, generator=generator)
        # Random directions of about the size of the embeddings: an effect without ruin.
        norm = float(info.hidden_size) ** 0.5
        self.limit = 1e-3 if info.dtype == "float32" else 0.25
        self.vector = SteeringVector(
            layers=tuple(range(info.num_layers)),
            directions=0.3 * norm * directions / directions.norm(dim=-1, keepdim=True),
            mean_norms=torch.full((info.num_layers,), norm),
            calibration=torch.zeros(info.num_layers, info.hidden_size),
            model_id=info.model_id,
            model_revision=info.model_revision,
        )
        self.prompt = Prompt(prompt_id="check", text=_TEXT, kind=PromptKind.BENIGN, image=image)

    def ask(self, spec: SteeringSpec | None, sampling: Sampling = _GREEDY) -> GenerateRequest:
        """One request."""
        return GenerateRequest(
            request_id="check", prompt=self.prompt, sampling=sampling, steering=spec
        )

    def spec(self, coefficient: float = 1.0, operator: Operator = Operator.ADD) -> SteeringSpec:
        """The test vector at some strength."""
        return SteeringSpec(vector="check", version=1, coefficient=coefficient, operator=operator)

    def canary(self) -> str:
        """Every operator changes the answer, the unsteered model does not."""
        return f"unsteered drift {self.engine.canary['drift']:.1e}"

    def publish(self) -> str:
        """A vector goes live without a restart."""
        begin = time.perf_counter()
        sha = self.engine.publish("check", self.vector, 1)
        milliseconds = 1e3 * (time.perf_counter() - begin)
        assert sha == self.vector.sha256
        return f"{milliseconds:.1f} ms"

    def mixed_batch(self) -> str:
        """Unsteered and differently steered requests in one batch equal their solo runs."""
        answer = self.engine.generate([self.ask(None)])[0].token_ids
        specs = [None, self.spec(), self.spec(0.25), None, self.spec(1.0, Operator.ADAPTIVE)]
        requests = [
            LogprobRequest(request_id="check", prompt=self.prompt, token_ids=answer, steering=spec)
            for spec in specs
        ]
        together = self.engine.logprobs(requests)
        alone = [self.engine.logprobs([request])[0] for request in requests]
        gap = max(
            abs(one - other)
            for mixed, solo in zip(together, alone, strict=True)
            for one, other in zip(mixed, solo, strict=True)
        )
        assert gap <= self.limit, f"{gap:.3g} nats in a token, at most {self.limit} expected"
        return f"largest gap {gap:.1e} nats in a token"

    def zero(self) -> str:
        """Coefficient 0 equals the unsteered model."""
        base, zero = (self.engine.generate([self.ask(s)])[0] for s in (None, self.spec(0.0)))
        gap = _gap(base, zero)
        assert gap <= 1e-4, f"coefficient 0 differs by {gap:.3g}"
        return f"gap {gap:.1e}"

    def prefix_cache(self) -> str:
        """A steered request after an unsteered one on the same long prompt."""
        sampling = replace(_GREEDY, max_tokens=1)
        first = self.engine.generate([self.ask(self.spec(), sampling)])[0]
        plain = self.engine.generate([self.ask(None, sampling)])[0]
        again = self.engine.generate([self.ask(self.spec(), sampling)])[0]
        gap, effect = abs(first.logprob - again.logprob), abs(first.logprob - plain.logprob)
        assert gap <= self.limit, f"the answer changed by {gap:.3g} once the prompt was cached"
        return f"gap {gap:.1e}, effect of steering {effect:.1e}"

    def parity(self) -> str:
        """Log-probabilities equal those of Transformers with a forward hook."""
        from spo.engines.hf.engine import HfEngine

        reference = HfEngine(self.model, dtype=self.engine.info.dtype, device=_device())
        reference.publish("check", self.vector, 1)
        gap = 0.0
        for spec in (None, *(self.spec(1.0, operator) for operator in Operator)):
            rollout = self.engine.generate([self.ask(spec)])[0]
            scored = LogprobRequest(
                request_id="check",
                prompt=self.prompt,
                token_ids=rollout.token_ids,
                steering=spec,
            )
            want = sum(reference.logprobs([scored])[0])
            gap = max(gap, abs(want - rollout.logprob) / len(rollout.token_ids))
        reference.close()
        assert gap <= self.limit, f"{gap:.3g} nats per token, at most {self.limit} expected"
        return f"{gap:.1e} nats per token"

    def throughput(self) -> str:
        """Steered and unsteered in turns, after a warm-up run of each; medians."""
        sampling = replace(_GREEDY, max_tokens=64)
        batches = [[self.ask(spec, sampling)] * 32 for spec in (None, self.spec(0.1))]
        speeds: list[list[float]] = [[], []]
        for turn in range(4):
            for requests, seen in zip(batches, speeds, strict=True):
                begin = time.perf_counter()
                tokens = sum(len(r.token_ids) for r in self.engine.generate(requests))
                if turn:
                    seen.append(tokens / (time.perf_counter() - begin))
        plain, steered = (median(seen) for seen in speeds)
        return f"{steered:,.0f} of {plain:,.0f} tokens/s ({steered / plain:.0%})"


def _gap(one: Rollout, other: Rollout) -> float:
    """Difference of log-probabilities; infinite when other tokens came out."""
    if one.token_ids != other.token_ids:
        return float("inf")
    return abs(one.logprob - other.logprob)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> int:
    """Run all checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--revision")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-cache-gib", type=float)
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="RANKS")
    parser.add_argument("--body", choices=BODIES, default="kernel", help="form of the operator")
    parser.add_argument("--no-parity", action="store_true", help="skip loading Transformers")
    chosen = parser.parse_args(arguments)

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from PIL import Image

    from spo.engines.vllm.engine import VllmEngine

    engine = VllmEngine(
        chosen.model,
        revision=chosen.revision,
        dtype=chosen.dtype,
        kv_cache_gib=chosen.kv_cache_gib,
        tensor_parallel_size=chosen.tensor_parallel,
        body=chosen.body,
    )
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        image = None
        if engine.prompts.multimodal:
            image = str(Path(folder) / "check.png")
            Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 60).convert("RGB").save(image)
        test = SelfTest(engine, chosen.model, image)
        checks: list[Callable[[], str]] = [
            test.canary,
            test.publish,
            test.zero,
            test.mixed_batch,
            test.prefix_cache,
            test.throughput,
        ]
        if not chosen.no_parity:
            checks.insert(3, test.parity)
        print(f"{engine.info.model_id}: {engine.info.num_layers} layers, {engine.runner}")
        for check in checks:
            try:
                outcome, verdict = check(), "ok"
            except AssertionError as error:
                outcome, verdict = str(error), "FAILED"
                failures += 1
            print(f"{check.__name__:14} {verdict:7} {outcome}", flush=True)
    engine.close()
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
