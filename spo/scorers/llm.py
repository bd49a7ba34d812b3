"""Asking a language model behind an OpenAI-compatible address, many questions at once.

Used by the `llm` judge of an evaluation and by the `llm` part of a reward. The `openai` client does
the retries: timeouts, lost connections, 408, 409, 429 and every 5xx, with growing pauses.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import openai

from spo.config.llm import KEY_VARIABLE, LlmAddress
from spo.errors import ScorerError

_FIELD = re.compile(r"\{(request|answer)\}")
_YES_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_NUMBER = re.compile(r"\W*(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of one question.

    Example:
        Reply(text="Yes", seconds=0.4, tokens=212)
    """

    text: str | None
    """None where there is no reply."""
    reason: str = ""
    """Why there is none."""
    seconds: float
    """From asking to reply, further tries included, waiting for a turn not."""
    tokens: int | None
    """Tokens of question and reply as the address counts them; None where it says nothing."""


class LlmClient:
    """Asks one model. Safe to use from several threads, which share its `parallel` turns.

    Args:
        address: the model, and what asking it may cost.
    """

    def __init__(self, address: LlmAddress) -> None:
        self._address = address
        self._key = os.environ.get(KEY_VARIABLE)
        self._loop = asyncio.new_event_loop()
        self._turns = asyncio.Semaphore(address.parallel)
        self._client = openai.AsyncOpenAI(
            base_url=address.url.rstrip("/"),
            api_key=self._key or "none",
            timeout=address.timeout_s,
            max_retries=address.retries,
        )
        threading.Thread(target=self._loop.run_forever, name="llm-client", daemon=True).start()

    def ask(self, questions: Sequence[str]) -> list[Reply]:
        """One reply for each question, in order; none of them raises."""
        return asyncio.run_coroutine_threadsafe(self._ask_all(questions), self._loop).result()

    async def _ask_all(self, questions: Sequence[str]) -> list[Reply]:
        return list(await asyncio.gather(*map(self._ask, questions)))

    async def _ask(self, question: str) -> Reply:
        address = self._address
        async with self._turns:
            begin = time.monotonic()
            try:
                found = await self._client.chat.completions.create(
                    model=address.model,
                    messages=[{"role": "user", "content": question}],
                    temperature=0,
                    max_tokens=address.max_tokens,
                    extra_headers={} if self._key else {"Authorization": openai.Omit()},
                )
                said = found.choices[0].message.content
            # An address that is not what it says answers anything: a list, a page, no choices.
            except (
                openai.OpenAIError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
            ) as error:
                reason = (
                    f"no answer from {address.model} ({type(error).__name__}: {error}); tried up "
                    f"to {address.retries + 1} time(s)"
                )
                seconds = time.monotonic() - begin
                return Reply(text=None, reason=reason, seconds=seconds, tokens=None)
        seconds = time.monotonic() - begin
        tokens = found.usage.total_tokens if found.usage else None
        if not isinstance(said, str):
            reason = f"expected text from {address.model}, got {said!r}"
            return Reply(text=None, reason=reason, seconds=seconds, tokens=tokens)
        return Reply(text=said, seconds=seconds, tokens=tokens)


def question_of(template: str, request: str, answer: str) -> str:
    """The question with request and answer in place; braces in these mean nothing."""
    fields: Mapping[str, str] = {"request": request, "answer": answer}
    return _FIELD.sub(lambda found: fields[found[1]], template)


def score_of(reply: Reply, form: str, model: str) -> float | str:
    """Score in 0..1 of a reply, or the reason why there is none.

    Args:
        reply: what the model said.
        form: "yes-no" (1 and 0) or "0-10" (a tenth of it).
        model: its name, for the reason.
    """
    if reply.text is None:
        return reply.reason
    if form == "yes-no":
        word = _YES_NO.match(reply.text)
        if word:
            return float(word[1].lower() == "yes")
        return f"expected yes or no of {model}, got {reply.text[:60]!r}"
    number = _NUMBER.match(reply.text)
    if number and float(number[1]) <= 10:
        return float(number[1]) / 10
    return f"expected a number from 0 to 10 of {model}, got {reply.text[:60]!r}"


def check_llm(address: LlmAddress) -> None:
    """Ask one short question, so that a wrong address or key is known at the start.

    Raises:
        ScorerError: no reply.
    """
    (reply,) = LlmClient(address).ask(["Say only yes."])
    if reply.text is None:
        raise ScorerError(
            f"expected a language model {address.model!r} at {address.url}: {reply.reason}; "
            f"correct 'url' and 'model', start the server, or set {KEY_VARIABLE} to its key"
        )
