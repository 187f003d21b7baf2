"""A GPU for machines that have none: tensors that say `pretend:0`, hold CPU memory, and refuse what CUDA refuses.

It computes with real numbers, so results can be compared with the CPU's. What it finds is tensors on the wrong device
and reads that make the host wait for the device; what it cannot find is a kernel that is missing or wrong on a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    raise ImportError("this torch is too old for backends in Python")


class _Backend(backend_registration._DummyBackendModule):  # pyright: ignore[reportPrivateUsage]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
GPU = torch.device("pretend", 0)
aten = torch.ops.aten
CROSSING = {aten._to_copy.default, aten.copy_.default}
COPIES = {*CROSSING, aten._local_scalar_dense.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "nonzero",
}
waits: Counter[str] = Counter()  # operations that made the host wait, by name


class OnGPU(torch.Tensor):
    """A tensor that says `pretend:0`; `memory` is where its numbers are."""

    memory: torch.Tensor

    @staticmethod
    def __new__(cls, memory: torch.Tensor) -> OnGPU:
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls, memory.size(), strides=memory.stride(), storage_offset=memory.storage_offset(),
                dtype=memory.dtype, layout=memory.layout, device=GPU,
            )  # fmt: skip
        made.memory = memory
        return made

    def __init__(self, memory: torch.Tensor) -> None: ...

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OnGPU({self.memory!r})"

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    def untyped_storage(self) -> Any:
        return self.memory.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.memory.__reduce_ex__(protocol)  # a checkpoint holds numbers, wherever they were

    def tolist(self) -> Any:
        waits["copy to the host"] += 1
        return self.memory.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _without_lists(index: Any) -> Any:
    """Torch makes tensors of lists where no dispatch mode sees it."""
    if isinstance(index, tuple):
        return tuple(_without_lists(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    on_gpu = any(isinstance(t, OnGPU) for t in tensors)
    target = kwargs.get("device")
    target = torch.device(target) if target is not None else None
    if func is aten._fused_sdp_choice.default and on_gpu:
        return 0  # the kernel of plain operations
    if func in (aten.pin_memory.default, aten._pin_memory.default):
        return args[0]
    if on_gpu:
        _check(func, args, tensors)
    to_gpu = target.type == GPU.type if target is not None else on_gpu
    if func is aten.copy_.default:
        to_gpu = isinstance(args[0], OnGPU)
    if func in CROSSING and to_gpu != isinstance(args[func is aten.copy_.default], OnGPU):
        blocking = not (kwargs.get("non_blocking") or (func is aten.copy_.default and args[2:] == (True,)))
        if blocking or not to_gpu:
            waits["copy to the device" if to_gpu else "copy to the host"] += 1
    elif on_gpu and (wait := _wait(func, args, kwargs)):
        waits[wait] += 1
    if target is not None and target.type == GPU.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    plain_args, plain_kwargs = tree_map(_memory, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    if not to_gpu:
        return out
    written = {id(_memory(t)): t for t in tensors if isinstance(t, OnGPU)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return written.get(id(value)) if id(value) in written else OnGPU(value)  # in-place: the tensor itself

    return tree_map(wrap, out)


def _wait(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why this operation on the device would make the host wait."""
    if func in INDEXING:
        masks = (t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool)
        return "index by a mask" if any(True for _ in masks) else None
    if func is aten.repeat_interleave.Tensor:
        return "repeat_interleave" if kwargs.get("output_size") is None else None
    return WAITS.get(func)


def _memory(value: Any) -> Any:
    return value.memory if isinstance(value, OnGPU) else value


def _check(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """What CUDA refuses: a tensor of the CPU beside one of the GPU, unless it is a copy, an index or one number."""
    if func in COPIES:
        return
    strange = [t for t in tensors if not isinstance(t, OnGPU) and t.dim() > 0]
    if func in INDEXING:
        strange = [t for t in strange if all(t is not i for i in tree_leaves(args[1]))]
    if strange:
        shapes = [tuple(t.shape) for t in strange]
        raise RuntimeError(f"{func}: expected all tensors on pretend:0, but those of shapes {shapes} are on the cpu")


class _Everywhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """Torch fills new tensors from Python numbers where no dispatch mode sees it: here on the CPU, then they move."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func is torch.Tensor.new_tensor:
            device = kwargs.pop("device", args[0].device)
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(device)
        return func(*args, **kwargs)


@contextmanager
def pretend_gpu() -> Iterator[Counter[str]]:
    """Inside, `device="pretend"` works; yields the counts of waits."""
    waits.clear()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied when a model moves
    try:
        with _Everywhere(), _Constructors():
            yield waits
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
