"""Splitting a transformers causal LM into a frozen trunk and a trained top.

Only the top k layers are trained, so everything below them gives the same hidden states to the policy, the
critic and the reference: computed once, it serves all three (and the engine that sampled has computed them
already). The halves are shallow copies of the model's own base class with part of its layers, so whatever the
architecture does around its layers (rotary embeddings, masks) still happens. Where that does not reproduce the
whole model's output, `split` says so and the caller runs the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
ABSOLUTE_POSITIONS = ("wpe",)


class _ZeroPositions(nn.Module):
    def forward(self, position_ids: Tensor) -> Tensor:
        return torch.zeros((), device=position_ids.device)


def full_attention(config: Any) -> bool:
    """Whether every layer attends to everything before it: no sliding windows, no recurrent layers."""
    text_config = config.get_text_config(decoder=True)
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    windows = getattr(text_config, "sliding_window", None) or "local" in (
        getattr(text_config, "attention_layers", None) or ()  # GPT-Neo's name for its windows
    )
    return kinds == {"full_attention"} and not windows


def layer_list(base: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """The attribute that holds a base model's decoder layers, or None where there is no such list."""
    num_layers = getattr(base.config, "num_hidden_layers", None)
    for name, child in base.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return name, child
    return None


def top_parameters(base: nn.Module, num_layers: int) -> list[nn.Parameter]:
    """Parameters of the last `num_layers` layers and of the final norm."""
    found = layer_list(base)
    if found is None:
        raise ValueError(f"{type(base).__name__} has no list of decoder layers")
    modules: list[nn.Module] = [*found[1][len(found[1]) - num_layers :]]
    modules += [child for name, child in base.named_children() if name in FINAL_NORMS]
    return [parameter for module in modules for parameter in module.parameters()]


def _part(base: Any, name: str, layers: Iterable[nn.Module], keep: slice) -> Any:
    part = copy.copy(base)
    part._modules = dict(base._modules)
    part.config = copy.deepcopy(base.config)
    part.config.num_hidden_layers = len(list(layers))
    if getattr(part.config, "layer_types", None) is not None:
        part.config.layer_types = part.config.layer_types[keep]
    setattr(part, name, nn.ModuleList(layers))
    return part


def split(base: Any, num_top: int) -> tuple[Any, Any] | None:
    """`(trunk, top)` that share the modules of `base`, or None where this architecture cannot be split.

    The trunk maps token ids to hidden states; the top maps those (as `inputs_embeds`) to final hidden states.
    """
    found = layer_list(base)
    norms = [name for name, _ in base.named_children() if name in FINAL_NORMS]
    if found is None or len(norms) != 1:
        return None
    name, layers = found
    cut = len(layers) - num_top
    trunk = _part(base, name, layers[:cut], slice(0, cut))
    setattr(trunk, norms[0], nn.Identity())
    top = _part(base, name, layers[cut:], slice(cut, None))
    for positions in ABSOLUTE_POSITIONS:
        if positions in top._modules:
            setattr(top, positions, _ZeroPositions())
    return (trunk, top) if _reproduces(base, trunk, top) else None


@torch.no_grad()
def _reproduces(base: Any, trunk: Any, top: Any) -> bool:
    device = next(base.parameters()).device
    ids = torch.arange(1, 13, device=device).reshape(2, 6) % base.config.vocab_size
    try:
        whole = base(input_ids=ids, use_cache=False).last_hidden_state.float()
        states = trunk(input_ids=ids, use_cache=False).last_hidden_state
        halves = top(inputs_embeds=states, use_cache=False).last_hidden_state.float()
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError):
        return False
    return bool(torch.allclose(whole, halves, atol=1e-4 * float(whole.abs().max()), rtol=1e-3))


def shared_copy(module: Any, changing: Iterable[Tensor]) -> Any:
    """A deep copy that has its own storage for `changing` only; all other parameters and buffers are shared."""
    own = {id(parameter) for parameter in changing}
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        if id(tensor) not in own:
            memo[id(tensor)] = tensor
    return copy.deepcopy(module, memo)
