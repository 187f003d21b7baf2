"""Noticing what an environment must not show or pay, by one sentence wherever a policy acts."""

from __future__ import annotations

from typing import Any

import numpy as np

from heeler.envs.spaces import Array
from heeler.types import ActionSpec, CheckFailed, HeelerError

LAST_OBSERVATION = "the last observation of an episode"


def check_observations(
    observations: Any, id: str, when: str = "", envs: Array | None = None, what: str = "the observation"
) -> None:
    """Refuse observations with a number that is not finite.

    Args:
        observations: `[n, ...]` as `ObservationReader.read` gives them; pictures are bytes and always fine.
        id: of the environment.
        when: in words, for instance "step 5 of update 1"; "" for a single observation outside of a vector environment.
        envs: `[n]` numbers of the environments; 0 to n - 1 where None.
        what: was shown.

    Raises:
        CheckFailed: one is not; it names environment, entry and step.
    """
    vectors = observations.get("vector") if isinstance(observations, dict) else observations
    if vectors is None or vectors.dtype == np.uint8 or np.isfinite(vectors).all():
        return
    row, entry = (int(i) for i in np.argwhere(~np.isfinite(vectors))[0])
    place = f" of environment {row if envs is None else int(envs[row])}, in {when}" if when else ""
    raise CheckFailed(
        f"{id} showed {float(vectors[row, entry])} in entry {entry} of {what}{place}: mend the environment, or wrap it"
        " so that observations stay finite"
    )


def check_rewards(rewards: Array, id: str, when: str) -> None:
    """Refuse rewards `[n]` of which one is not finite; CheckFailed names environment and step (`when`, in words)."""
    fine = np.isfinite(rewards)
    if fine.all():
        return
    env = int(np.flatnonzero(~fine)[0])
    raise CheckFailed(
        f"{id} gave the reward {float(rewards[env])} in environment {env}, in {when}: mend the environment's reward"
    )


def check_mask_size(actions: ActionSpec, size: int, id: str) -> None:
    """Refuse a mask of another size than the actions need."""
    if size != actions.mask_size:
        raise HeelerError(
            f"{id} gives an action mask of {size} entries, but its actions need"
            f" {actions.mask_size or 'none: only Discrete and MultiDiscrete actions can be masked'}"
        )
