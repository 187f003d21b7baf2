"""A reward of Heeler's behind HTTP, by the contract of `heeler.rewards.http`.

One request is scored at a time; others wait. There is no authentication: whoever reaches the port may ask.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from heeler.data.prompts import is_chat
from heeler.runtime.packages import where_raised
from heeler.types import HeelerError, Reward, RewardOutput, Samples, Unavailable

LARGEST_REQUEST = 2**28  # bytes


class RewardServer(ThreadingHTTPServer):
    """Answers for one reward; `serve_forever` runs it, `server_close` frees its port."""

    daemon_threads = True

    def __init__(self, reward: Reward, host: str, port: int, name: str) -> None:
        self.reward, self.name = reward, name
        self.lock = threading.Lock()
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up gets a line, not a traceback."""
        print(f"{client_address[0]}: {where_raised(sys.exc_info()[1] or Exception())}", file=sys.stderr)


def make_server(reward: Reward, host: str, port: int, name: str) -> RewardServer:
    """A server that listens already; port 0 takes a free one.

    Raises:
        HeelerError: the port is taken, or the host is none of this machine's.
    """
    try:
        return RewardServer(reward, host, port, name)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise HeelerError(
            f"cannot listen on {host}, port {port} ({reason}): choose another --port, 0 for any free one, or another"
            " --host"
        ) from error


def read_samples(body: bytes) -> Samples:
    """The samples of a request; raises `HeelerError` with what is wrong with it."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HeelerError("the request is no JSON") from error
    if not isinstance(content, dict):
        raise HeelerError("the request must be an object with prompts and completions")
    for key in ("prompts", "completions"):
        if not isinstance(content.get(key), list):
            raise HeelerError(f"the request needs a list {key!r}")
    prompts, completions = content["prompts"], content["completions"]
    count = len(completions)
    ids, truncated = content.get("completion_ids", [[]] * count), content.get("truncated", [False] * count)
    columns = content.get("columns", {})
    if not isinstance(columns, dict):
        raise HeelerError("columns must be an object of lists")
    for name, values in {"prompts": prompts, "completion_ids": ids, "truncated": truncated, **columns}.items():
        if not isinstance(values, list) or len(values) != count:
            found = f"has {len(values)} entries" if isinstance(values, list) else "is no list"
            raise HeelerError(f"{name!r} {found}, but there are {count} completions")
    for name, values, right, kind in (
        ("completions", completions, _is_text, "a string"),
        ("prompts", prompts, _is_prompt, "a string or a list of messages with role and content, both strings"),
        ("completion_ids", ids, _is_ids, "a list of integers"),
        ("truncated", truncated, _is_bool, "true or false"),
    ):
        for index, value in enumerate(values):
            if not right(value):
                raise HeelerError(f"entry {index + 1} of {name!r} must be {kind}")
    return Samples(
        prompts=prompts, completions=completions, columns=columns, completion_ids=ids, truncated=truncated
    )  # fmt: skip


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) for token in value)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (
        is_chat(value) and all(isinstance(message[key], str) for message in value for key in ("role", "content"))
    )


def _answer(output: RewardOutput) -> dict[str, Any]:
    scores: Sequence[Any] = output.scores.tolist() if output.token_rewards is None else output.token_rewards
    components = {name: values.tolist() for name, values in output.components.items()}
    return {"scores": scores, **({"components": components} if components else {})}


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may be silent in the middle of a request

    def do_GET(self) -> None:
        self._send(200, {"name": self.server.name})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            return self._refuse(411, "the request has no Content-Length")
        if int(length) > LARGEST_REQUEST:
            self.close_connection = True
            return self._refuse(413, f"the request has more than {LARGEST_REQUEST} bytes: send fewer completions")
        try:
            samples = read_samples(self.rfile.read(int(length)))
        except HeelerError as error:
            return self._refuse(400, str(error))
        try:
            if not len(samples):
                return self._send(200, {"scores": []})
            with self.server.lock:
                answer = _answer(self.server.reward(samples))
            self._send(200, answer)
        except HeelerError as error:
            self._refuse(503 if isinstance(error, Unavailable) else 500, str(error))
        except ConnectionError:
            raise
        except Exception as error:
            self._refuse(500, f"the reward raised {where_raised(error)}")

    def _refuse(self, status: int, sentence: str) -> None:
        print(f"{self.client_address[0]}: {status}, {sentence}", file=sys.stderr)
        self._send(status, {"error": sentence})

    def _send(self, status: int, content: Mapping[str, Any]) -> None:
        try:
            body = json.dumps(content, allow_nan=False).encode()
        except ValueError as error:
            raise HeelerError("the reward is not finite for at least one completion") from error
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests that go well are not worth a line."""
