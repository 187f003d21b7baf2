"""Decoding steps that a GPU plays back.

A step of few rows is hundreds of small kernels, and to launch one takes the host longer than the GPU needs to run it. A
CUDA graph is a recording of them that one call launches. It reads and writes fixed places, so it holds for one number
of rows and one of columns: both are rounded up, by a quarter at most, and the places that are too many hold a token
that nobody reads.

    ids, positions -> their places;  play;  logits, states in theirs        of [rounded rows, rounded columns]

A recording lives as long as the call that samples: keys, values and weights lie where they lay when it was made. The
first one of a call is compared with the step as it is (`Steps`). Everything but `CudaGraphs` is tested without a GPU:
tests/rollout/test_graphs.py plays operations back on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from heeler.rollout.engines.decoder import Decoder
from heeler.rollout.engines.plain import Tokens
from heeler.rollout.engines.slots import Slots

Said = tuple[Tensor, Tensor | None, Tensor]  # what the decoder gives
Record = Callable[[Callable[[], Said]], tuple[Callable[[], None], Said]]  # a step -> (plays it, where its results lie)

LEAST_ROWS, LEAST_COLUMNS = 8, 64
UNRECORDABLE = ("dynamic", "longrope")  # rotations that ask the host how long the rows are
NEAR = 0.02  # of the largest logit: how far a played step may lie from the step as it is


@dataclass
class Shape:
    """The places of a number of rows and columns.

    Attributes:
        tokens: of the rows; the tensors stay where they are.
        play: repeats the step, or None before it is recorded.
        said: where its results lie.
    """

    tokens: Tokens
    play: Callable[[], None] | None = None
    said: Said | None = None

    def fill(self, tokens: Tokens) -> None:
        """Put the tokens of a step in their places; the others read token 0 into column 0."""
        count = len(tokens.ids)
        for place, given in ((self.tokens.ids, tokens.ids), (self.tokens.positions, tokens.positions)):
            place[:count] = given
            place[count:] = 0


class Steps:
    """In place of a decoder's passes over single tokens of rows 0, 1, 2, ...: recorded, then played back.

    A shape that comes once is not recorded. Where recording fails, or a played step says something else, all steps run
    as they are from then on.

    Args:
        decoder: of the model.
        slots: of the rows; those beyond them are free, and the places that are too many write there.
        record: how a step is recorded.
        on_failure: called with the reason.
    """

    def __init__(self, decoder: Decoder, slots: Slots, record: Record, on_failure: Callable[[str], Any]) -> None:
        self.decoder, self.slots, self.record, self.on_failure = decoder, slots, record, on_failure
        self.shapes: dict[tuple[int, int], Shape] = {}
        self.compared, self.works = False, True

    def __call__(self, tokens: Tokens, slots: Slots) -> Said:
        if not self.works:
            return self.decoder(tokens, slots)
        count, most = len(tokens.ids), self.slots.keys.shape[1]
        key = min(rounded(count, LEAST_ROWS), most), min(rounded(tokens.longest, LEAST_COLUMNS), slots.columns)
        shape = self.shapes.get(key)
        if shape is None:
            self.shapes[key] = self._places(*key)
            return self.decoder(tokens, slots)
        shape.fill(tokens)
        if shape.play is None and not self._recorded(shape):
            return self.decoder(tokens, slots)
        assert shape.play is not None and shape.said is not None
        shape.play()
        logits, trunk, final = (None if part is None else part[:count] for part in shape.said)
        assert logits is not None and final is not None
        # states are kept over steps, logits are drawn from at once
        return logits, None if trunk is None else trunk.clone(), final.clone()

    def _places(self, rows: int, columns: int) -> Shape:
        ids = torch.zeros(rows, dtype=torch.long, device=self.slots.keys.device)
        slots = torch.arange(rows, dtype=torch.int32, device=ids.device)
        return Shape(Tokens(ids, torch.zeros_like(ids), slots, columns))

    def _recorded(self, shape: Shape) -> bool:
        """Record the step of a shape; whether that could be done, and says the same."""

        def step() -> Said:
            # what one pass remembers of its tokens is not the next one's
            return self.decoder(replace(shape.tokens), self.slots)

        try:
            shape.play, shape.said = self.record(step)
            reason = "" if self._agrees(shape, step) else "what they played back was something else"
        except torch.OutOfMemoryError:  # perhaps there is room in the next call
            self.works = False
            self.shapes.clear()
            return False
        except RuntimeError as error:
            cause = error.__context__ or error  # torch's own, where it failed to end a recording that had failed
            reason = str(cause).strip().partition("\n")[0]
        if reason:
            self.works = False
            self.shapes.clear()
            self.on_failure(reason)
        return self.works

    def _agrees(self, shape: Shape, step: Callable[[], Said]) -> bool:
        """Whether the first recording of a call gives the logits of the step, which may be taken twice."""
        if self.compared:
            return True
        self.compared = True
        assert shape.play is not None and shape.said is not None
        shape.play()
        played, wanted = shape.said[0].float(), step()[0].float()
        near = NEAR * float(wanted.abs().nan_to_num().amax())
        return torch.allclose(played, wanted, rtol=0.0, atol=near, equal_nan=True)


def rounded(count: int, least: int) -> int:
    """`count`, rounded up to a multiple of `least` and of a quarter of the power of two below it."""
    step = max(least, 1 << max(count.bit_length() - 3, 0))
    return -(-count // step) * step


def recorder(decoder: Decoder, device: torch.device) -> Record | None:
    """How a model's steps are recorded on this device, or None where they cannot be."""
    if device.type != "cuda" or getattr(decoder.rotary, "rope_type", None) in UNRECORDABLE:
        return None
    return CudaGraphs(device)


class CudaGraphs:
    """Records steps as CUDA graphs that share their memory: they are played one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Said]) -> tuple[Callable[[], None], Said]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            stream = _side_stream(self.device)
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    step()  # what libraries prepare when they are first used cannot be recorded
                    with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                        said = step()
            finally:
                torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, said


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> Any:
    """The stream of a device on which steps are recorded: one, since libraries keep memory for each."""
    return torch.cuda.Stream(device)
