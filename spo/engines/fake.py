"""A tiny language model with a known harm direction, for running the whole loop in milliseconds.

Its vocabulary is four kind and four rude words. The logit of rudeness falls as the residual stream,
a constant vector along the planted harm direction, loses its harm component: steering works on it,
gradients are exact, and everything is known. It implements both the engine and the learner side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from spo.algorithms.operators import steer
from spo.engines.base import (
    Capture,
    CaptureRequest,
    EngineInfo,
    LogprobRequest,
    VectorTable,
    receipt_for,
)
from spo.engines.forward import (
    AnswerScores,
    SteeringPlan,
    TokenBatch,
    pad_answers,
    token_kl,
    token_logprobs,
)
from spo.records import FinishReason, GenerateRequest, Prompt, PromptKind, Rollout, SteeringSpec
from spo.vector import SteeringVector

WORDS = ("kind", "calm", "warm", "fair", "rude", "mean", "vile", "cruel")
_RUDE = torch.tensor([0.0] * 4 + [1.0] * 4)
_PROMPT_WIDTH = 3


class FakeEngine:
    """See the module's text.

    Args:
        hidden_size: width of its residual stream.
        num_layers: number of its blocks; each adds to the stream and can be steered.
        rudeness: logit of a rude word on harmful prompts when unsteered.
    """

    concurrent = False

    def __init__(self, *, hidden_size: int = 8, num_layers: int = 4, rudeness: float = 1.0) -> None:
        self.device = torch.device("cpu")
        generator = torch.Generator().manual_seed(7)
        harm = torch.randn(hidden_size, generator=generator)
        self.harm_direction = harm / harm.norm()
        self._rudeness = rudeness
        self._table = VectorTable()
        self._info = EngineInfo(
            model_id="fake",
            model_revision="1",
            hidden_size=hidden_size,
            num_layers=num_layers,
            dtype="float32",
            backend="fake",
            version="1",
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def publish(self, name: str, vector: SteeringVector, version: int) -> str:
        vector.check_fits(hidden_size=self._info.hidden_size, num_layers=self._info.num_layers)
        self._table.put(name, vector, version)
        return vector.sha256

    def retire(self, name: str, version: int | None = None) -> None:
        self._table.retire(name, version)

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to give back."""

    def prepare(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]] | None = None
    ) -> TokenBatch:
        answers = answers if answers is not None else [()] * len(prompts)
        ids, mask = pad_answers(answers)
        # The "tokens" of a prompt say only whether it is harmful: all that the model looks at.
        harm = torch.tensor([[int(p.kind is PromptKind.HARM)] * _PROMPT_WIDTH for p in prompts])
        return TokenBatch(
            input_ids=torch.cat([harm, ids], dim=1),
            attention_mask=torch.ones(
                len(prompts), _PROMPT_WIDTH + ids.shape[1], dtype=torch.int64
            ),
            extras={},
            prompt_width=_PROMPT_WIDTH,
            pads=(0,) * len(prompts),
            spans=((),) * len(prompts),
            answer_ids=ids,
            answer_mask=mask,
        )

    def answer_logits(self, batch: TokenBatch, plan: SteeringPlan | None = None) -> Tensor:
        """(batch, width, 8) logits of the fake vocabulary."""
        width = batch.answer_ids.shape[1]
        harmful = batch.input_ids[:, :1].float().expand(-1, width)
        hidden = harmful.unsqueeze(-1) * self.harm_direction * self._rudeness
        if plan is not None:
            coefficient = batch.coefficients(plan, batch.prompt_width - 1, width)
            for row in range(len(plan.layers)):
                hidden = steer(
                    plan.operator,
                    hidden,
                    plan.directions[row],
                    coefficient=coefficient,
                    mean_norm=plan.mean_norms[row],
                    calibration=plan.calibration[row],
                )
        rude = (hidden @ self.harm_direction) + 2.0 * harmful - 2.0
        return rude.unsqueeze(-1) * _RUDE

    def answer_scores(
        self,
        batch: TokenBatch,
        plans: Sequence[SteeringPlan],
        *,
        chunk_tokens: int,
        cache_prefix: bool = True,
    ) -> list[AnswerScores]:
        del chunk_tokens, cache_prefix  # eight words and no blocks to speak of
        with torch.no_grad():
            reference = self.answer_logits(batch)
        base = token_logprobs(reference, batch.answer_ids, batch.answer_mask)
        scores = []
        for plan in plans:
            logits = self.answer_logits(batch, plan)
            policy = token_logprobs(logits, batch.answer_ids, batch.answer_mask)
            kl = token_kl(logits, reference) * batch.answer_mask
            scores.append(AnswerScores(policy=policy, reference=base, kl=kl))
        return scores

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Rollout]:
        return [self._generate_one(request) for request in requests]

    def _generate_one(self, request: GenerateRequest) -> Rollout:
        length = request.sampling.max_tokens
        batch = self.prepare([request.prompt], [[0] * length])
        with torch.no_grad():
            logits = self.answer_logits(batch, self._plan(request.steering))[0]
        text = f"{request.request_id}|{request.sampling.seed}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % (2**63)
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        logprob = torch.log_softmax(logits, -1).gather(1, tokens[:, None]).sum()
        return Rollout(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=tuple(batch.input_ids[0, :_PROMPT_WIDTH].tolist()),
            token_ids=tuple(tokens.tolist()),
            text=" ".join(WORDS[token] for token in tokens),
            logprob=float(logprob),
            finish=FinishReason.LENGTH,
            receipt=receipt_for(request.steering, self._table.get(request.steering))
            if request.steering
            else None,
        )

    def _plan(self, spec: SteeringSpec | None) -> SteeringPlan | None:
        return None if spec is None else SteeringPlan.of(self._table.get(spec), spec, self.device)

    def logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float]]:
        values: list[list[float]] = []
        for request in requests:
            batch = self.prepare([request.prompt], [request.token_ids])
            logits = self.answer_logits(batch, self._plan(request.steering))
            values.append(token_logprobs(logits, batch.answer_ids, batch.answer_mask)[0].tolist())
        return values

    def capture(self, requests: Sequence[CaptureRequest]) -> list[Capture]:
        captures: list[Capture] = []
        for request in requests:
            harmful = float(request.prompt.kind is PromptKind.HARM)
            digest = hashlib.sha256(request.request_id.encode()).digest()
            noise = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            rows = noise.normal(scale=0.1, size=(len(request.layers), self._info.hidden_size))
            mean = rows + harmful * self._rudeness * self.harm_direction.numpy()
            captures.append(
                Capture(
                    request_id=request.request_id,
                    mean=mean.astype(np.float32),
                    norm=np.linalg.norm(mean, axis=1).astype(np.float32),
                    tokens=_PROMPT_WIDTH - 1,
                )
            )
        return captures
