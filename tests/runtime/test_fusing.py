"""Functions that torch.compile fuses: here on a CPU, where the compiled kernels are kept out of the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from heeler.policies import layer_parts, llama, logprobs
from heeler.policies.layer_parts import FusedParts, Parts, parts_for
from heeler.policies.llama import run_layers, try_fused
from heeler.policies.logprobs import logprobs_alone, token_logprobs
from heeler.runtime import fusing
from heeler.train.text import build_text_run
from tests.policies.test_llama import body_of, shared_rows
from tests.runs import small
from tests.tiny import save_tiny_model

CPU = torch.device("cpu")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]  # the second one needs a minute


@pytest.fixture(params=BACKENDS)
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Turns fusing on and off; what cannot be one graph fails."""
    torch._dynamo.reset()
    counters.clear()
    backend = request.param

    def compiled(function: Any) -> Any:
        if function not in made:
            made[function] = torch.compile(function, backend=backend, fullgraph=True, **limit)
        return made[function]

    made: dict[Any, Any] = {}
    limit: dict[str, Any] = fusing._LIMIT  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(fusing, "_fused", compiled)
    monkeypatch.setattr(layer_parts, "loaded", lambda: None)
    monkeypatch.setattr(logprobs, "kernels_for", lambda x: None)
    yield lambda on: fusing.fuse_on(CPU, on)
    fusing.fuse_on(CPU, False)
    torch._dynamo.reset()


def answers(body: Any, rows: int, length: int, compute: torch.dtype, mask: bool) -> list[Tensor]:
    """States and gradients of a stack's weights and inputs."""
    generator = torch.Generator().manual_seed(rows + length)
    x, d = (torch.randn(rows, length, 32, generator=generator) for _ in range(2))
    x.requires_grad_()
    seen, positions = shared_rows(rows, length) if mask else (None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
        y = run_layers(body, x, positions, seen)
    wanted = [x, *(p for p in body.parameters() if p.requires_grad and p is not body.embed_tokens.weight)]
    return [y.detach(), *torch.autograd.grad((y.float() * d).sum(), wanted)]


@pytest.mark.parametrize("kind", ["llama", "qwen3", pytest.param("biased", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_fused_layers_are_the_layers(kind: str, compute: torch.dtype, fused: Callable[[bool], None]) -> None:
    body = body_of(kind, std=0.1)
    graphs: list[int] = []
    for rows, length in ((2, 9), (3, 7), (5, 140)):
        for mask in (False, True):
            fused(False)
            plain = answers(body, rows, length, compute, mask)
            fused(True)
            found = answers(body, rows, length, compute, mask)
            fused(False)
            exact = answers(body, rows, length, torch.float32, mask)
            for mine, other, true in zip(found, plain, exact, strict=True):  # as near to it as what is not fused
                off = [float((x.float() - true).norm() / true.norm().clamp(min=0.01)) for x in (mine, other)]
                assert off[0] <= 3 * off[1] + 1e-5, off
            whole = [torch.cat([t.float().flatten() for t in each]) for each in (found, plain, exact)]
            assert (whole[0] - whole[2]).norm() <= 1.2 * (whole[1] - whole[2]).norm() + 1e-5 * whole[2].norm()
        graphs.append(counters["stats"]["unique_graphs"])
    # no new functions for other rows and lengths, but for long rows, whose queries are rounded before they are read
    assert 0 < graphs[0] == graphs[1] and graphs[2] - graphs[1] <= 4


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_fused_logprobs_are_the_logprobs(frozen: bool, entropy: bool, fused: Callable[[bool], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(23, 8, generator=generator), torch.randn(40, 8, generator=generator)
    tokens, d = torch.randint(40, (23,), generator=generator), torch.randn(2, 23, generator=generator)
    results: list[list[Tensor]] = []
    for on in (False, True):
        fused(on)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        options: dict[str, Any] = {"temperature": 0.7, "chunk": 7}  # 7, 7, 7, 2
        found = token_logprobs(h, w, tokens, entropy_gradient=entropy, **options)
        ((found[0] * d[0]).sum() + (found[1] * d[1]).sum() * entropy).backward()
        assert torch.equal(logprobs_alone(h, w, tokens, **options), found[0])
        assert h.grad is not None
        results.append([*found, h.grad, *([] if w.grad is None else [w.grad])])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2  # with what gradients need, and without


def test_it_is_tried_before_it_is_used(fused: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of("llama", std=0.1)
    head = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    for compute in (torch.float32, torch.bfloat16):
        assert try_fused(body, head, compute, 300) == "" and fusing.fuses_on(CPU)
    settings: dict[str, Any] = {"compute": torch.float32, "width": 8, "scale": 1.0, "eps": 1e-5, "mask": None}
    turn = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    x = torch.zeros(1, 2, 8)
    assert type(parts_for(x, **settings, turn=turn)) is FusedParts

    def broken(self: Any, function: Any, *given: Any) -> Any:
        raise ImportError("no compiler\nand more")

    monkeypatch.setattr(FusedParts, "_do", broken)
    assert try_fused(body, head, torch.float32, 300) == "ImportError: no compiler" and not fusing.fuses_on(CPU)
    assert type(parts_for(x, **settings, turn=turn)) is Parts
    monkeypatch.setattr(FusedParts, "gate", lambda self, gu: 1.1 * Parts.gate(self, gu))
    monkeypatch.setattr(FusedParts, "_do", Parts._do)  # pyright: ignore[reportPrivateUsage]
    assert try_fused(body, head, torch.float32, 300) == "what was fused gives other numbers"
    assert not fusing.fuses_on(CPU)


def test_a_run_that_was_fused_goes_on_without_a_gpu(tiny_llama: str, tmp_path: Path) -> None:
    fusing.fuse_on(CPU)  # as an earlier run in this process leaves it
    run = build_text_run(small(tiny_llama, tmp_path / "run", fuse_layers=True), prompts=["a"], reward=lambda **_: [0.0])
    assert "--fuse-layers changes nothing on a CPU" in "\n".join(run.notes) and not run.resolved()["layers_fused"]
    assert not fusing.fuses_on(CPU)


def test_a_run_says_why_nothing_is_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu = pytest.importorskip("tests.pretend_gpu", exc_type=ImportError).pretend_gpu
    said: dict[str, list[str]] = {}
    for architecture in ("llama", "gpt2"):
        path = save_tiny_model(tmp_path / architecture, architecture)
        config = small(path, tmp_path / f"{architecture} run", fuse_layers=True, device="pretend:0")
        with pretend_gpu():
            monkeypatch.setattr(llama, "run_layers", lambda *_: 1 / 0)
            run = build_text_run(config, prompts=["a"], reward=lambda prompts, completions: [0.0])
            assert not run.resolved()["layers_fused"]
        said[architecture] = [note for note in run.notes if "fuse" in note]
    assert said["llama"] == [
        "what lies between matrix products is not fused, which is slower: ZeroDivisionError: division by zero"
    ]
    assert said["gpt2"] == ["--fuse-layers changes nothing here: this model's layers run by transformers"]
