"""Which prompt fills which place of which batch: a function of seed, step, place and attempt alone.

Nothing here depends on what finished first, so an interrupted run that continues at step k asks for
the same groups, under the same ids and with the same sampling seeds, as one that was not.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from spo.config import RolloutConfig
from spo.errors import DataError, StageError
from spo.records import GenerateRequest, Prompt, PromptKind, Sampling, SteeringSpec

_Item = TypeVar("_Item")


async def done_by(
    calls: Sequence[asyncio.Future[list[_Item]]], *, deadline_s: float | None, enough: int
) -> list[_Item]:
    """Items of all calls, or of those that are done at the deadline.

    Args:
        calls: running calls.
        deadline_s: when to go on without the rest; None waits for all.
        enough: items without which the deadline does not hold; it then waits for the next call.

    Raises:
        Exception: whatever one of the calls raised.
    """
    done, waiting = await asyncio.wait(
        calls, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION
    )
    while waiting and not any(call.exception() for call in done):
        if sum(len(call.result()) for call in done) >= enough:
            break
        more, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        done |= more
    for call in waiting:
        # Nobody waits for it any more: its error, if it has one, is looked at and forgotten.
        call.add_done_callback(lambda late: late.cancelled() or late.exception())
    return [item for call in done for item in call.result()]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSlot:
    """One attempt to fill one place of a batch with a group of answers to one prompt."""

    step: int
    place: int
    attempt: int
    """0, then one more each time that the group before it was of no use."""
    prompt: Prompt

    @property
    def group_id(self) -> str:
        """Unique in a run."""
        return f"{self.step}/{self.place}/{self.attempt}/{self.prompt.prompt_id}"


class Schedule:
    """Prompts by slot. Each kind cycles through its own seeded order; refills are drawn apart.

    Args:
        prompts: training prompts of both kinds.
        config: how many of each kind make a batch, and sampling.
        seed: decides orders and sampling seeds.

    Raises:
        DataError: a kind that the batch needs has no prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], config: RolloutConfig, seed: int) -> None:
        self._pools = {kind: [p for p in prompts if p.kind is kind] for kind in PromptKind}
        harm, benign = self._pools[PromptKind.HARM], self._pools[PromptKind.BENIGN]
        if not harm or (config.benign_prompts and not benign):
            raise DataError(
                f"training needs harmful and benign prompts, got {len(harm)} and {len(benign)}; "
                "add some or set rollout.benign_prompts=0"
            )
        self._config = config
        self._seed = seed
        self.banned: set[str] = set()
        """Ids of prompts that cannot be used; later slots leave them out."""

    @property
    def places(self) -> int:
        """Groups of a batch."""
        return self._config.harm_prompts + self._config.benign_prompts

    def slot(self, step: int, place: int, attempt: int) -> GroupSlot:
        """The slot, with its prompt."""
        harmful = place < self._config.harm_prompts
        kind = PromptKind.HARM if harmful else PromptKind.BENIGN
        pool = self._pools[kind]
        if attempt == 0:
            count = self._config.harm_prompts if harmful else self._config.benign_prompts
            turn = step * count + (place if harmful else place - self._config.harm_prompts)
            epoch, position = divmod(turn, len(pool))
            order = np.random.default_rng([self._seed, epoch]).permutation(len(pool))
            prompt = pool[order[position]]
            if prompt.prompt_id not in self.banned:
                return GroupSlot(step=step, place=place, attempt=0, prompt=prompt)
        usable = [prompt for prompt in pool if prompt.prompt_id not in self.banned]
        if not usable:
            raise StageError(
                f"every {kind.value} prompt has been quarantined ({len(pool)}); see the reasons in "
                "quarantine.json and mend the prompts"
            )
        draw = np.random.default_rng([self._seed, step, place, attempt, 1])
        prompt = usable[int(draw.integers(len(usable)))]
        return GroupSlot(step=step, place=place, attempt=attempt, prompt=prompt)

    def requests(self, slot: GroupSlot, spec: SteeringSpec) -> list[GenerateRequest]:
        """The generations of a group; each is seeded by its own id."""
        return [self._request(f"{slot.group_id}/{i}", slot.prompt, spec) for i in self._samples()]

    def _samples(self) -> range:
        return range(self._config.group_size)

    def _request(self, request_id: str, prompt: Prompt, spec: SteeringSpec) -> GenerateRequest:
        digest = hashlib.sha256(f"{self._seed}|{request_id}".encode()).digest()
        return GenerateRequest(
            request_id=request_id,
            prompt=prompt,
            sampling=Sampling(
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                top_p=self._config.top_p,
                seed=int.from_bytes(digest[:4], "big") % 2**31,
            ),
            steering=spec,
        )
