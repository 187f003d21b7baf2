"""Several rewards as one: their weighted sum, with each of them in the log by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from heeler.rewards.functions import LOG_KEYS, FunctionReward, check_names
from heeler.types import HeelerError, Reward, RewardOutput, Samples

RESERVED = (*LOG_KEYS, "probability")  # which is a classifier's


class WeightedSum:
    """`score = sum over terms of weight * score of the term`, in sequence and token rewards alike.

    Components: each term's own score by its name (before the weight), each of its components as `NAME/COMPONENT`, and
    `probability` where exactly one term has one, since reports show it.

    Where a term gives token rewards, so does the sum: these terms add up token by token, and the others' scores go to
    the last token. A sample's token rewards then add up to its score.

    Args:
        terms: `(weight, reward)` by name.

    Raises:
        HeelerError: no terms, a weight that is not finite, a name that the log needs; when called, token rewards that
            do not fit the completion.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Reward]]) -> None:
        if not terms:
            raise HeelerError("a weighted sum needs at least one reward")
        check_names(terms, "a term of a reward", RESERVED)
        for name, (weight, _) in terms.items():
            if not math.isfinite(weight):
                raise HeelerError(f"the weight of the reward {name} is {weight}: give a finite number")
        self.terms = dict(terms)

    def __call__(self, samples: Samples) -> RewardOutput:
        outputs = self._outputs(samples)
        scores = torch.zeros(len(samples), dtype=torch.float64)
        components: dict[str, Tensor] = {}
        for name, output in outputs.items():
            scores += self.terms[name][0] * output.scores.double().cpu()
            components[name] = output.scores
            components |= {f"{name}/{part}": values for part, values in output.components.items()}
        probabilities = [o.components["probability"] for o in outputs.values() if "probability" in o.components]
        if len(probabilities) == 1:
            components["probability"] = probabilities[0]
        return RewardOutput(
            scores=scores.float(), token_rewards=self._token_rewards(outputs, samples), components=components
        )

    def _outputs(self, samples: Samples) -> dict[str, RewardOutput]:
        outputs: dict[str, RewardOutput] = {}
        without = [True] * len(samples)  # no term has said anything of the sample
        for name, (_, reward) in self.terms.items():
            if isinstance(reward, FunctionReward):
                outputs[name], nothing = reward.as_term(samples)
                without = [a and b for a, b in zip(without, nothing, strict=True)]
            else:
                outputs[name], without = reward(samples), [False] * len(samples)
        if any(without):
            raise HeelerError(
                f"every term of the reward ({', '.join(self.terms)}) returned None for completion"
                f" {without.index(True) + 1} of {len(samples)}: one of them must return a number"
            )
        return outputs

    def _token_rewards(self, outputs: Mapping[str, RewardOutput], samples: Samples) -> Sequence[Sequence[float]] | None:
        if all(output.token_rewards is None for output in outputs.values()):
            return None
        sums = [[0.0] * len(ids) for ids in samples.completion_ids]
        for name, output in outputs.items():
            weight = self.terms[name][0]
            for index, row in enumerate(sums):
                if output.token_rewards is not None:
                    given = output.token_rewards[index]
                    if len(given) != len(row):
                        raise HeelerError(
                            f"the reward {name} returned {len(given)} token rewards for completion {index + 1}, which"
                            f" has {len(row)} tokens"
                        )
                    for token, value in enumerate(given):
                        row[token] += weight * value
                elif row:
                    row[-1] += weight * float(output.scores[index])
                else:
                    raise HeelerError(
                        f"completion {index + 1} has no token to put the score of the reward {name} on: a sum with"
                        " token rewards needs completions that are not empty"
                    )
        return sums
