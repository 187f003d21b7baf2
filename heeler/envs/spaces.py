"""What an environment shows and what it takes, as the policy sees it.

Every observation becomes one float vector `[n, D]`, one image batch `[n, C, H, W]` (uint8), or, where an environment
shows several images or both, a dict of these. Discrete parts become one-hot; dicts and tuples are joined in order.
An `action_mask` entry of a dict observation is taken out: it is a constraint, not something to look at.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from heeler.types import ActionSpec, HeelerError, ObservationSpec

Array = np.ndarray[Any, Any]
Observations = Array | dict[str, Array]
MASK_KEY = "action_mask"


def to_environment(spec: ActionSpec, actions: Array) -> Array:
    """Stored actions `[n]` or `[n, A]` as the environment takes them: boxes clipped to their bounds."""
    if spec.kind == "box":
        clipped = np.clip(actions, spec.low, spec.high)
        return clipped.astype(spec.dtype, copy=False).reshape(len(actions), *spec.shape)
    if any(spec.start):
        actions = actions + np.asarray(spec.start)
    return actions.astype(spec.dtype, copy=False).reshape(len(actions), *spec.shape)


def action_spec(space: Any, where: str) -> ActionSpec:
    """The spec of a single environment's action space."""
    from gymnasium import spaces

    match space:
        case spaces.Discrete():
            dtype, start = str(space.dtype), (int(space.start),)
            return ActionSpec(kind="discrete", sizes=(int(space.n),), shape=(), start=start, dtype=dtype)
        case spaces.MultiDiscrete():
            sizes, start = tuple(int(n) for n in space.nvec.ravel()), tuple(int(n) for n in space.start.ravel())
            return ActionSpec(
                kind="multi_discrete", sizes=sizes, shape=tuple(space.shape), start=start, dtype=str(space.dtype)
            )
        case spaces.MultiBinary():
            shape = tuple(space.shape)
            return ActionSpec(
                kind="multi_binary", sizes=(1,) * int(np.prod(shape)), shape=shape, dtype=str(space.dtype)
            )
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            shape = tuple(space.shape)
            return ActionSpec(
                kind="box",
                sizes=(1,) * int(np.prod(shape)),
                shape=shape,
                low=tuple(float(v) for v in space.low.ravel()),
                high=tuple(float(v) for v in space.high.ravel()),
                dtype=str(space.dtype),
            )
        case _:
            raise HeelerError(
                f"{where} has the action space {space}, which PPO here cannot choose from: Discrete, MultiDiscrete,"
                " MultiBinary and Box of floats are supported; wrap the environment to one of them"
            )


def _is_image(space: Any) -> bool:
    return len(space.shape) in (2, 3) and space.dtype == np.uint8 and min(space.shape[-2:]) >= 1 and _side(space) >= 36


def _side(space: Any) -> int:
    """The shorter side of a would-be picture: the Nature CNN needs 36 pixels."""
    shape = space.shape
    if len(shape) == 2:
        return min(shape)
    return min(shape[1:]) if shape[0] < shape[2] else min(shape[:2])


class ObservationReader:
    """Turns batched observations of a space into what the policy looks at."""

    def __init__(self, space: Any, where: str) -> None:
        from gymnasium import spaces

        self.where = where
        self.plain: str | None = None  # "vector" or "image" where the whole observation is one Box
        self.has_mask = isinstance(space, spaces.Dict) and MASK_KEY in space.spaces
        self.parts: list[tuple[tuple[str | int, ...], Any, bool]] = []
        self._walk(space, ())
        images = tuple((_image_name(path), _chw(part.shape)) for path, part, image in self.parts if image)
        vector = sum(_width(part) for _, part, image in self.parts if not image)
        if not images and not vector:
            raise HeelerError(f"{where} shows nothing: its observation space is {space}")
        self.spec = ObservationSpec(vector=vector, images=images)
        if len(self.parts) == 1 and self.parts[0][0] == () and isinstance(space, spaces.Box):
            self.plain = "image" if images else "vector"

    def _walk(self, space: Any, path: tuple[str | int, ...]) -> None:
        from gymnasium import spaces

        match space:
            case spaces.Dict():
                for key, part in space.spaces.items():
                    if key != MASK_KEY or path:
                        self._walk(part, (*path, key))
            case spaces.Tuple():
                for i, part in enumerate(space.spaces):
                    self._walk(part, (*path, i))
            case spaces.Box() if len(space.shape) == 4 and space.dtype == np.uint8:
                raise HeelerError(
                    f"{self.where} shows pictures of four dimensions, {space.shape}: fold the stack into the channels"
                    " with a wrapper, [C, H, W] or [H, W, C]"
                )
            case spaces.Box() | spaces.Discrete() | spaces.MultiDiscrete() | spaces.MultiBinary():
                self.parts.append((path, space, isinstance(space, spaces.Box) and _is_image(space)))
            case _:
                raise HeelerError(
                    f"{self.where} has the observation space {space}{f' at {_name(path)}' if path else ''}, which no"
                    " network here reads: Box, Discrete, MultiDiscrete, MultiBinary and dicts or tuples of them are"
                    " supported; wrap the environment to one of them"
                )

    def read(self, observations: Any) -> Observations:
        """The batch as the policy looks at it; masks are read by `masks`."""
        if self.plain == "vector":
            n = len(observations)
            return np.asarray(observations, dtype=np.float32).reshape(n, -1)
        if self.plain == "image":
            return _to_chw(observations)
        vectors: list[Array] = []
        images: dict[str, Array] = {}
        for path, part, image in self.parts:
            value: Any = observations
            for key in path:
                value = value[key]
            value = np.asarray(value)
            if image:
                images[_image_name(path)] = _to_chw(value)
            else:
                vectors.append(_to_vector(value, part, f"{self.where}{f' at {_name(path)}' if path else ''}"))
        vector = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1) if vectors else None
        if not images:
            assert vector is not None
            return vector
        if vector is None and len(images) == 1:
            return next(iter(images.values()))
        return images if vector is None else {"vector": vector, **images}

    def masks(self, observations: Any) -> Array | None:
        """The masks of a dict observation, `[n, M]` bool."""
        if not self.has_mask:
            return None
        masks = observations[MASK_KEY]
        if isinstance(masks, (tuple, list)):
            masks = np.concatenate([np.asarray(m) for m in masks], axis=1)
        return np.asarray(masks).reshape(len(masks), -1).astype(bool)


def _name(path: tuple[str | int, ...]) -> str:
    return "/".join(str(key) for key in path) or "image"


def _image_name(path: tuple[str | int, ...]) -> str:
    """The name of a picture among the parts; "vector" is that of all vectors."""
    return "vector_image" if path == ("vector",) else _name(path)


def _chw(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 2:
        return 1, int(shape[0]), int(shape[1])
    first = shape[0] < shape[2]
    return (int(shape[0]), int(shape[1]), int(shape[2])) if first else (int(shape[2]), int(shape[0]), int(shape[1]))


def _to_chw(images: Array) -> Array:
    """`[n, H, W]` or `[n, H, W, C]` as `[n, C, H, W]`; channels first stay as they are."""
    if images.ndim == 3:
        return images[:, None]
    return images if images.shape[1] < images.shape[3] else np.moveaxis(images, 3, 1)


def _width(space: Any) -> int:
    from gymnasium import spaces

    match space:
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case _:
            return int(np.prod(space.shape))


def _check_range(flat: Array, sizes: Array, space: Any, where: str) -> None:
    outside = (flat < 0) | (flat >= sizes)
    if outside.any():
        env = int(np.argwhere(outside)[0][0])
        raise HeelerError(
            f"{where} showed something outside its space {space} in environment {env}: look at what reset and step"
            " return"
        )


def _to_vector(values: Array, space: Any, where: str) -> Array:
    from gymnasium import spaces

    n = len(values)
    match space:
        case spaces.Discrete():
            flat = values.reshape(n).astype(np.int64) - int(space.start)
            _check_range(flat, np.array(int(space.n)), space, where)
            return np.eye(int(space.n), dtype=np.float32)[flat]
        case spaces.MultiDiscrete():
            flat = values.reshape(n, -1).astype(np.int64) - space.start.ravel()
            _check_range(flat, space.nvec.ravel(), space, where)
            return np.concatenate(
                [np.eye(int(size), dtype=np.float32)[flat[:, i]] for i, size in enumerate(space.nvec.ravel())], axis=1
            )
        case _:
            return values.reshape(n, -1).astype(np.float32)
