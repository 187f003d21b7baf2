"""A sequence classifier as a reward: any AutoModelForSequenceClassification, with its own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from heeler.data.prompts import has_template, texts_of, without_template
from heeler.policies import loading
from heeler.policies.precision import round_linear
from heeler.runtime.progress import say
from heeler.types import HeelerError, RewardOutput, Samples


class ClassifierReward:
    """The score of prompt and completion together, as a sequence classifier of any kind gives it.

    PPO trains on the logit, which does not saturate. Where the model was trained on labels, or is not Heeler's, its
    probability is a component, `reward/probability`. A model of preferences has no probability of a single text.

    A conversation is read in the classifier's own chat template, as in training; without one its contents are joined by
    line ends, which is said once.

    Args:
        path: folder or hub id of a classifier with one label (its logit) or two (the difference of the two).
        scale, shift: score = scale * logit + shift; what the model's config says where None, else 1 and 0.
        batch_tokens: padded tokens in one forward pass.
        device: where it runs.
        precision: "bf16" computes under autocast.
    """

    def __init__(
        self,
        path: str,
        *,
        scale: float | None = None,
        shift: float | None = None,
        batch_tokens: int = 4096,
        device: str = "cpu",
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.path, self.batch_tokens = path, batch_tokens
        self.tokenizer = loading.load_tokenizer(path)
        self.tokenizer.truncation_side = "left"  # a text that is too long loses its beginning, not the completion
        self.device, self.precision = device, precision
        self.model = loading.load_classifier(path).requires_grad_(False).to(device)
        if precision == "bf16":
            round_linear(self.model)
        if self.model.config.num_labels > 2:
            raise HeelerError(
                f"the reward model {path} has {self.model.config.num_labels} labels: it must have one or two"
            )
        stored = getattr(self.model.config, loading.SCORE_KEY, {})
        self.scale = float(stored.get("scale", 1.0)) if scale is None else scale
        self.shift = float(stored.get("shift", 0.0)) if shift is None else shift
        self.has_probability = stored.get("kind", "labels") == "labels"
        if self.model.config.pad_token_id is None:  # a causal model looks for its last token by it
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.max_length = loading.most_tokens(self.model, self.tokenizer) or 512
        self.told = False  # that there is no chat template

    @torch.no_grad()
    def logits(self, texts: Sequence[str], templated: Sequence[bool] | None = None) -> Tensor:
        """`[len(texts)]` logits of the positive class; texts are batched by length.

        `templated`: which of the texts hold their special tokens already; none where it is None.
        """
        options: dict[str, Any] = {"truncation": True, "max_length": self.max_length}
        encoded: list[list[int]] = [[]] * len(texts)
        for special in (True, False):
            items = [i for i in range(len(texts)) if special != (templated is not None and templated[i])]
            if items:
                ids = self.tokenizer([texts[i] for i in items], add_special_tokens=special, **options)["input_ids"]
                for i, row in zip(items, ids, strict=True):
                    encoded[i] = row
        order = sorted(range(len(texts)), key=lambda i: -len(encoded[i]))
        logits = torch.zeros(len(texts))
        start = 0
        while start < len(order):
            rows = order[start : start + max(self.batch_tokens // len(encoded[order[start]]), 1)]
            batch = self.tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt").to(self.device)
            with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.precision == "bf16"):
                output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
            logits[rows] = (output[:, 0] if output.shape[1] == 1 else output[:, 1] - output[:, 0]).cpu()
            start += len(rows)
        return logits

    def __call__(self, samples: Samples) -> RewardOutput:
        name = f"the reward model {self.path}"
        templated = [has_template(prompt, self.tokenizer) for prompt in samples.prompts]
        if not (self.told or any(templated) or all(isinstance(prompt, str) for prompt in samples.prompts)):
            say(without_template(name))
            self.told = True
        logits = self.logits(texts_of(samples.prompts, samples.completions, self.tokenizer, name), templated)
        return RewardOutput(
            scores=logits * self.scale + self.shift,
            token_rewards=None,
            components={"probability": logits.sigmoid()} if self.has_probability else {},
        )
