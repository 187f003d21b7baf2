"""What a decoding step does between its products, compiled: kernels.c, through runtime/compiled.py.

torch's attention and its small products take several times as long for single tokens
(docs/benchmarks/decoding_parts.md), and want rows of one length. Prompts, whose tokens see one column more each, are
read by it as well, whatever their lengths, without padding. Residuals, norms, rotations and gates are several
operations of torch each, most of whose time is the calls. It is used where it can be built, the threads are torch's
own, and its answers to a first question are right; elsewhere torch is (plain.py), and a run says so.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from heeler.rollout.engines.plain import Plain, Tokens
from heeler.runtime.compiled import TYPES, compiled, ends

SOURCE = Path(__file__).with_name("kernels.c")
WIDTHS = (8, 16, 32, 64, 80, 96, 128, 256)  # of a head, that are built


class Kernels:
    """The loaded kernels; `for_model` gives them only where they can be used. The slow twin is `Plain`."""

    def __init__(self, library: Any) -> None:
        self.library = library
        pointer, number, real, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
        last = [number, number]  # whether bf16, threads
        places = [*[pointer] * 5, *[number] * 5]
        self.library.attend.argtypes = [*[pointer] * 5, real, *places, stride, stride, real, *last]
        self.library.add_norm.argtypes = [*[pointer] * 4, number, number, real, *last]
        self.library.gate.argtypes = [*[pointer] * 2, number, number, *last]
        self.library.draw.argtypes = [*[pointer] * 6, number, number, real, *last]

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernels:
        return self  # code, which a copied engine shares

    def __reduce__(self) -> Any:
        return _loaded_there, ()

    def attend(
        self, spoken: Tensor, turn: tuple[Tensor, Tensor], norms: Any, keys: Tensor, values: Tensor, tokens: Tokens,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """`[N, heads * D]`: what each token attends to, once all have joined their rows.

        Args:
            spoken: `[N, (heads + 2 groups) * D]` queries, keys and values; what lies there may be lost.
            turn: `[N, D]` cosines and sines by which queries and keys are rotated.
            norms: of queries and of keys, before that; or None.
            keys, values: `[rows, groups, columns, D]`, which the tokens join.
            tokens: where each belongs.
            scale: of the logits.

        Raises:
            ValueError: the tensors lie otherwise.
        """
        groups, width = keys.shape[1], keys.shape[3]
        count, heads = len(spoken), spoken.shape[1] // width - 2 * groups
        rows, positions = tokens.rows, tokens.positions
        weights = [] if norms is None else [norm.weight for norm in norms]
        fits = (
            spoken.is_contiguous()
            and keys.stride() == values.stride()
            and keys.stride()[2:] == (width, 1)
            and width in WIDTHS
            and rows.dtype == torch.int32
            and positions.dtype == torch.int64
            and all(x.is_contiguous() and len(x) == count for x in (rows, positions, *turn))
            and all(x.dtype == spoken.dtype for x in (keys, values, *turn, *weights))
        )
        if not fits:
            raise ValueError("what was spoken, keys, values or places have a layout that the kernel does not read")
        said = spoken.new_empty(count, heads * width)
        qk = [weight.data_ptr() for weight in weights] or [None, None]
        failed = self.library.attend(
            spoken.data_ptr(), *(x.data_ptr() for x in turn), *qk, norms[0].variance_epsilon if norms else 0.0,
            *(x.data_ptr() for x in (keys, values, said, rows, positions)), count, groups, heads // groups, width,
            tokens.longest, keys.stride(0), keys.stride(1), scale, *ends(spoken),
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the attention of {count} tokens over {tokens.longest} columns")
        return said

    def add_norm(self, x: Tensor, added: Tensor | None, norm: Any) -> Tensor:
        """`[N, H]`: the norm of `x [N, H]`, to which `added [N, H]` is added first, in place, where there is some."""
        weight = norm.weight
        parts = (x,) if added is None else (x, added)
        if not all(part.is_contiguous() and part.dtype == weight.dtype for part in parts):
            raise ValueError("states or weights of a norm have a layout that the kernel does not read")
        y = torch.empty_like(x)
        self.library.add_norm(
            x.data_ptr(), None if added is None else added.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape,
            norm.variance_epsilon, *ends(x),
        )  # fmt: skip
        return y

    def gate(self, gates: Tensor, act: Any) -> Tensor:
        """`[N, F]`: silu(the first half of `gates [N, 2 F]`) times the second; `act` is that silu."""
        if not gates.is_contiguous():
            raise ValueError("gates have a layout that the kernel does not read")
        y = gates.new_empty(len(gates), gates.shape[1] // 2)
        self.library.gate(gates.data_ptr(), y.data_ptr(), *y.shape, *ends(gates))
        return y

    def draw(self, logits: Tensor, u: Tensor, temperature: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens `[B]` and their log-probabilities: `sample` of draws.py without top-k and top-p.

        Args:
            logits: `[B, V]`.
            u: `[B]` float32, of [0, 1).
            temperature: of the distribution.
            bias: `[V]` float32, added to the logits; or None.
        """
        rows, width = logits.shape
        given = (u,) if bias is None else (u, bias)
        fits = logits.is_contiguous() and all(x.is_contiguous() and x.dtype == torch.float32 for x in given)
        if not fits or len(u) != rows or (bias is not None and len(bias) != width):
            raise ValueError("logits or what they are drawn by have a layout that the kernel does not read")
        drawn = torch.empty(rows, dtype=torch.int64, device="cpu")
        logprobs = torch.empty(rows, dtype=torch.float32, device="cpu")
        scratch = torch.empty(rows, width // 256 + 1, dtype=torch.float32, device="cpu")
        self.library.draw(
            logits.data_ptr(), None if bias is None else bias.data_ptr(),
            *(x.data_ptr() for x in (u, drawn, logprobs, scratch)), rows, width, temperature, *ends(logits),
        )  # fmt: skip
        return drawn, logprobs


def kernels_for(x: Tensor) -> Kernels | None:
    """The kernels for numbers of this type and place, or None."""
    return loaded()[0] if x.device.type == "cpu" and x.dtype in TYPES else None


def for_model(model: Any) -> Kernels | None:
    """The kernels for a model that `can_decode`, or None: for another type or place, width of a head or activation."""
    weight, layers = model.lm_head.weight, model.model.layers
    fits = (
        layers[0].self_attn.head_dim in WIDTHS
        and all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in layers)
        and all(p.dtype == weight.dtype for name, p in model.named_parameters() if "norm" in name)
    )
    return kernels_for(weight) if fits else None


def _loaded_there() -> Kernels | Plain:
    """What stands for the kernels in another process."""
    return loaded()[0] or Plain()


@lru_cache(maxsize=1)
def loaded() -> tuple[Kernels | None, str]:
    """The kernels, or None and why there are none."""
    library, why_not = compiled(SOURCE)
    if library is None:
        return None, why_not
    kernel = Kernels(library)
    if not all(_is_right(kernel, dtype) for dtype in TYPES):
        return None, "what was built answers wrongly"
    return kernel, ""


def _is_right(kernel: Kernels, dtype: torch.dtype) -> bool:
    """Whether it answers a first question as `Plain` does."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    spoken, keys, values = random(5, 10 * 64), random(5, 2, 90, 64), random(5, 2, 90, 64)
    turn, positions = (random(5, 64), random(5, 64)), torch.tensor([76, 3, 0, 40, 11])
    norms = [SimpleNamespace(weight=random(64), variance_epsilon=1e-5) for _ in range(2)]
    wide = SimpleNamespace(weight=random(640), variance_epsilon=1e-5)
    tokens = Tokens(positions, positions, torch.arange(5, dtype=torch.int32), 77)
    answers: list[list[Tensor]] = []
    for ways in (kernel, Plain()):
        x, gates, k, v = spoken.clone(), spoken.clone(), keys.clone(), values.clone()
        attended = ways.attend(spoken.clone(), turn, norms, k, v, tokens, 0.125)
        answers.append([attended, k, v, ways.add_norm(x, gates, wide), x, ways.gate(gates, torch.nn.functional.silu)])
    near = 1e-5 if dtype == torch.float32 else 3e-2
    pairs = zip(*answers, strict=True)
    spoken[1, 64 * 9] = torch.nan  # of a key
    lost = kernel.attend(spoken.clone(), turn, None, keys.clone(), values.clone(), tokens, 0.125).isnan().any(1)
    logits, u = 2 * random(5, 600), torch.tensor([0.0, 0.2, 0.5, 0.9, 0.999])
    drawn, logprobs = kernel.draw(logits, u, 0.7, None)
    wanted = (logits.float() / 0.7).log_softmax(-1)
    below = (wanted.exp().cumsum(-1) - u[:, None]).gather(1, drawn[:, None])[:, 0]
    own = wanted.gather(1, drawn[:, None])[:, 0]
    masked = torch.full((3, 600), -torch.inf, dtype=dtype)
    masked[0, 7], masked[1, 8], masked[2, 9], masked[2, 10] = 1.0, torch.nan, 1.0, torch.inf
    told = kernel.draw(masked, u[:3], 0.7, None)
    right = told[0][0].item() == 7 and told[1].isnan().tolist() == [False, True, True]
    right = right and lost.tolist() == [False, True, False, False, False]
    right = right and bool((below > -1e-5).all()) and bool((below - own.exp() < 1e-5).all())
    right = right and torch.allclose(logprobs, own, atol=1e-4)
    return right and all(torch.allclose(x.float(), y.float(), atol=near, rtol=near) for x, y in pairs)
