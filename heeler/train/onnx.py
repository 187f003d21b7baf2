"""Exporting the policy of an environment to ONNX, with the observation statistics inside, and checking the file."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heeler.policies.actor_critic import ActorCritic
from heeler.policies.distributions import FORBIDDEN
from heeler.runtime.packages import require
from heeler.train.evaluate_control import check_writable
from heeler.types import HeelerError


class _Deployed(nn.Module):
    """Raw observations (and masks, and memory) to the most likely action, its parameters and the value."""

    def __init__(self, policy: ActorCritic, masked: bool) -> None:
        super().__init__()
        self.policy, self.masked = policy, masked

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        policy, given = self.policy, list(inputs)
        states = given.pop() if policy.recurrent else None
        masks = given.pop() if self.masked else None
        observations: Any = dict(zip(_parts(policy), given, strict=True)) if policy.observations.mixed else given[0]
        parameters, values, states = policy.parameters_and_values(policy.normalize(observations), 1, states)
        spec = policy.actions
        if spec.kind == "box":
            means = parameters[:, : spec.num_parameters]
            action = means.clamp(torch.tensor(spec.low), torch.tensor(spec.high))
        elif spec.kind == "multi_binary":
            action = (parameters > 0).long()
        else:
            if masks is not None:
                parameters = parameters.masked_fill(~masks, FORBIDDEN)
            parts = [part.argmax(1) for part in parameters.split(list(spec.sizes), dim=1)]
            action = parts[0] if spec.kind == "discrete" else torch.stack(parts, dim=1)
            if any(spec.start):
                action = action + (spec.start[0] if spec.kind == "discrete" else torch.tensor(spec.start))
        return (action, parameters, values) if states is None else (action, parameters, values, states)


def _parts(policy: ActorCritic) -> list[str]:
    """Names of what the policy looks at, in the order of the file's inputs."""
    spec = policy.observations
    if not spec.mixed:
        return ["observation"]
    return (["vector"] if spec.vector else []) + [name for name, _ in spec.images]


def output_names(policy: ActorCritic) -> list[str]:
    return ["action", "parameters", "value", *(["next_state"] if policy.recurrent else [])]


def input_names(policy: ActorCritic, masked: bool = False) -> list[str]:
    """Names of the file's inputs: a picture whose name the file needs itself is `observation_NAME`."""
    parts, others = _parts(policy), [*(["mask"] if masked else []), *(["state"] if policy.recurrent else [])]
    taken = {*others, *output_names(policy)}
    names: list[str] = []
    for part in parts:
        name = part
        while name in taken or (name != part and name in parts):
            name = f"observation_{name}"
        names.append(name)
    return [*names, *others]


def example_inputs(policy: ActorCritic, masked: bool, rows: int, seed: int) -> list[Tensor]:
    """Random inputs in the order of `input_names`."""
    g = torch.Generator().manual_seed(seed)
    spec = policy.observations
    inputs: list[Tensor] = []
    if spec.vector:
        inputs.append(torch.randn(rows, spec.vector, generator=g))
    inputs += [torch.randint(0, 256, (rows, *shape), generator=g, dtype=torch.uint8) for _, shape in spec.images]
    if masked:
        mask = torch.rand(rows, policy.actions.mask_size, generator=g) > 0.3
        start = 0
        for size in policy.actions.sizes:  # something is always allowed
            mask[:, start] = True
            start += size
        inputs.append(mask)
    if policy.recurrent:
        inputs.append(torch.randn(rows, policy.state_size, generator=g))
    return inputs


def export_onnx(policy: ActorCritic, path: str | Path, *, masked: bool = False) -> dict[str, float]:
    """Write the policy, in fp32, as an ONNX file and compare it with torch on random inputs.

    Args:
        policy: on the CPU.
        path: of the file.
        masked: add an input `mask` for allowed actions.

    Returns:
        The largest difference of the distribution parameters and of the values, and the share of equal actions.

    Raises:
        HeelerError: the file cannot be written, or does not compute what the policy does.
    """
    if masked and not policy.actions.mask_size:
        raise HeelerError("only Discrete and MultiDiscrete actions can be masked: leave --masked out")
    if not Path(path).absolute().parent.is_dir():
        raise HeelerError(f"there is no folder {Path(path).absolute().parent} for the ONNX file")
    check_writable(path)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "onnx")
    import onnxruntime

    policy = copy.deepcopy(policy)
    policy.precision = "fp32"
    module = _Deployed(policy, masked).eval()
    names, outputs = input_names(policy, masked), output_names(policy)
    example = tuple(example_inputs(policy, masked, 2, 0))
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            str(path),
            input_names=names,
            output_names=outputs,
            dynamic_shapes=(tuple({0: batch} for _ in example),),  # forward takes *inputs
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = example_inputs(policy, masked, 64, 1)
    with torch.inference_mode():
        expected = [x.numpy() for x in module(*inputs)]
    said: Any = session.run(outputs, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    figures = {
        "parameters": float(np.abs(said[1] - expected[1]).max()),
        "values": float(np.abs(said[2] - expected[2]).max()),
        "equal_actions": float(np.mean(np.isclose(said[0], expected[0], atol=1e-4))),
    }
    scale = 1.0 + float(np.abs(expected[1]).max())
    if figures["parameters"] > 1e-3 * scale or figures["equal_actions"] < 0.98:
        raise HeelerError(f"{path} does not compute what the policy does ({figures}): please report it with the config")
    return figures
