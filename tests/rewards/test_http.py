"""Rewards behind HTTP, against real servers on this machine: ones that behave, ones that do not, ones that die."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from heeler import HeelerError, TextConfig, resume_text, train_text
from heeler.cli import main
from heeler.rewards.functions import FunctionReward
from heeler.rewards.http import HTTPReward
from heeler.rewards.serve import make_server
from heeler.rewards.weighted import WeightedSum
from heeler.runtime.runs import RunFolder
from heeler.train.ppo import UpdateReport
from heeler.train.text import load_reward
from heeler.types import Reward, RewardOutput, Samples, Unavailable
from tests.runs import numbers, small
from tests.tiny import samples_of, save_tiny_model

PROMPTS = ["ab", "c", "defgh", "xyz z"]
THREE = samples_of(["p", "q", "r"], ["a", "bb", "ccc"], [False, True, False], level=[1, 2, 3])


def vowels(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) + 0.01 * len(text) for text in completions]


def lengths(request: dict[str, Any]) -> dict[str, Any]:
    return {"scores": [float(len(text)) for text in request["completions"]]}


class Scripted(BaseHTTPRequestHandler):
    """Answers each POST with the next act of its server's script; the last act stays."""

    server: Any

    def do_GET(self) -> None:
        self.say(200, b'{"name": "scripted"}')

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.headers, request))
        act = self.server.script.pop(0) if len(self.server.script) > 1 else self.server.script[0]
        act(self, request)

    def say(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


Act = Callable[[Scripted, dict[str, Any]], None]


def answers(make: Callable[[dict[str, Any]], Any]) -> Act:
    return lambda handler, request: handler.say(200, json.dumps(make(request)).encode())


def says(status: int, content: str = "", **headers: str) -> Act:
    return lambda handler, request: handler.say(status, content.encode(), **headers)


def hangs_up(handler: Scripted, request: dict[str, Any]) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def hangs_up_halfway(handler: Scripted, request: dict[str, Any]) -> None:
    handler.wfile.write(b'HTTP/1.0 200 OK\r\nContent-Length: 100\r\n\r\n{"scores": [')


def stalls(handler: Scripted, request: dict[str, Any]) -> None:
    handler.server.released.wait(5)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: list[Act]) -> None:
        super().__init__(("127.0.0.1", 0), Scripted)
        self.script, self.requests, self.released = script, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None: ...


@contextmanager
def serving(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        getattr(server, "released", threading.Event()).set()


def scripted(*script: Act) -> Any:
    return serving(Server(list(script)))


def served(reward: Reward, port: int = 0) -> Any:
    return serving(make_server(reward, "127.0.0.1", port, "vowels"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def quick(url: str, **changes: Any) -> HTTPReward:
    return HTTPReward(url, **({"backoff": 0.01, "retries": 3, "timeout": 5.0} | changes))


# the client ---------------------------------------------------------------------------------------------------


def test_batches_are_sent_in_order_with_everything_that_a_reward_sees() -> None:
    def scores(request: dict[str, Any]) -> dict[str, Any]:
        return lengths(request) | {"components": {"level": request["columns"]["level"]}}

    with scripted(answers(scores)) as server:
        reward = quick(server.url, batch_size=2, headers={"Authorization": "Bearer x"})
        assert reward.check() == "scripted"
        output = reward(THREE)
    assert output.scores.tolist() == [1.0, 2.0, 3.0] and output.scores.dtype == torch.float32
    assert output.components["level"].tolist() == [1.0, 2.0, 3.0] and output.token_rewards is None
    first, second = (request for _, request in server.requests)
    assert first == {
        "prompts": ["p", "q"], "completions": ["a", "bb"], "columns": {"level": [1, 2]},
        "completion_ids": [[0], [0]], "truncated": [False, True],
    }  # fmt: skip
    assert second["completions"] == ["ccc"]
    assert all(headers["Authorization"] == "Bearer x" for headers, _ in server.requests)


def test_token_rewards_arrive_and_their_sum_is_the_score() -> None:
    with scripted(answers(lambda r: {"scores": [[0.5] * len(text) for text in r["completions"]]})) as server:
        output = quick(server.url, batch_size=2)(THREE)
    assert output.token_rewards == [[0.5], [0.5, 0.5], [0.5, 0.5, 0.5]] and output.scores.tolist() == [0.5, 1.0, 1.5]


def test_no_samples_need_no_server() -> None:
    assert quick("http://127.0.0.1:1")(samples_of([], [])).scores.tolist() == []


@pytest.mark.parametrize(
    "failure",
    [says(503), says(500, '{"error": "out of memory"}'), says(429, Retry_After="0"), hangs_up, hangs_up_halfway],
    ids=["503", "500", "429", "hangs up", "hangs up halfway"],
)
def test_two_failures_then_an_answer(failure: Act, capsys: pytest.CaptureFixture[str]) -> None:
    with scripted(failure, failure, answers(lengths)) as server:
        assert quick(server.url)(THREE).scores.tolist() == [1.0, 2.0, 3.0]
        assert len(server.requests) == 3
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and server.url in said[0] and "trying again, 3 times at most" in said[0]


def test_a_stall_is_cut_at_the_timeout() -> None:
    with scripted(stalls, answers(lengths)) as server:
        started = time.monotonic()
        assert quick(server.url, timeout=0.2)(THREE).scores.tolist() == [1.0, 2.0, 3.0]
        assert 0.2 <= time.monotonic() - started < 2
    with (
        scripted(stalls) as server,
        pytest.raises(Unavailable, match=r"said nothing for 0.1 s; tried 2 times in 0 s; look at its server"),
    ):
        quick(server.url, timeout=0.1, retries=1)(THREE)


def test_waits_double_and_retry_after_is_honoured_within_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("heeler.rewards.http.time.sleep", waits.append)
    later = says(429, Retry_After="7")
    with (
        scripted(says(503), says(503), says(503), later, says(503, Retry_After="86400"), says(503)) as server,
        pytest.raises(Unavailable, match="it answers 503 Service Unavailable; tried 7 times"),
    ):
        HTTPReward(server.url, retries=6, backoff=1.0)(THREE)
    assert waits == [1, 2, 4, 8, 60, 32]
    waits.clear()
    with scripted(later, says(503, Retry_After="Fri, 01 Jan 2100 00:00:00 GMT"), answers(lengths)) as server:
        quick(server.url)(THREE)
    assert waits == [7, 60]


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (says(200, "<html>welcome</html>"), "answers POST with '<html>welcome</html>', which is no JSON"),
        (says(200, "[" * 100_000), "which is no JSON"),
        (says(200, b"\xff\xfe".decode("latin1")), "which is no JSON"),
        (answers(lambda r: [1.0, 2.0, 3.0]), 'it must answer {"scores"'),
        (answers(lambda r: {"score": 1.0}), 'it must answer {"scores"'),
        (answers(lambda r: {"scores": 1.0}), "returned float: it must return a list"),
        (answers(lambda r: {"scores": None}), "returned NoneType: it must return a list"),
        (answers(lambda r: {"scores": [1.0]}), "returned 1 values for 3 completions"),
        (answers(lambda r: {"scores": [1.0, math.nan, 2.0]}), "returned nan for completion 2 of 3"),
        (answers(lambda r: {"scores": [1e300, 0.0, 0.0]}), "returned 1e+300 for completion 1 of 3"),
        (answers(lambda r: {"scores": [10**400, 0.0, 0.0]}), "every reward must be a finite number"),
        (answers(lambda r: {"scores": ["1", "2", "3"]}), "returned '1' for completion 1 of 3"),
        (answers(lambda r: {"scores": [None] * 3}), "returned None for completion 1 of 3"),
        (answers(lambda r: lengths(r) | {"components": [1]}), "components [1]: they must be an object"),
        (answers(lambda r: lengths(r) | {"components": {"a": [1]}}), "component 'a' of"),
        (answers(lambda r: lengths(r) | {"components": {"a": [[1]] * 3}}), "component 'a' of"),
        (answers(lambda r: lengths(r) | {"components": {"std": [1] * 3}}), "cannot be called 'std'"),
        (says(400, '{"error": "no such column"}'), "refuses POST with 400 Bad Request (no such column)"),
        (says(404, "<html>"), "refuses POST with 404 Not Found: correct the address"),
        (says(302, Location="http://127.0.0.1:1/elsewhere"), "it sends on to http://127.0.0.1:1/elsewhere"),
    ],
)
def test_nonsense_is_refused_at_once(act: Act, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heeler.rewards.http.time.sleep", lambda seconds: pytest.fail("it tried again"))
    with scripted(act) as server, pytest.raises(HeelerError) as refusal:
        quick(server.url)(THREE)
    assert not isinstance(refusal.value, Unavailable) and len(server.requests) == 1
    assert sentence in str(refusal.value) and server.url in str(refusal.value) and "\n" not in str(refusal.value)


def test_batches_that_are_answered_differently() -> None:
    with (
        scripted(answers(lengths), answers(lambda r: {"scores": [[1.0]]})) as server,
        pytest.raises(HeelerError, match=r"answered the batches of one update differently"),
    ):
        quick(server.url, batch_size=2)(THREE)


def test_what_json_cannot_carry_is_named() -> None:
    for column in ([{1, 2}], [math.inf]):
        with pytest.raises(HeelerError, match=r"cannot be sent to the reward at .* as JSON"):
            quick("http://127.0.0.1:1")(samples_of(["a"], ["b"], answer=column))


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:port", "http://me:secret@host/", "http://[::1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(HeelerError) as refusal:
        HTTPReward(url)
    assert "secret" not in str(refusal.value)


def test_settings_that_make_no_sense() -> None:
    for changes in ({"batch_size": 0}, {"timeout": 0.0}, {"timeout": math.nan}, {"retries": -1}, {"backoff": math.inf}):
        with pytest.raises(HeelerError, match="needs batch_size >= 1"):
            quick("http://127.0.0.1:1", **changes)
    with pytest.raises(HeelerError, match="its address or a header is malformed"):
        quick("http://127.0.0.1:1", headers={"Authorization": "a\nb"})(THREE)


def test_a_check_of_something_that_is_no_reward_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (b'{"status": "ok"}', b"<html>"):
        monkeypatch.setattr(Scripted, "do_GET", lambda handler, content=content: handler.say(200, content))
        with scripted(answers(lengths)) as server, pytest.raises(HeelerError, match="address of a reward server"):
            quick(server.url).check()
    monkeypatch.setattr(Scripted, "do_GET", lambda handler: handler.say(503, b""))
    with scripted(answers(lengths)) as server, pytest.raises(Unavailable, match="it answers 503"):
        load_reward(server.url)


def test_a_spec_sets_what_the_client_may_be_told() -> None:
    with scripted(answers(lengths)) as server:
        reward = load_reward(f"{server.url}/path(timeout=120, retries=10, batch-size=2, backoff=0)")
        assert isinstance(reward, HTTPReward) and reward.url == f"{server.url}/path"
        assert (reward.timeout, reward.retries, reward.batch_size, reward.backoff) == (120.0, 10, 2, 0.0)
        assert reward(THREE).scores.tolist() == [1.0, 2.0, 3.0] and len(server.requests) == 2
        both = load_reward(f"2*{server.url}/a(7) + far={server.url}/b(retries=0)")
        assert isinstance(both, WeightedSum) and list(both.terms) == ["a", "far"]
        assert both(THREE).scores.tolist() == [3.0, 6.0, 9.0]
    for spec, sentence in (
        ("(timeout=soon)", "timeout of the reward at http://127.0.0.1:1 must be a number, not 'soon'"),
        ("(header=a)", "takes timeout, retries, batch-size, backoff: 'header=a' does not fit there"),
        ("(timeout=inf)", "needs batch_size >= 1, timeout > 0"),
        ("(timeout=1)/path", "goes on after its brackets"),
    ):
        with pytest.raises(HeelerError, match=re.escape(sentence)):
            load_reward(f"http://127.0.0.1:1{spec}")


def test_a_token_of_the_environment_is_sent_with_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def named(handler: Scripted) -> None:
        asked.append(handler.headers["Authorization"])
        handler.say(200, b'{"name": "scripted"}')

    monkeypatch.setattr(Scripted, "do_GET", named)
    with scripted(answers(lengths)) as server:
        load_reward(server.url)(THREE)
        monkeypatch.setenv("HEELER_REWARD_TOKEN", " s3cret\n")
        load_reward(server.url)(THREE)
    asked += [headers["Authorization"] for headers, _ in server.requests]
    assert asked == [None, "Bearer s3cret", None, "Bearer s3cret"]
    monkeypatch.setenv("HEELER_REWARD_TOKEN", "s3\ncret")
    with pytest.raises(HeelerError, match="HEELER_REWARD_TOKEN holds a character") as refusal:
        load_reward("http://127.0.0.1:1")
    assert "cret" not in str(refusal.value)


# the server ---------------------------------------------------------------------------------------------------


def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=5) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_served_function_scores_like_itself() -> None:
    def judge(
        prompts: Any, completions: Any, level: Any, truncated: Any, completion_ids: Any, **columns: Any
    ) -> list[float]:
        assert not columns
        return [
            len(p) + len(str(c)) / 3 + at / 7 + cut + sum(ids)
            for p, c, at, cut, ids in zip(prompts, completions, level, truncated, completion_ids, strict=True)
        ]

    direct = FunctionReward(judge, "judge")
    chat = [{"role": "user", "content": "é\n\ud800"}]
    samples = samples_of(["a", chat, "b", "c"], ["x y", "ü", "", "z"], [True, False, True, False], level=[1, 2, 3, 4])
    with served(direct) as server:
        reward = quick(server.url, batch_size=3)
        assert reward.check() == "vowels"
        assert torch.equal(reward(samples).scores, direct(samples).scores)
        assert load_reward(server.url)(samples).scores.tolist() == direct(samples).scores.tolist()


def test_a_served_function_of_token_rewards() -> None:
    direct = FunctionReward(lambda prompts, completions: [[0.1] * len(c) for c in completions], "tokens")
    samples = samples_of(["a", "b"], ["xyz", "w"])
    with served(direct) as server:
        output = quick(server.url)(samples)
    assert output.token_rewards == direct(samples).token_rewards
    assert torch.equal(output.scores, direct(samples).scores)


def test_a_served_classifier_scores_like_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_tiny_model(tmp_path / "lm")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0)
    model.save_pretrained(tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "rm")
    direct = load_reward(str(tmp_path / "rm"))
    chat = [{"role": "user", "content": "b"}]
    samples = samples_of(["a film ", chat, "<user>b<assistant>"], ["that is good", "bad", "bad"])
    with served(direct) as server:
        output, expected = quick(server.url)(samples), direct(samples)
    torch.testing.assert_close(output.scores, expected.scores)
    torch.testing.assert_close(output.components["probability"], expected.components["probability"])
    first, *same = output.scores.tolist()
    assert same[0] == pytest.approx(same[1], abs=1e-4) and first != pytest.approx(same[0], abs=1e-2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "must be an object"),
        ({"prompts": ["a"]}, "needs a list 'completions'"),
        ({"completions": ["a"], "prompts": "a"}, "needs a list 'prompts'"),
        ({"prompts": ["a"], "completions": ["a", "b"]}, "'prompts' has 1 entries, but there are 2 completions"),
        ({"prompts": ["a"], "completions": ["a"], "columns": {"x": [1, 2]}}, "'x' has 2 entries"),
        ({"prompts": ["a"], "completions": ["a"], "columns": {"x": 1}}, "'x' is no list"),
        ({"prompts": ["a"], "completions": ["a"], "columns": [1]}, "columns must be an object"),
        ({"prompts": ["a"], "completions": [1]}, "entry 1 of 'completions' must be a string"),
        ({"prompts": [["a"]], "completions": ["a"]}, "entry 1 of 'prompts' must be a string or a list of messages"),
        ({"prompts": [[{"role": "user", "content": None}]], "completions": ["a"]}, "role and content, both strings"),
        ({"prompts": [[{"content": "a"}]], "completions": ["a"]}, "with role and content, both strings"),
        ({"prompts": ["a"], "completions": ["a"], "truncated": [1]}, "entry 1 of 'truncated' must be true or false"),
        ({"prompts": ["a"], "completions": ["a"], "completion_ids": [1]}, "must be a list of integers"),
    ],
)
def test_the_server_refuses_nonsense(content: Any, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with served(FunctionReward(vowels, "vowels")) as server:
        status, answer = post(server.url, content if isinstance(content, bytes) else json.dumps(content).encode())
        assert status == 400 and sentence in answer["error"]
        assert post(server.url, b'{"prompts": ["a"], "completions": ["ae"]}')[0] == 200
        assert post(server.url, b'{"prompts": [], "completions": []}') == (200, {"scores": []})
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_request_without_a_length_is_refused() -> None:
    with served(FunctionReward(vowels, "vowels")) as server, socket.create_connection(server.server_address) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"411" in client.recv(4096)


def test_a_reward_that_raises_gives_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    class Raises:
        def __call__(self, samples: Samples) -> RewardOutput:
            raise [ValueError("no"), HeelerError("a sentence"), Unavailable("gone")][len(samples) - 1]

    class Infinite:
        def __call__(self, samples: Samples) -> RewardOutput:
            return RewardOutput(scores=torch.full((len(samples),), math.inf), token_rewards=None, components={})

    def ask(server: Any, count: int) -> tuple[int, dict[str, Any]]:
        return post(server.url, json.dumps({"prompts": ["a"] * count, "completions": ["b"] * count}).encode())

    with served(Raises()) as server:
        status, answer = ask(server, 1)
        assert status == 500 and "the reward raised ValueError: no (test_http.py, line" in answer["error"]
        assert ask(server, 2) == (500, {"error": "a sentence"}) and ask(server, 3) == (503, {"error": "gone"})
        with pytest.raises(Unavailable, match=r"it answers 500 Internal Server Error \(a sentence\); tried 1 times"):
            quick(server.url, retries=0)(samples_of(["a", "b"], ["c", "d"]))
    with served(Infinite()) as server:
        status, answer = ask(server, 1)
        assert status == 500 and "not finite" in answer["error"]
    assert "Traceback" not in capsys.readouterr().err


def test_requests_that_come_together_are_scored_one_by_one() -> None:
    inside, most = 0, 0

    def slow(prompts: Any, completions: Any) -> list[float]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.02)
        inside -= 1
        return [float(len(c)) for c in completions]

    results: dict[int, list[float]] = {}
    with served(FunctionReward(slow, "slow")) as server:

        def ask(i: int) -> None:
            results[i] = quick(server.url)(samples_of(["p"], ["x" * i])).scores.tolist()

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1 and results == {i: [float(i)] for i in range(6)}


# the command line ---------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served_task.py").write_text(
        "def score(prompts, completions, **columns): return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return tmp_path


def test_serve_reward_from_the_command_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags, said in (
            (["--port", port], f"cannot listen on 127.0.0.1, port {port} (Address already in use)"),
            (["--port", "70000"], "cannot listen on 127.0.0.1, port 70000"),
            (["--host", "192.0.2.1", "--port", "0"], "cannot listen on 192.0.2.1, port 0"),
        ):
            assert main(["serve-reward", "served_task:score", *flags]) == 2
            error = capsys.readouterr().err
            assert said in error and "choose another --port" in error and error.count("\n") == 1
    assert main(["serve-reward"]) == 2 and "needs module:function" in capsys.readouterr().err
    assert main(["serve-reward", "served_task:absent"]) == 2 and "has no function" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["serve-reward", "--help"])
    assert stop.value.code == 0 and "--port" in capsys.readouterr().out

    from heeler.rewards.serve import RewardServer

    forever, scores = RewardServer.serve_forever, []

    def until_asked(server: Any, poll_interval: float = 0.01) -> None:
        def ask() -> None:
            scores.extend(quick(server.url)(THREE).scores.tolist())
            server.shutdown()

        asking = threading.Thread(target=ask)
        asking.start()
        forever(server, poll_interval)
        asking.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardServer, "serve_forever", until_asked)
    assert main(["serve-reward", "served_task:score", "--port", "0"]) == 0
    printed = capsys.readouterr()
    assert scores == [1.0, 2.0, 3.0] and "Traceback" not in printed.err
    assert "served_task:score answers at http://127.0.0.1:" in printed.out and ":0 " not in printed.out


def test_a_server_that_is_down_at_the_start(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    started = time.monotonic()
    # the model does not exist either: the server is asked before any model is loaded
    assert main(["ppo", "lm", "--model", "no-model", "--prompts", "prompts.jsonl", "--reward", url, "--out", "r"]) == 2
    error = capsys.readouterr().err
    assert time.monotonic() - started < 3 and not Path("r").exists()
    assert f"the reward at {url} does not answer: the connection was refused; start it first" in error
    assert error.count("\n") == 1
    with pytest.raises(Unavailable, match="start it first"):
        train_text(small("no-model", workplace / "r"), prompts=PROMPTS, reward=quick(url), show=False)


# a server that dies in the middle of a run ----------------------------------------------------------------------


rarely_saved = partial(small, checkpoint_every=100)


def dies_after(requests: int) -> Callable[..., list[float]]:
    """A reward function that draws random numbers and is unavailable from its call number `requests` on."""
    calls = 0

    def noisy(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        noise = torch.rand(len(completions)).tolist()
        if calls > requests:
            raise Unavailable("the server is gone")
        return [value + x for value, x in zip(vowels(prompts, completions), noise, strict=True)]

    return noisy


def test_a_server_that_dies_in_the_middle(tiny_llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reward = FunctionReward(vowels, "vowels")
    straight = train_text(rarely_saved(tiny_llama, tmp_path / "whole"), prompts=PROMPTS, reward=vowels, show=False)
    server = make_server(reward, "127.0.0.1", 0, "vowels")
    port, client = server.server_address[1], quick(server.url, retries=2)

    with serving(server):

        def die(report: UpdateReport) -> None:
            if report.metrics["step"] == 3:
                server.shutdown()
                server.server_close()

        with pytest.raises(Unavailable) as gone:
            train_text(
                rarely_saved(tiny_llama, Path("run")),
                prompts=PROMPTS,
                reward=client,
                on_update=die,
                show=False,
            )
    sentence = str(gone.value)
    assert "the connection was refused; tried 3 times" in sentence and "\n" not in sentence
    assert sentence.endswith("[after update 3; run holds update 3, continue it with: heeler resume run]")
    assert RunFolder.open("run").last_checkpoint() == 3 and len(numbers(Path("run"))) == 3

    with pytest.raises(Unavailable, match="start it first"):  # still down
        resume_text("run", prompts=PROMPTS, reward=client, show=False)
    with served(reward, port):
        resumed = resume_text("run", prompts=PROMPTS, reward=client, show=False)
    assert numbers(Path("run")) == numbers(tmp_path / "whole")
    for name, tensor in straight.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name


def test_the_same_from_the_command_line(
    tiny_llama: str, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def out_of_order(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if 3 <= calls <= 9:  # the first try of update 3, and its 6 others
            raise HeelerError("no more")
        return vowels(prompts, completions)

    monkeypatch.setattr("heeler.rewards.http.time.sleep", lambda seconds: None)
    with served(FunctionReward(out_of_order, "out_of_order")) as server:
        words = [
            "ppo", "lm", "--model", tiny_llama, "--prompts", "prompts.jsonl", "--reward", server.url, "--out", "run",
            "--updates", "4", "--prompts-per-update", "4", "--sampling.max-new-tokens", "4", "--threads", "1",
            "--precision", "fp32", "trainable:top-layers", "--trainable.layers", "1",
        ]  # fmt: skip
        assert main(words) == 2
        printed = capsys.readouterr()
        sentences = [line for line in printed.err.splitlines() if line.startswith("heeler: ")]
        assert len(sentences) == 1 and "(no more); tried 7 times" in sentences[0]
        assert sentences[0].endswith("continue it with: heeler resume run]") and "Traceback" not in printed.err
        assert printed.out.count("trying again, 6 times at most") == 1
        assert RunFolder.open("run").last_checkpoint() == 2
        assert main(["resume", "run"]) == 0
    assert [row["step"] for row in numbers(Path("run"))] == [1, 2, 3, 4]


def evaluated(model: str, out: Path) -> TextConfig:
    return small(model, out, updates=3, eval_every=2)


HELD_OUT: dict[str, Any] = {"prompts": PROMPTS, "eval_prompts": PROMPTS[:2], "show": False}


@pytest.fixture(scope="module")
def whole(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that is never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train_text(evaluated(tiny_llama, out), **HELD_OUT, reward=dies_after(100))


@pytest.mark.parametrize(
    ("calls", "step"),
    [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3)],
    ids=["evaluation before", "update 1", "update 2", "evaluation of update 2", "update 3", "evaluation after"],
)
def test_wherever_the_reward_is_gone_nothing_is_lost(
    tiny_llama: str, tmp_path: Path, whole: Any, calls: int, step: int
) -> None:
    out = tmp_path / "parts"
    with pytest.raises(Unavailable, match=rf"is gone \[after update {step}; .* holds update {step}, .* heeler resume"):
        train_text(evaluated(tiny_llama, out), **HELD_OUT, reward=dies_after(calls))
    resumed = resume_text(out, **HELD_OUT, reward=dies_after(100))
    assert numbers(out) == numbers(whole.folder.path)
    for key in ("eval/before", "eval/after", "best", "eval/examples"):
        assert resumed.summary[key] == whole.summary[key], key
    assert (out / "samples.jsonl").read_text() == (whole.folder.path / "samples.jsonl").read_text()
    with pytest.raises(HeelerError, match="is complete"):
        resume_text(out, **HELD_OUT, reward=dies_after(100))


def test_a_run_given_more_updates_owes_its_last_evaluation_again(tiny_llama: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_text(small(tiny_llama, out, updates=1), **HELD_OUT, reward=vowels)
    with pytest.raises(Unavailable, match="after update 2"):
        resume_text(out, **HELD_OUT, reward=dies_after(1), updates=2)
    assert "eval/after" in resume_text(out, **HELD_OUT, reward=vowels).summary
