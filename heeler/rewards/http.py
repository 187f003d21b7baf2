"""A reward behind HTTP: a server of any make that scores completions, asked by `HTTPReward`.

The contract, JSON both ways, at one address:

    POST URL   {"prompts": [...], "completions": [...], "columns": {name: [...]},
                "completion_ids": [[...]], "truncated": [...]}
            -> {"scores": [...], "components": {name: [...]}}
    GET URL -> {"name": "..."}

All lists of a request have one entry a sample, at most `batch_size` of them. A prompt is a string or a list of chat
messages, a completion is a string. `columns` holds the other columns of the prompt set, `completion_ids` the sampled
tokens, `truncated` whether the length cap cut the completion. `scores` holds one float a sample, or one list of floats
a sample: a value for each sampled token. `components` may be left out; its lists hold one float a sample, for the log.
No component may be called mean or std; one that is called probability is shown in reports in place of the score.

An answer that is no use (4xx except 429) may say why: {"error": "one sentence"}. 429 and 5xx mean "later": the request
is sent again, after as many seconds as `Retry-After` says where that is more than the client would have waited.

`heeler.rewards.serve` answers by this contract.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from itertools import count
from threading import TIMEOUT_MAX
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from heeler.rewards.functions import check_names, check_values
from heeler.runtime.progress import say
from heeler.types import HeelerError, RewardOutput, Samples, Unavailable

CHECK_TIMEOUT = 5.0  # seconds
MAX_WAIT = 60.0  # seconds between two tries
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class HTTPReward:
    """A reward server behind `heeler.types.Reward`. Batches are sent one after the other, in order.

    A connection that fails, a timeout, 429 and 5xx are tried again, after `backoff`, 2 `backoff`, 4 `backoff`, ...
    seconds, 60 at most; one line says so. `Unavailable` is raised after the last try, `HeelerError` at once where
    another try would not help.

    Args:
        url: the server's address, http or https.
        batch_size: completions in one request.
        timeout: seconds that the server may be silent before a try counts as failed.
        retries: tries after the first one.
        backoff: seconds before the second try.
        headers: sent with each request, for instance {"Authorization": "Bearer ..."}.
        name: what messages call the reward; its address where None.
    """

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        timeout: float = 60.0,
        retries: int = 6,
        backoff: float = 1.0,
        headers: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        host = _host(url)
        if batch_size < 1 or not 0 < timeout < TIMEOUT_MAX or retries < 0 or not 0 <= backoff < TIMEOUT_MAX:
            raise HeelerError(
                f"the reward at {url} needs batch_size >= 1, timeout > 0, retries >= 0 and backoff >= 0, not"
                f" {batch_size}, {timeout:g}, {retries} and {backoff:g}"
            )
        self.url, self.batch_size, self.timeout = url, batch_size, timeout
        self.retries, self.backoff = retries, backoff
        self.name = f"the reward at {url}" if name is None else f"the reward {name} at {url}"
        self.headers = {"Content-Type": "application/json", "Accept": "application/json"} | dict(headers or {})
        proxies = [urllib.request.ProxyHandler({})] if host in LOOPBACK else []  # no proxy reaches this machine's own
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def check(self) -> str:
        """The server's own name for its reward; raises within seconds where nobody answers."""
        try:
            answer = self._exchange(None, min(self.timeout, CHECK_TIMEOUT))
        except _NoAnswer as error:
            raise Unavailable(
                f"{self.name} does not answer: {error}; start it first (heeler serve-reward), or correct the address"
            ) from error
        if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
            raise HeelerError(
                f'{self.name} answers GET with {_short(answer)} in place of {{"name": ...}}: is this the address of a'
                " reward server?"
            )
        return answer["name"]

    def __call__(self, samples: Samples) -> RewardOutput:
        outputs = [
            self._score(samples, slice(start, start + self.batch_size))
            for start in range(0, len(samples), self.batch_size)
        ]
        if not outputs:
            return RewardOutput(scores=torch.zeros(0), token_rewards=None, components={})
        shapes = {(output.token_rewards is None, frozenset(output.components)) for output in outputs}
        if len(shapes) > 1:
            raise HeelerError(
                f"{self.name} answered the batches of one update differently: all must have token rewards or none, and"
                " the components must have the same names"
            )
        token_rewards = [rewards for output in outputs for rewards in output.token_rewards or ()]
        return RewardOutput(
            scores=torch.cat([output.scores for output in outputs]),
            token_rewards=token_rewards if outputs[0].token_rewards is not None else None,
            components={name: torch.cat([o.components[name] for o in outputs]) for name in outputs[0].components},
        )

    def _score(self, samples: Samples, rows: slice) -> RewardOutput:
        completions = list(samples.completions[rows])
        content = {
            "prompts": list(samples.prompts[rows]),
            "completions": completions,
            "columns": {name: list(column[rows]) for name, column in samples.columns.items()},
            "completion_ids": [list(ids) for ids in samples.completion_ids[rows]],
            "truncated": list(samples.truncated[rows]),
        }
        try:
            body = json.dumps(content, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise HeelerError(
                f"a prompt or a column cannot be sent to {self.name} as JSON ({error}): leave that column out of the"
                " prompts, or make it text"
            ) from error
        return self._read(self._post(body), len(completions))

    def _read(self, answer: Any, size: int) -> RewardOutput:
        if not isinstance(answer, dict) or "scores" not in answer:
            raise HeelerError(
                f'{self.name} answered {_short(answer)}: it must answer {{"scores": [...]}}, one a completion'
            )
        output = check_values(answer["scores"], size, self.name)
        given = answer.get("components") or {}
        if not isinstance(given, dict):
            raise HeelerError(
                f'{self.name} answered components {_short(given)}: they must be an object {{"name": [...]}}'
            )
        check_names(given, f"a component of {self.name}")
        components: dict[str, Tensor] = {}
        for name, values in given.items():
            component = check_values(values, size, f"the component {name!r} of {self.name}")
            if component.token_rewards is not None:
                raise HeelerError(f"the component {name!r} of {self.name} has lists in it: one number a completion")
            components[name] = component.scores
        return RewardOutput(scores=output.scores, token_rewards=output.token_rewards, components=components)

    def _post(self, body: bytes) -> Any:
        started = time.monotonic()
        for tries in count(1):
            try:
                return self._exchange(body, self.timeout)
            except _NoAnswer as error:
                if tries > self.retries:
                    seconds = time.monotonic() - started
                    raise Unavailable(
                        f"{self.name} does not answer: {error}; tried {tries} times in {seconds:.0f} s; look at its"
                        " server and start it again"
                    ) from error
                if tries == 1:
                    say(f"{self.name} does not answer: {error}; trying again, {self.retries} times at most")
                wait = max(self.backoff * 2.0 ** min(tries - 1, 30), error.retry_after)
                time.sleep(min(wait, MAX_WAIT))
        raise AssertionError("unreachable")

    def _exchange(self, body: bytes | None, timeout: float) -> Any:
        """One request and its parsed answer: GET without a body, POST with one.

        Raises `_NoAnswer` where another try may help, `HeelerError` where it will not.
        """
        verb = "GET" if body is None else "POST"
        try:
            request = urllib.request.Request(self.url, data=body, headers=self.headers, method=verb)
            with self._opener.open(request, timeout=timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                says = f"{error.code} {error.reason}{_sentence(error)}"
            if error.code == 429 or error.code >= 500:
                raise _NoAnswer(f"it answers {says}", _retry_after(error.headers)) from error
            where = f"; it sends on to {error.headers['Location']}" if "Location" in error.headers else ""
            raise HeelerError(
                f"{self.name} refuses {verb} with {says}{where}: correct the address or the server"
            ) from (error)
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise HeelerError(
                    f"{self.name} has a certificate that is not trusted here ({error.reason.verify_message}): install"
                    " its authority's certificate, or point SSL_CERT_FILE at it"
                ) from error
            raise _NoAnswer(_reason(error.reason, timeout)) from error
        except (ValueError, http.client.InvalidURL) as error:
            raise HeelerError(f"{self.name} cannot be asked, its address or a header is malformed: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            raise _NoAnswer(_reason(error, timeout)) from error
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            text = _short(content.decode(errors="replace"))
            raise HeelerError(
                f"{self.name} answers {verb} with {text}, which is no JSON: is this the address of a reward server?"
            ) from error


class _NoAnswer(Exception):
    """A try that failed in a way that may pass.

    Attributes:
        retry_after: seconds that the server asks to wait; 0 where it does not say.
    """

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would follow a redirect with a GET and lose the completions."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _host(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise HeelerError(f"{url!r} is no address of a reward server: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise HeelerError(f"{url!r} is no address of a reward server: write it like http://127.0.0.1:8000")
    if parts.username is not None:
        raise HeelerError(f"the address of the reward at {host} holds a password: send it in `headers` instead")
    return host


def _reason(error: Any, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"it said nothing for {timeout:g} s"
    if isinstance(error, ConnectionRefusedError):
        return "the connection was refused"
    if isinstance(error, (ConnectionError, http.client.IncompleteRead)):
        return "it closed the connection before the answer was complete"
    if isinstance(error, http.client.HTTPException):
        return f"it does not speak HTTP ({type(error).__name__})"
    return str(getattr(error, "strerror", None) or error)


def _sentence(error: urllib.error.HTTPError) -> str:
    """What an error's body says, where it holds {"error": ...}."""
    try:
        said = json.loads(error.read())
    except (OSError, ValueError, RecursionError, http.client.HTTPException):
        return ""
    return f" ({said['error']})" if isinstance(said, dict) and "error" in said else ""


def _retry_after(headers: Message) -> float:
    """Seconds that the header `Retry-After` asks to wait, given as a number or as a date; 0 without one."""
    text = headers.get("Retry-After", "")
    try:
        return max(float(text), 0.0)
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return 0.0
    return max((until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
