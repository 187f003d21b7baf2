"""Networks that turn observations into features: MLP, CNN, both, with or without memory, or the user's own.

A network of one's own is any callable that takes the `ObservationSpec` and returns a torch module with an attribute
`num_features`; the module maps a batch of observations (`[n, D]` float32, `[n, C, H, W]` uint8, or a dict of these)
to features `[n, num_features]`. Heeler adds the action head and the value head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from heeler.policies.steps import Observed
from heeler.runtime.packages import load_function
from heeler.types import HeelerError, ObservationSpec

Activation = Literal["tanh", "relu", "elu", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Fully connected layers on the vector; for observations without images.

    Attributes:
        hidden: sizes of the layers.
        activation: after each.
    """

    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"


@dataclass(frozen=True, kw_only=True)
class NatureCNN:
    """The convolutions of the DQN paper on each image, joined with the vector where there is one [Mnih et al., 2015].

    Attributes:
        features: size of the layer behind the convolutions.
    """

    features: int = 512


@dataclass(frozen=True, kw_only=True)
class Custom:
    """The user's own network.

    Attributes:
        builder: "module:name" of a callable that takes the `ObservationSpec` and returns a module with `num_features`.
    """

    builder: str


Network = MLP | NatureCNN | Custom


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    """Orthogonal weights, zero bias [Saxe et al., 2014]."""
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    nn.init.orthogonal_(layer.weight, gain)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class MLPEncoder(nn.Module):
    """`[n, D]` to `[n, hidden[-1]]`."""

    def __init__(self, inputs: int, hidden: Sequence[int], activation: Activation) -> None:
        super().__init__()
        sizes = [inputs, *hidden]
        layers: list[nn.Module] = []
        for i, o in pairwise(sizes):
            layers += [orthogonal(nn.Linear(i, o), math.sqrt(2)), ACTIVATIONS[activation]()]
        self.layers = nn.Sequential(*layers)
        self.num_features = sizes[-1]

    def forward(self, observations: Tensor) -> Tensor:
        return self.layers(observations)


class ImageEncoder(nn.Module):
    """`[n, C, H, W]` uint8 to `[n, features]`."""

    def __init__(self, shape: tuple[int, int, int], features: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.convolutions = nn.Sequential(
            orthogonal(nn.Conv2d(channels, 32, 8, stride=4), math.sqrt(2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2), math.sqrt(2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1), math.sqrt(2)),
            nn.ReLU(),
            nn.Flatten(),
        )
        flat = self.convolutions(torch.zeros(1, channels, height, width)).shape[1]
        self.linear = nn.Sequential(orthogonal(nn.Linear(flat, features), math.sqrt(2)), nn.ReLU())
        self.num_features = features

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type == "cpu":  # channels last trains faster there (docs/log.md)
            images = images.contiguous(memory_format=torch.channels_last)
        kind = images.device.type  # bytes are exact in bf16
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        return self.linear(self.convolutions(images.to(dtype) / 255.0))


class MixedEncoder(nn.Module):
    """Images and a vector: the features of each image beside the vector."""

    def __init__(self, observations: ObservationSpec, features: int) -> None:
        super().__init__()
        self.names = [name for name, _ in observations.images]
        self.images = nn.ModuleList([ImageEncoder(shape, features) for _, shape in observations.images])
        self.num_features = features * len(self.names) + observations.vector

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        parts = [encoder(observations[name]) for name, encoder in zip(self.names, self.images, strict=True)]
        if "vector" in observations:
            parts.append(observations["vector"])
        return torch.cat(parts, dim=1)


def build_encoder(network: Network, observations: ObservationSpec) -> nn.Module:
    """The encoder that the config describes.

    Raises:
        HeelerError: the network does not fit the observations.
    """
    match network:
        case Custom(builder=builder):
            encoder = load_function(builder, "network", "my_networks:build")(observations)
            if not isinstance(encoder, nn.Module) or not isinstance(getattr(encoder, "num_features", None), int):
                raise HeelerError(
                    f"the network {builder!r} returned a {type(encoder).__name__}: it must return a torch module with"
                    " an attribute num_features (how many features it puts out)"
                )
            return encoder
        case MLP(hidden=hidden, activation=activation):
            if observations.images:
                names = [name for name, _ in observations.images]
                what = "pictures"  # a single one, which has no name of its own
                if observations.mixed:
                    what = f"the image{'s' * (len(names) > 1)} {', '.join(names)}"
                raise HeelerError(f"an MLP cannot read {what}: add network:nature-cnn, or a network of yours")
            return MLPEncoder(observations.vector, hidden, activation)
        case NatureCNN(features=features):
            if not observations.images:
                raise HeelerError(
                    f"the Nature CNN reads images, but the environment shows a vector of {observations.vector} numbers:"
                    " add network:mlp"
                )
            if observations.mixed:
                return MixedEncoder(observations, features)
            return ImageEncoder(observations.images[0][1], features)


class Body(nn.Module):
    """An encoder, and a memory behind it where there is one.

    Args:
        encoder: observations to features.
        memory: size of the LSTM; 0 for none.
        precision: that the encoder computes in, "bf16" by autocast; its weights and features, and the memory, are fp32.
    """

    def __init__(self, encoder: nn.Module, memory: int, precision: Literal["fp32", "bf16"] = "fp32") -> None:
        super().__init__()
        self.encoder = encoder
        self.precision: Literal["fp32", "bf16"] = precision
        num_features: int = encoder.num_features  # pyright: ignore[reportAssignmentType]
        self.memory = nn.LSTM(num_features, memory) if memory else None
        if self.memory is not None:
            for name, parameter in self.memory.named_parameters():
                nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter, 1.0)
        self.num_features = memory or num_features
        self.state_size = 2 * memory

    def forward(self, observations: Observed) -> Tensor:
        """Features `[n, F]` of single observations, without memory."""
        if self.precision == "fp32":
            return self.encoder(observations)
        first = next(iter(observations.values())) if isinstance(observations, dict) else observations
        with torch.autocast(first.device.type, torch.bfloat16):
            return self.encoder(observations).float()

    def run(self, observations: Observed, length: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[length * n, F]` along sequences, and the memory after them.

        Args:
            observations: `[length * n, ...]`, time first.
            length: steps of each sequence.
            states: `[n, D]` memory before the first step.
        """
        features = self(observations)
        if self.memory is None:
            return features, states
        hidden, cell = states.chunk(2, dim=1)
        if length == 1:
            return self._step(features, hidden, cell)
        n = len(states)
        out, (hidden, cell) = self.memory(features.view(length, n, -1), (hidden[None], cell[None].contiguous()))
        return out.reshape(length * n, -1), torch.cat([hidden[0], cell[0]], dim=1)

    def _step(self, features: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """One step of the LSTM written out: less overhead than the sequence kernel, and ONNX can take it."""
        memory: Any = self.memory
        gates = functional.linear(features, memory.weight_ih_l0, memory.bias_ih_l0)
        gates = gates + functional.linear(hidden, memory.weight_hh_l0, memory.bias_hh_l0)
        enter, forget, candidate, leave = gates.chunk(4, dim=1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        return hidden, torch.cat([hidden, cell], dim=1)
