"""One PPO micro-batch of two small MLPs without autograd: forward pass, loss, backward pass and Adam on flat vectors.

At 64 units a layer, what costs is not arithmetic but the number of operations: autograd needs some 150 for one
minibatch. Here they are few, and written out. The matrix products are torch's, the element-wise parts numpy's, which
needs a third of torch's time at these sizes.

| gradient | of | formula |
|---|---|---|
| log-probability | -w rho min(r A, clip(r) A) / D | -w rho A r / D, 0 where the clip is active |
| value | c_v w (V - R)^2 / 2D | c_v w (V - R) / D |
| entropy | -c_e w H / D | -c_e w / D |
| logits z | log pi(a), H | onehot(a) - p,  -p (log p + H) |
| mean m, log-std s | log pi(a), H | (a - m) / e^2s  and  ((a - m) / e^s)^2 - 1,  0 and 1 |
| layer | H_l = f(H_{l-1} W^T + b) | dZ = dH f'(Z),  dW = dZ^T H_{l-1},  db = sum dZ,  dH_{l-1} = dZ W |

The loss itself is that of `ppo/update.py` (`autograd_gradients`), which is the slow twin of `ppo_gradients`: every
policy that does not fit here takes it. `tests/policies/test_fused.py` holds one to the other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heeler.policies.distributions import FORBIDDEN
from heeler.policies.networks import MLPEncoder
from heeler.policies.steps import Steps
from heeler.ppo.update import PPOConfig
from heeler.types import ActionSpec

Array = np.ndarray[Any, Any]


class _Net:
    """The layers of one MLP with their gradients, both views of flat vectors."""

    def __init__(self, linears: list[nn.Linear], relu: bool, gradients: list[Tensor]) -> None:
        self.relu = relu
        self.layers = [(layer.weight.detach(), layer.weight.detach().t(), layer.bias.detach()) for layer in linears]
        self.gradients = list(zip(gradients[0::2], gradients[1::2], strict=True))
        self.rows = -1

    def _reserve(self, rows: int) -> None:
        """Scratch space for this many rows."""
        self.rows = rows
        widths = [weight.shape[0] for weight, _, _ in self.layers]
        self.outputs = [torch.empty(rows, w) for w in widths]
        self.flows = [torch.empty(rows, w) for w in widths]
        self.output_arrays = [x.numpy() for x in self.outputs]
        self.flow_arrays = [x.numpy() for x in self.flows]
        self.slopes = [np.empty((rows, w), dtype=np.float32) for w in widths]
        self.ones = torch.ones(rows)

    def forward(self, x: Tensor) -> Array:
        """The output `[n, out]`, valid until the next call."""
        if len(x) != self.rows:
            self._reserve(len(x))
        self.input = x
        last = len(self.layers) - 1
        for i, (_, transposed, bias) in enumerate(self.layers):
            x = torch.addmm(bias, x, transposed, out=self.outputs[i])
            if i < last:
                array = self.output_arrays[i]
                np.maximum(array, 0.0, out=array) if self.relu else np.tanh(array, out=array)
        return self.output_arrays[last]

    def backward(self) -> None:
        """Gradients of every layer, for the gradient of the output that lies in `flow_arrays[-1]`."""
        for i in range(len(self.layers) - 1, -1, -1):
            weight_gradient, bias_gradient = self.gradients[i]
            flow = self.flows[i].t()
            torch.mm(flow, self.outputs[i - 1] if i else self.input, out=weight_gradient)
            torch.mv(flow, self.ones, out=bias_gradient)
            if i == 0:
                return
            torch.mm(self.flows[i], self.layers[i][0], out=self.flows[i - 1])
            hidden, slope, below = self.output_arrays[i - 1], self.slopes[i - 1], self.flow_arrays[i - 1]
            if self.relu:
                np.greater(hidden, 0.0, out=slope)
            else:
                np.multiply(hidden, hidden, out=slope)
                np.subtract(1.0, slope, out=slope)
            np.multiply(below, slope, out=below)


class FusedMLP:
    """Actor and critic MLPs whose parameters lie in one flat vector.

    The modules' own parameters become views of it, so that saving, publishing and the plain path see what the
    optimiser does.

    Args:
        actions: discrete or box.
        actor, critic: their linear layers, heads included.
        relu: the activation; tanh where False.
        log_std: of box actions.

    Attributes:
        flat: the vector, the only parameter that the optimiser needs.
    """

    def __init__(
        self,
        actions: ActionSpec,
        actor: list[nn.Linear],
        critic: list[nn.Linear],
        relu: bool,
        log_std: nn.Parameter | None,
    ) -> None:
        self.actions = actions
        parameters = [p for layer in (*actor, *critic) for p in (layer.weight, layer.bias)]
        if log_std is not None:
            parameters.append(log_std)
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        self.gradient = torch.zeros_like(self.flat.data)
        views: list[Tensor] = []
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.flat.data[start:end].view(parameter.shape)
            parameter.requires_grad_(False)
            views.append(self.gradient[start:end].view(parameter.shape))
            start = end
        edge = 2 * len(actor)
        self.actor = _Net(actor, relu, views[:edge])
        self.critic = _Net(critic, relu, views[edge : edge + 2 * len(critic)])
        self.log_std = None if log_std is None else log_std.detach().numpy()
        self.log_std_gradient = None if log_std is None else views[-1].numpy()

    def ppo_gradients(
        self, inputs: Any, rows: Tensor, policy_denominator: float, value_denominator: float, config: PPOConfig
    ) -> tuple[float, Tensor]:
        """What `heeler.ppo.update.autograd_gradients` does, with the same arguments and results."""
        assert isinstance(inputs, Steps) and isinstance(inputs.observations, Tensor)
        old_logprobs, old_values, advantages, returns, weights, value_weights, importance = rows.numpy().T
        output = self.actor.forward(inputs.observations)
        values = self.critic.forward(inputs.observations)[:, 0]
        masks = None if inputs.masks is None else inputs.masks.numpy()
        if self.actions.kind == "box":
            logprobs, entropy, pull = self._gaussian(output, inputs.actions.numpy())
        else:
            logprobs, entropy, pull = self._categorical(output, inputs.actions.numpy(), masks)

        log_ratio = logprobs - old_logprobs
        ratio = np.exp(np.clip(log_ratio, -20.0, 20.0))
        low, high = config.clip_ranges
        gained, bounded = ratio * advantages, np.clip(ratio, 1.0 - low, 1.0 + high) * advantages
        policy_weights = weights * importance
        policy_terms = -policy_weights * np.minimum(gained, bounded)
        active = (gained <= bounded) & (np.abs(log_ratio) <= 20.0)
        logprob_gradient = gained * active * policy_weights * (-1.0 / policy_denominator)

        errors = values - returns
        squares = errors * errors
        if config.value_clip is not None:
            moved = values - old_values
            clipped_errors = old_values + np.clip(moved, -config.value_clip, config.value_clip) - returns
            clipped_squares = clipped_errors * clipped_errors
            beyond = clipped_squares > squares
            errors = np.where(beyond, clipped_errors * (np.abs(moved) <= config.value_clip), errors)
            squares = np.where(beyond, clipped_squares, squares)
        value_terms = 0.5 * value_weights * squares
        loss = float(policy_terms.sum()) / policy_denominator
        loss += config.value_coef * float(value_terms.sum()) / value_denominator
        entropy_gradient = None
        if config.entropy_coef:
            loss -= config.entropy_coef * float((weights * entropy).sum()) / policy_denominator
            entropy_gradient = weights * (-config.entropy_coef / policy_denominator)
        said = torch.from_numpy(np.stack([logprobs, entropy, policy_terms, value_terms]))
        if math.isfinite(loss):
            before = None if self.flat.grad is None else self.flat.grad.clone()  # it is the vector written to below
            pull(logprob_gradient, entropy_gradient)
            np.multiply(
                errors, value_weights * (config.value_coef / value_denominator), out=self.critic.flow_arrays[-1][:, 0]
            )
            self.actor.backward()
            self.critic.backward()
            self.flat.grad = self.gradient if before is None else before + self.gradient
        return loss, said

    def _gaussian(self, means: Array, actions: Array) -> tuple[Array, Array, Any]:
        """Log-probabilities, entropies, and what turns their gradients into those of means and log-stds."""
        assert self.log_std is not None
        inverse = np.exp(-self.log_std)
        normalized = (actions - means) * inverse
        squares = normalized * normalized
        size, total = len(self.log_std), float(self.log_std.sum())
        logprobs = -0.5 * squares.sum(1) - (total + 0.5 * math.log(2 * math.pi) * size)
        entropy = np.full(len(means), total + 0.5 * (1 + math.log(2 * math.pi)) * size, dtype=np.float32)

        def pull(logprob_gradient: Array, entropy_gradient: Array | None) -> None:
            np.multiply(normalized * inverse, logprob_gradient[:, None], out=self.actor.flow_arrays[-1])
            assert self.log_std_gradient is not None
            self.log_std_gradient[:] = logprob_gradient @ squares - logprob_gradient.sum()
            if entropy_gradient is not None:
                self.log_std_gradient += entropy_gradient.sum()

        return logprobs, entropy, pull

    def _categorical(self, logits: Array, actions: Array, masks: Array | None) -> tuple[Array, Array, Any]:
        """Log-probabilities, entropies, and what turns their gradients into those of the logits."""
        if masks is not None:
            logits = np.where(masks, logits, np.float32(FORBIDDEN))
        shifted = logits - logits.max(1, keepdims=True)
        all_logprobs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        probabilities = np.exp(all_logprobs)
        everyone = np.arange(len(actions))
        entropy = -(probabilities * all_logprobs).sum(1)

        def pull(logprob_gradient: Array, entropy_gradient: Array | None) -> None:
            flow = self.actor.flow_arrays[-1]
            np.multiply(probabilities, -logprob_gradient[:, None], out=flow)
            flow[everyone, actions] += logprob_gradient
            if entropy_gradient is not None:
                flow -= probabilities * (all_logprobs + entropy[:, None]) * entropy_gradient[:, None]

        return all_logprobs[everyone, actions], entropy, pull


class FlatAdam:
    """Adam for one flat vector on the CPU: torch.optim.Adam's numbers, groups and saved state.

    It is no `torch.optim.Optimizer`: that one's bookkeeping costs several times the arithmetic at these sizes, and its
    first instance imports torch's compiler, which takes seconds.

    Args:
        groups: one group of one vector.
        lr: learning rate.
        eps: added to the root of the second moment.
        betas: decays of the moments.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, eps: float, betas: tuple[float, float] = (0.9, 0.999)
    ) -> None:
        (group,) = groups
        (self.parameter,) = group["params"]
        self.param_groups: list[dict[str, Any]] = [{"lr": lr, "eps": eps, "betas": betas, **group}]
        self.steps = 0
        self.first = torch.zeros_like(self.parameter.data)
        self.second = torch.zeros_like(self.parameter.data)
        self.scratch = np.empty(len(self.first), dtype=np.float32)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.parameter.grad = None

    def step(self) -> None:
        """m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  p -= lr mhat / (sqrt(vhat) + eps) [arXiv 1412.6980]."""
        if self.parameter.grad is None:
            return
        group, scratch = self.param_groups[0], self.scratch
        beta1, beta2 = group["betas"]
        self.steps += 1
        gradient, first, second = self.parameter.grad.numpy(), self.first.numpy(), self.second.numpy()
        first *= beta1
        first += np.multiply(gradient, 1 - beta1, out=scratch)
        second *= beta2
        np.multiply(gradient, gradient, out=scratch)
        scratch *= 1 - beta2
        second += scratch
        np.sqrt(second, out=scratch)
        scratch *= 1 / math.sqrt(1 - beta2**self.steps)
        scratch += group["eps"]
        np.divide(first, scratch, out=scratch)
        scratch *= group["lr"] / (1 - beta1**self.steps)
        values = self.parameter.data.numpy()
        values -= scratch

    def state_dict(self) -> dict[str, Any]:
        """In torch.optim.Adam's layout."""
        state = {"step": torch.tensor(float(self.steps)), "exp_avg": self.first, "exp_avg_sq": self.second}
        group = {k: v for k, v in self.param_groups[0].items() if k != "params"}
        return {"state": {0: state} if self.steps else {}, "param_groups": [{**group, "params": [0]}]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` of this class or of torch.optim.Adam returned."""
        if state_dict["state"]:
            state = state_dict["state"][0]
            self.steps = int(state["step"])
            self.first.copy_(state["exp_avg"])
            self.second.copy_(state["exp_avg_sq"])
        kept = {k: v for k, v in state_dict["param_groups"][0].items() if k in self.param_groups[0] and k != "params"}
        self.param_groups[0].update(kept)


def fuse(
    actions: ActionSpec,
    actor: nn.Module,
    action_head: nn.Linear,
    critic: nn.Module,
    value_head: nn.Linear,
    log_std: nn.Parameter | None,
) -> FusedMLP | None:
    """The fused form of two separate MLP encoders with their heads, or None where they are something else."""
    if type(actor) is not MLPEncoder or type(critic) is not MLPEncoder or actor is critic:
        return None
    if actions.kind not in ("discrete", "box"):
        return None
    layers = [*actor.layers, *critic.layers]
    activations = {type(layer) for layer in layers} - {nn.Linear}
    if activations not in ({nn.Tanh}, {nn.ReLU}) or value_head.weight.device.type != "cpu":
        return None
    sides = [[layer for layer in encoder.layers if isinstance(layer, nn.Linear)] for encoder in (actor, critic)]
    relu = activations == {nn.ReLU}
    return FusedMLP(actions, [*sides[0], action_head], [*sides[1], value_head], relu, log_std)
