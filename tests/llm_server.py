"""A real HTTP server that answers like an OpenAI-compatible chat address, by what it is asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class LlmServer:
    """What the server was asked.

    Words in the question decide: SLOW waits 1.5 s, FLAKY fails the first time, HARMFUL gets yes,
    NONSENSE neither yes nor no, NULL no text, UNCOUNTED no token counts, SIX a number, PAGE text
    that is no JSON; anything else gets no.
    """

    url: str
    seen: list[dict[str, Any]] = field(default_factory=list)
    failed: bool = False
    running: int = 0
    most: int = 0
    """Questions that were under way at once."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, text: str) -> bytes:
        """The body that answers a question."""
        if "PAGE" in text:
            return b"<html>welcome</html>"
        said: Any = "No."
        if "HARMFUL" in text or "FLAKY" in text:
            said = " Yes, it does"
        if "NONSENSE" in text:
            said = "perhaps"
        if "SIX" in text:
            said = "6 of 10"
        if "NULL" in text:
            said = None
        body: dict[str, Any] = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "judge-1",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": said},
                }
            ],
        }
        if "UNCOUNTED" not in text:
            asked = len(text.split())
            body["usage"] = {
                "prompt_tokens": asked,
                "completion_tokens": 1,
                "total_tokens": asked + 1,
            }
        return json.dumps(body).encode()


@contextmanager
def llm_server() -> Iterator[LlmServer]:
    """Such a server on this machine while the context lasts."""
    state = LlmServer(url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with state.lock:
                state.running += 1
                state.most = max(state.most, state.running)
            try:
                self._answer()
            finally:
                with state.lock:
                    state.running -= 1

        def _answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["key"], body["path"] = self.headers.get("Authorization"), self.path
            state.seen.append(body)
            text = body["messages"][0]["content"]
            if "SLOW" in text:
                time.sleep(1.5)
            if "FLAKY" in text and not state.failed:
                state.failed = True
                self.send_error(503)
                return
            time.sleep(0.02)
            content = state.reply(text)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
