"""Decoding steps that are recorded and played back, on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from heeler.policies.loading import load_causal_lm
from heeler.rollout.engines import graphs, native
from heeler.rollout.engines.decoder import Decoder
from heeler.rollout.engines.graphs import CudaGraphs, rounded
from heeler.rollout.engines.native import NativeEngine
from heeler.types import Completion, Request, Sampling
from tests.tiny import save_tiny_model

pretend_gpu = pytest.importorskip("tests.pretend_gpu", exc_type=ImportError).pretend_gpu
Recorder = pytest.importorskip("tests.played_back").Recorder

# 19 requests in 11 rows: ends at different times, other requests join, prompts that several samples share
REQUESTS = [Request(prompt=[5 + i // 2, 7] * (1 + i % 3), seed=i) for i in range(19)]
SAMPLING = Sampling(max_new_tokens=70)
ENDS = [3, 4, 5]  # of 300 tokens


def sampled(path: str, device: str, **options: Any) -> tuple[NativeEngine, list[Completion]]:
    model = load_causal_lm(path).to(device)
    engine = NativeEngine(model, eos_ids=ENDS, max_rows=11, trunk_layers=1, final_states=True, **options)
    return engine, engine.generate(REQUESTS, SAMPLING)


def same(here: list[Completion], there: list[Completion]) -> None:
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        assert (one.tokens, one.finish_reason) == (other.tokens, other.finish_reason)
        for name in ("logprobs", "trunk_states", "final_states"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-4, rtol=1e-4)


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], Any] = lambda recorder: recorder) -> Iterator[Any]:
    """A pretend GPU that can record."""
    with pretend_gpu() as waits:
        made = Recorder(waits)
        monkeypatch.setattr(native, "recorder", lambda decoder, device: wrap(made) if device.type != "cpu" else None)
        yield made


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_played_steps_are_the_steps(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_tiny_model(tmp_path, architecture)
    _, wanted = sampled(path, "cpu")
    lengths = [len(completion.tokens) for completion in wanted]
    assert min(lengths) < 30 and max(lengths) == 70  # some leave early, some stay to the end
    with recording(monkeypatch) as recorder:
        engine, found = sampled(path, "pretend:0")
        assert engine.steps_recorded
    same(wanted, found)
    assert 3 <= recorder.made <= 12 and recorder.played > 60, (recorder.made, recorder.played)
    assert capsys.readouterr().out == ""


def test_new_weights_are_played(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: list[list[Completion]] = []

    def twice(device: str) -> list[Completion]:
        engine, before = sampled(tiny_llama, device)
        name, weight = "model.layers.1.mlp.down_proj.weight", engine.model.model.layers[1].mlp.down_proj.weight
        engine.begin()
        engine.load([(name, weight.detach() * 3.0 + 0.01)])
        engine.commit(1)
        outputs.append(before)
        return engine.generate(REQUESTS, SAMPLING)

    wanted = twice("cpu")
    with recording(monkeypatch) as recorder:
        found = twice("pretend:0")
    same(wanted, found)
    same(*outputs)
    assert recorder.made > 0 and [c.tokens for c in wanted] != [c.tokens for c in outputs[0]]


def fails(recorder: Any) -> Any:
    def record(step: Any) -> Any:
        step()
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    return record


def lies(recorder: Any) -> Any:
    def record(step: Any) -> Any:
        play, said = recorder(step)
        return lambda: (play(), said[0].mul_(1.1)), said

    return record


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [(fails, "CUDA error: operation not permitted when stream is capturing"),
     (lies, "what they played back was something else")],
)  # fmt: skip
def test_where_recording_does_not_work_steps_run_as_they_are(
    wrap: Any, reason: str, tiny_llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, wanted = sampled(tiny_llama, "cpu")
    with recording(monkeypatch, wrap):
        engine, found = sampled(tiny_llama, "pretend:0")
        again = engine.generate(REQUESTS, SAMPLING)
    same(wanted, found)
    same(wanted, again)
    said = f"decoding steps are not recorded as CUDA graphs any more, which is slower: {reason}\n"
    assert capsys.readouterr().out == said and not engine.steps_recorded  # once, not in every update


def test_a_full_memory_is_not_the_end_of_recording(
    tiny_llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, wanted = sampled(tiny_llama, "cpu")
    full = [True]

    def once(recorder: Any) -> Any:
        def record(step: Any) -> Any:
            if full:
                full.pop()
                raise torch.OutOfMemoryError("CUDA out of memory")
            return recorder(step)

        return record

    with recording(monkeypatch, once) as recorder:
        engine, found = sampled(tiny_llama, "pretend:0")
        assert recorder.made == 0 and engine.steps_recorded
        again = engine.generate(REQUESTS, SAMPLING)
    same(wanted, found)
    same(wanted, again)
    assert recorder.made > 0 and capsys.readouterr().out == ""


def test_it_can_be_turned_off(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with recording(monkeypatch) as recorder:
        engine, _ = sampled(tiny_llama, "pretend:0", record_steps=False)
    assert recorder.made == 0 and not engine.steps_recorded


def test_a_host_that_is_asked_cannot_be_recorded() -> None:
    with pretend_gpu() as waits:
        there = torch.ones(2).to("pretend:0")
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            Recorder(waits)(lambda: (there + float(there.sum()), None, there))


def test_shapes_are_rounded_up_by_a_quarter_at_most() -> None:
    assert [rounded(n, 8) for n in (1, 8, 9, 33, 64, 65, 200, 257)] == [8, 8, 16, 40, 64, 80, 224, 320]
    for n in range(32, 5000):
        assert n <= rounded(n, 8) <= 1.25 * n
    assert len({rounded(n, 64) for n in range(1, 2049)}) < 20  # few recordings


@pytest.mark.parametrize(("kind", "can"), [("default", True), ("llama3", True), ("dynamic", False)])
def test_which_rotations_can_be_recorded(kind: str, can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4}
    if kind != "default":
        rope |= {"factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, rope_parameters=rope,
    )  # fmt: skip
    decoder = Decoder(transformers.LlamaForCausalLM(config))
    monkeypatch.setattr(graphs, "CudaGraphs", lambda device: device)
    device = torch.device("cuda", 0)
    assert graphs.recorder(decoder, device) == (device if can else None)
    assert graphs.recorder(decoder, torch.device("cpu")) is None


def test_how_a_gpu_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls, torch's own replaced: the step once on the side stream, then once while it records."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            events.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            events.append("replay")

    current = [Stream("main")]

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    @contextmanager
    def graph(graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert isinstance(graph, Graph) and pool == "pool" and stream is current[-1]
        assert capture_error_mode == "thread_local"
        events.append("begin")
        yield
        events.append("end")

    @contextmanager
    def device(device: Any) -> Iterator[None]:
        yield

    new: dict[str, Any] = {
        "CUDAGraph": Graph, "Stream": lambda device: Stream("side"), "stream": on, "graph": graph, "device": device,
        "current_stream": lambda: current[-1], "graph_pool_handle": lambda: "pool",
    }  # fmt: skip
    for name, value in new.items():
        monkeypatch.setattr(torch.cuda, name, value)
    graphs._side_stream.cache_clear()  # pyright: ignore[reportPrivateUsage]
    said = torch.zeros(1), None, torch.zeros(1)

    def step() -> Any:
        events.append(f"step on {current[-1].name}")
        return said

    def broken() -> Any:
        events.append("broken")
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs(torch.device("cuda", 0))(broken)
    assert events == ["side waits for main", "broken", "main waits for side"]  # which may still read what was given
    events.clear()
    play, where = CudaGraphs(torch.device("cuda", 0))(step)
    graphs._side_stream.cache_clear()  # pyright: ignore[reportPrivateUsage]
    assert where is said
    play()
    assert events == [
        "side waits for main", "step on side", "begin", "step on side", "end", "main waits for side", "replay",
    ]  # fmt: skip
