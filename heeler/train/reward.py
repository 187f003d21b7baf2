"""Training a reward model: a sequence classifier with one output, on labelled texts or on preferences.

    labels        loss = BCE(s(x), y)
    preferences   loss = -log sigmoid(s(chosen) - s(rejected) - margin) + centring * (s(chosen) + s(rejected))^2

The first is logistic regression, the second the Bradley-Terry model [Christiano et al., 1706.03741, section 2.2.3],
with the margin of Llama 2 [2307.09288, equation 2] and the centring term of Eisenstein et al. [2312.09244].
The result is a folder that plain transformers loads, with `heeler.json` beside it (how it was trained, its figures).
A score of preferences has no natural zero: `normalize` stores gain and bias in the model's config, so that chosen
completions of the training set have mean 0 and standard deviation 1 [Stiennon et al., 2009.01325, appendix C].
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from heeler.data.preferences import Preference
from heeler.policies import loading
from heeler.policies.splitting import layer_list
from heeler.ppo.schedules import Schedule
from heeler.runtime import machine
from heeler.runtime.configs import to_json
from heeler.runtime.progress import progress
from heeler.runtime.runs import write_json
from heeler.types import CheckFailed, HeelerError


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a classifier is trained.

    Attributes:
        model: folder or hub id of a pretrained encoder, or of a causal language model.
        tokens: real tokens to train on; the learning rate falls to 0 over them. As many as `epochs` need where 0.
        epochs: passes over the data, where `tokens` is 0.
        batch_size: texts, or pairs, an optimiser step.
        lr, head_lr: peak learning rates of the encoder and of the fresh head.
        warmup: optimiser steps of linear warm-up.
        frozen_layers: layers at the bottom that stay as they are, with the embeddings.
        lengths: crop lengths in tokens, for labelled texts; each batch draws one. Texts are read whole where empty.
        from_start: share of crops that begin at the text's first word; the others begin anywhere.
        max_tokens: longer labelled texts lose their end, longer sides of a preference their beginning.
        label_smoothing: pulls targets toward 1/2: keeps the logits of the reward in a range that PPO can use.
        centring: coefficient of (s(chosen) + s(rejected))^2.
        normalize: store gain and bias that give chosen completions mean 0 and standard deviation 1.
        seed: of the order and the crops.
        threads: CPU threads; None takes all.
        precision: "auto" measures; bf16 keeps the weights in fp32 and computes under autocast.
    """

    model: str
    tokens: int = 0
    epochs: float = 1.0
    batch_size: int = 16
    lr: float = 1e-4
    head_lr: float = 1e-3
    warmup: int = 20
    frozen_layers: int = 0
    lengths: tuple[int, ...] = ()
    from_start: float = 0.5
    max_tokens: int = 512
    label_smoothing: float = 0.0
    centring: float = 0.0
    normalize: bool = True
    seed: int = 0
    threads: int | None = None
    precision: machine.Precision = "auto"


class RewardData(Protocol):
    """What the training loop needs of its data."""

    kind: str  # "labels" or "preferences", for the model's config

    def __len__(self) -> int: ...
    @property
    def num_tokens(self) -> int:
        """Real tokens of one pass over the data, whole texts."""
        ...

    def draw(self, items: Sequence[int], config: RewardConfig, rng: random.Random) -> list[list[int]]:
        """Token rows of a batch, special tokens included."""
        ...

    def loss(self, items: Sequence[int], scores: Tensor, config: RewardConfig) -> Tensor:
        """Mean loss of a batch from the scores `[B]` of its rows."""
        ...


class _Tokenized:
    """Texts tokenised once, and put between the tokenizer's special tokens."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, max_tokens: int, keep: Literal["start", "end"]) -> None:
        if not texts:
            raise HeelerError("there are no texts to train the reward model on")
        self.tokenizer = tokenizer
        self.before, self.after = loading.special_tokens_around(tokenizer)
        room = max_tokens - len(self.before) - len(self.after)
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        self.ids: list[list[int]] = [ids[:room] if keep == "start" else ids[-room:] for ids in encoded]

    def row(self, i: int, start: int = 0, length: int | None = None) -> list[int]:
        """Text `i` from token `start`, `length` tokens with the special ones; all of it where None."""
        end = None if length is None else start + length - len(self.before) - len(self.after)
        return [*self.before, *self.ids[i][start:end], *self.after]

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) + len(self.before) + len(self.after) for ids in self.ids)


class LabelledTexts:
    """Texts with yes-or-no labels; crops are cut from the tokens."""

    kind = "labels"

    def __init__(self, texts: Sequence[str], labels: Sequence[bool], tokenizer: Any, max_tokens: int = 512) -> None:
        self.texts = _Tokenized(texts, tokenizer, max_tokens, keep="start")
        if len(set(labels)) == 1:
            raise HeelerError(f"all {len(labels)} labels are {labels[0]}: a reward model needs both classes")
        self.labels = torch.tensor([float(label) for label in labels])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_tokens(self) -> int:
        return self.texts.num_tokens

    def draw(self, items: Sequence[int], config: RewardConfig, rng: random.Random) -> list[list[int]]:
        if not config.lengths:
            return [self.texts.row(i) for i in items]
        length = rng.choice(config.lengths)
        room = length - len(self.texts.before) - len(self.texts.after)
        starts = [
            0 if rng.random() < config.from_start else rng.randrange(max(len(self.texts.ids[i]) - room, 0) + 1)
            for i in items
        ]
        return [self.texts.row(i, start, length) for i, start in zip(items, starts, strict=True)]

    def loss(self, items: Sequence[int], scores: Tensor, config: RewardConfig) -> Tensor:
        targets = self.labels[list(items)] * (1 - config.label_smoothing) + config.label_smoothing / 2
        return torch.nn.functional.binary_cross_entropy_with_logits(scores, targets.to(scores.device))


class PreferencePairs:
    """Pairs of texts, the better one first."""

    kind = "preferences"

    def __init__(self, pairs: Sequence[Preference], tokenizer: Any, max_tokens: int = 512) -> None:
        texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        self.texts = _Tokenized(texts, tokenizer, max_tokens, keep="end")  # the completion is what differs
        for i, pair in enumerate(pairs):
            if self.texts.ids[2 * i] == self.texts.ids[2 * i + 1]:
                raise HeelerError(
                    f"pair {i + 1}: the last {max_tokens} tokens of chosen and rejected are equal"
                    f" ({pair.chosen[-60:]!r}): allow more tokens or drop the pair"
                )
        self.margins = torch.tensor([pair.margin for pair in pairs])

    def __len__(self) -> int:
        return len(self.margins)

    @property
    def num_tokens(self) -> int:
        return self.texts.num_tokens

    def draw(self, items: Sequence[int], config: RewardConfig, rng: random.Random) -> list[list[int]]:
        return [self.texts.row(2 * i + side) for i in items for side in (0, 1)]

    def loss(self, items: Sequence[int], scores: Tensor, config: RewardConfig) -> Tensor:
        chosen, rejected = scores[0::2], scores[1::2]
        differences = chosen - rejected - self.margins[list(items)].to(scores.device)
        loss = -torch.nn.functional.logsigmoid(differences)
        if config.label_smoothing:
            wrong = -torch.nn.functional.logsigmoid(-differences)
            loss = (1 - config.label_smoothing) * loss + config.label_smoothing * wrong
        return (loss + config.centring * (chosen + rejected) ** 2).mean()


@torch.no_grad()
def score_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    *,
    batch_tokens: int = 8192,
    label: str = "",
    show: bool = False,
) -> Tensor:
    """`[len(rows)]` raw scores of token rows, batched by length."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    scores = torch.zeros(len(rows))
    bar = progress(len(rows), label, "text", show=show and bool(label))
    start = 0
    while start < len(order):
        items = order[start : start + max(batch_tokens // max(len(rows[order[start]]), 1), 1)]
        batch = tokenizer.pad({"input_ids": [rows[i] for i in items]}, return_tensors="pt").to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores[items] = logits[:, 0].float().cpu()
        start += len(items)
        bar.update(len(items))
    bar.close()
    return scores


def accuracy(model: Any, data: LabelledTexts, length: int | None = None, show: bool = False) -> dict[str, float]:
    """Share of right labels, mean log loss (nats) and calibration on the first `length` tokens; all where None."""
    rows = [data.texts.row(i, 0, length) for i in range(len(data))]
    label = "testing" if length is None else f"testing at {length} tokens"
    scores = score_rows(model, data.texts.tokenizer, rows, label=label, show=show)
    right = ((scores > 0) == (data.labels > 0.5)).float().mean()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, data.labels)
    return {
        "accuracy": float(right),
        "log_loss": float(loss),
        "calibration_error": calibration_error(scores.sigmoid(), data.labels),
    }


def pair_scores(model: Any, data: PreferencePairs, show: bool = False) -> Tensor:
    """`[P, 2]` raw scores of chosen and rejected."""
    rows = [data.texts.row(i) for i in range(2 * len(data))]
    return score_rows(model, data.texts.tokenizer, rows, label="testing", show=show).view(-1, 2)


def pair_figures(scores: Tensor) -> dict[str, float]:
    """Share of pairs in the right order (half for ties), mean log loss (nats) and calibration of `[P, 2]` scores."""
    difference = scores[:, 0] - scores[:, 1]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return {
        "accuracy": float(right.mean()),
        "log_loss": float(-torch.nn.functional.logsigmoid(difference).mean()),
        # each pair is asked about its first side, which is as often the worse one as the better one
        "calibration_error": calibration_error(
            torch.cat([difference, -difference]).sigmoid(), torch.cat([torch.ones_like(right), torch.zeros_like(right)])
        ),
    }


def calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> float:
    """Mean distance of predictions from outcomes over bins of equal width [Guo et al., 1706.04599, equation 3]."""
    bin_of = (probabilities * bins).long().clamp(max=bins - 1)
    count = torch.zeros(bins).scatter_add_(0, bin_of, torch.ones_like(probabilities))
    predicted = torch.zeros(bins).scatter_add_(0, bin_of, probabilities)
    happened = torch.zeros(bins).scatter_add_(0, bin_of, outcomes)
    return float((predicted - happened).abs().sum() / count.sum())


def train_reward_model(
    config: RewardConfig,
    train: LabelledTexts | PreferencePairs,
    tests: Mapping[str, tuple[LabelledTexts | PreferencePairs, int | None]],
    out: Path,
    show: bool = True,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train, measure on each of `tests` (name -> data, and the length at which texts are read), and write the folder
    aside, then rename.

    Returns what is written to `heeler.json`: the config, the figures, the seconds; and for preferences `scores`, the
    normalised scores of chosen and rejected of each test. `on_step` gets the metrics of each optimiser step.
    """
    machine.keep_freed_memory()
    machine.set_threads(config.threads)
    torch.manual_seed(config.seed)
    tokenizer = train.texts.tokenizer
    precision, _ = machine.choose_precision(config.precision, "cpu")
    computing = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    model = loading.load_classifier(config.model, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id  # a causal model looks for its last token by it
    encoder, head = _parts(model, config.frozen_layers)
    optimizer = torch.optim.AdamW(
        [{"params": encoder, "lr": config.lr}, {"params": head, "lr": config.head_lr}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=machine.fused_adam("cpu"),
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    rng = random.Random(config.seed)
    order: list[int] = []
    schedule = Schedule(shape="linear")
    total = config.tokens or max(1, round(config.epochs * train.num_tokens))
    done, step, started = 0, 0, time.perf_counter()
    recent: list[float] = []
    bar = progress(total, "reward model", "token", show=show)
    while done < total:
        factor = min((step + 1) / max(config.warmup, 1), 1.0) * schedule.factor(done, total)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        while len(order) < config.batch_size:
            more = list(range(len(train)))
            rng.shuffle(more)
            order += more
        items, order = order[: config.batch_size], order[config.batch_size :]
        batch = tokenizer.pad({"input_ids": train.draw(items, config, rng)}, return_tensors="pt")
        with computing:
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = train.loss(items, output.logits[:, 0].float(), config)
        if not torch.isfinite(loss):
            raise CheckFailed(
                f"the reward model's loss became {loss.item()} at step {step + 1}: lower its learning rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*encoder, *head], 1.0)
        optimizer.step()
        count = int(batch["attention_mask"].sum())
        done, step = done + count, step + 1
        recent = [*recent[-29:], loss.item()]
        if on_step is not None:
            seconds = time.perf_counter() - started
            on_step({"step": step, "tokens": done, "loss": loss.item(), "lr": config.lr * factor, "seconds": seconds})
        bar.update(min(count, total - bar.n))
        bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}", refresh=False)
    bar.close()
    seconds = time.perf_counter() - started
    score: dict[str, Any] = {"kind": train.kind, "scale": 1.0, "shift": 0.0}
    if isinstance(train, PreferencePairs) and config.normalize:
        chosen = [train.texts.row(2 * i) for i in range(min(len(train), 1000))]
        with computing:
            scores = score_rows(model, tokenizer, chosen, label="normalising", show=show)
        score["scale"] = 1 / max(float(scores.std(correction=0)), 1e-6)
        score["shift"] = -float(scores.mean()) * score["scale"]
    setattr(model.config, loading.SCORE_KEY, score)
    figures, plots = {}, {}
    for name, (data, length) in tests.items():
        with computing:
            if isinstance(data, PreferencePairs):
                pairs = pair_scores(model, data, show)
                figures[name] = pair_figures(pairs)
                plots[name] = (pairs * score["scale"] + score["shift"]).T.tolist()
            else:
                figures[name] = accuracy(model, data, length, show)
    report = {
        "config": to_json(config),
        "precision": precision,
        "seconds": round(seconds, 1),
        "steps": step,
        "score": score,
        "figures": figures,
    }
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    write_json(aside / "heeler.json", report)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    return {**report, "scores": plots} if plots else report


def _parts(model: Any, frozen_layers: int) -> tuple[list[Tensor], list[Tensor]]:
    """Trained parameters of the encoder and of the head; the rest is frozen."""
    base = model.base_model
    for parameter in base.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    if frozen_layers:
        embeddings = getattr(base, "embeddings", None)
        found = layer_list(getattr(base, "encoder", base))
        layers = getattr(getattr(base, "encoder", base), "layer", None) or (found[1] if found else None)
        if layers is None or not 0 <= frozen_layers < len(layers):
            raise HeelerError(f"cannot freeze {frozen_layers} layers of {type(base).__name__}")
        for module in [*layers[:frozen_layers], *([embeddings] if embeddings is not None else [])]:
            module.requires_grad_(False)
    inside = {id(p) for name, p in base.named_parameters() if "pooler" not in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in inside], [p for p in trained if id(p) not in inside]
