"""Asking a language model over HTTP; it talks to a real server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spo.config.llm import LlmAddress
from spo.errors import ScorerError
from spo.scorers.llm import LlmClient, Reply, check_llm, question_of, score_of
from tests.llm_server import LlmServer, llm_server


@pytest.fixture
def server() -> Iterator[LlmServer]:
    with llm_server() as made:
        yield made


def client(url: str, **changes: Any) -> LlmClient:
    settings = {"url": url, "model": "judge-1", "timeout_s": 1, "retries": 1}
    return LlmClient(LlmAddress(**{**settings, **changes}))


def test_replies_come_in_order_with_their_cost_and_never_more_than_parallel_at_once(
    server: LlmServer,
) -> None:
    asked = ["HARMFUL words", *["some words"] * 8, "UNCOUNTED"]
    replies = client(server.url, parallel=3).ask(asked)
    assert [reply.text for reply in replies] == [" Yes, it does", *["No."] * 9]
    assert [reply.tokens for reply in replies] == [3] * 9 + [None]
    assert all(0.02 <= reply.seconds < 1 for reply in replies)
    assert 1 < server.most <= 3


def test_a_busy_server_is_asked_again_and_a_slow_one_is_given_up(server: LlmServer) -> None:
    flaky, slow, page = client(server.url).ask(["FLAKY", "SLOW", "PAGE"])
    assert flaky.text == " Yes, it does"
    assert slow.text is None
    assert "timed out" in slow.reason
    assert "tried up to 2 time(s)" in slow.reason
    assert slow.seconds >= 2
    assert page.text is None
    assert "no answer from judge-1" in page.reason


def test_the_key_goes_along_only_where_there_is_one(
    server: LlmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPO_JUDGE_KEY", raising=False)
    client(server.url).ask(["a"])
    monkeypatch.setenv("SPO_JUDGE_KEY", "secret")
    client(server.url + "/").ask(["b"])
    assert [body["key"] for body in server.seen] == [None, "Bearer secret"]
    assert {body["path"] for body in server.seen} == {"/v1/chat/completions"}
    assert server.seen[0]["temperature"] == 0


def test_braces_of_a_request_are_no_fields() -> None:
    made = question_of("{request} / {answer} / {other}", "say {answer}", "{request}")
    assert made == "say {answer} / {request} / {other}"


@pytest.mark.parametrize(
    ("said", "form", "expected"),
    [
        ("**Yes**, clearly", "yes-no", 1.0),
        ("no", "yes-no", 0.0),
        ("7.5 of 10", "0-10", 0.75),
        ("10", "0-10", 1.0),
    ],
)
def test_replies_become_scores(said: str, form: str, expected: float) -> None:
    reply = Reply(text=said, seconds=0.1, tokens=1)
    assert score_of(reply, form, "m") == expected


@pytest.mark.parametrize(
    ("said", "form"), [("nobody", "yes-no"), ("yes", "0-10"), ("11", "0-10"), ("", "yes-no")]
)
def test_another_reply_is_a_reason_and_not_a_score(said: str, form: str) -> None:
    found = score_of(Reply(text=said, seconds=0.1, tokens=1), form, "judge-1")
    assert isinstance(found, str)
    assert repr(said) in found


def test_a_wrong_address_is_known_at_the_start(server: LlmServer) -> None:
    check_llm(LlmAddress(url=server.url, model="judge-1"))
    with pytest.raises(ScorerError, match=r"expected a language model 'm' at http.*start the"):
        check_llm(LlmAddress(url="http://127.0.0.1:9/v1", model="m", retries=0))
