"""Saving where every environment stands, so that a resumed run continues the very episodes it was in.

An environment's state is the plain attributes (numbers, arrays, text) of each of its layers, its random generator,
and for MuJoCo the simulator's own state. It is known to be complete for Gymnasium's classic control, toy text and
MuJoCo environments. Any other environment takes part by two methods, `get_state() -> dict of plain values` and
`set_state(state)`; without them a resumed run starts new episodes, and says so.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from heeler.runtime.packages import where_raised
from heeler.types import HeelerError

KNOWN = ("gymnasium.envs.classic_control.", "gymnasium.envs.toy_text.", "gymnasium.envs.mujoco.")
# wrappers whose whole state is plain numbers
WRAPPERS = (
    "TimeLimit", "OrderEnforcing", "PassiveEnvChecker", "TransformObservation", "TransformReward", "TransformAction",
    "RescaleObservation", "RescaleAction", "ClipAction", "ClipReward", "FlattenObservation", "FilterObservation",
    "ReshapeObservation", "GrayscaleObservation", "ResizeObservation", "DtypeObservation", "StickyAction",
    "RecordEpisodeStatistics",
)  # fmt: skip


def save_states(vector: Any) -> list[dict[str, Any]] | None:
    """The state of each environment of a SyncVectorEnv, or None where one cannot tell it."""
    states: list[dict[str, Any]] = []
    for env in vector.envs:
        state = _save(env)
        if state is None:
            return None
        states.append(state)
    return states


def load_states(vector: Any, states: list[dict[str, Any]], over: np.ndarray[Any, Any]) -> None:
    """Put each environment where `save_states` found it; `over [n]` says which wait for their reset."""
    for env, state in zip(vector.envs, states, strict=True):
        for layer, saved in zip(_layers(env), state["layers"], strict=True):
            _load(layer, saved)
    vector._autoreset_envs = over.copy()


def _layers(env: Any) -> list[Any]:
    """The wrappers, outermost first, and the environment itself."""
    layers = [env]
    while hasattr(layers[-1], "env") and layers[-1] is not layers[-1].unwrapped:
        layers.append(layers[-1].env)
    return layers


def _save(env: Any) -> dict[str, Any] | None:
    saved: list[dict[str, Any]] = []
    for layer in _layers(env):
        if hasattr(type(layer), "get_state") and hasattr(type(layer), "set_state") and layer is layer.unwrapped:
            saved.append({"own": _asked(layer, "get_state")})
            continue
        module, name = type(layer).__module__, type(layer).__name__
        own_state_known = module.startswith(KNOWN)
        if not (own_state_known if layer is layer.unwrapped else module.startswith("gymnasium.") and name in WRAPPERS):
            return None
        plain: dict[str, Any] = {}
        for name, value in vars(layer).items():
            if name in ("env", "_np_random", "model", "data") or not _is_plain(value):
                continue
            plain[name] = np.array(value) if isinstance(value, np.ndarray) else value
        entry: dict[str, Any] = {"plain": plain}
        generator = vars(layer).get("_np_random")
        if generator is not None:
            entry["random"] = generator.bit_generator.state
        if hasattr(layer, "data") and hasattr(layer, "model"):
            entry["mujoco"] = _mujoco_state(layer)
        saved.append(entry)
    return {"layers": saved}


def _asked(layer: Any, name: str, *arguments: Any) -> Any:
    """What a method of the user's returns."""
    try:
        return getattr(layer, name)(*arguments)
    except Exception as error:
        raise HeelerError(
            f"{name} of {type(layer).__name__} failed: {where_raised(error)}; without get_state and set_state a resumed"
            " run starts new episodes"
        ) from error


def _load(layer: Any, saved: dict[str, Any]) -> None:
    if "own" in saved:
        _asked(layer, "set_state", saved["own"])
        return
    for name, value in saved["plain"].items():
        setattr(layer, name, np.array(value) if isinstance(value, np.ndarray) else value)
    if "random" in saved:
        layer.np_random.bit_generator.state = saved["random"]
    if "mujoco" in saved:
        mujoco: Any = import_module("mujoco")
        mujoco.mj_setState(layer.model, layer.data, saved["mujoco"], mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(layer.model, layer.data)


def _mujoco_state(layer: Any) -> np.ndarray[Any, Any]:
    mujoco: Any = import_module("mujoco")  # its names come from C++
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(layer.model, kind))
    mujoco.mj_getState(layer.model, layer.data, state, kind)
    return state


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str, np.bool_, np.integer, np.floating)):
        return True
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return False
