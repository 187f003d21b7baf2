"""Training a reward model: a sequence classifier with one output, on labelled texts or on preferences.

    labels        loss = BCE(s(x), y)
    preferences   loss = -log sigmoid(s(chosen) - s(rejected) - margin) + centring * (s(chosen) + s(rejected))^2

The first is logistic regression, the second the Bradley-Terry model [Christiano et al., 1706.03741, section 2.2.3],
with the margin of Llama 2 [2307.09288, equation 2] and the centring term of Eisenstein et al. [2312.09244].
The result is a folder that plain transformers loads, with `heeler.json` beside it (how it was trained, its figures).
A score of preferences has no natural zero: `normalize` stores gain and bias in the model's config, so that chosen
completions of the training set (1,000 drawn ones of a larger set) have mean 0 and standard deviation 1 [Stiennon et
al., 2009.01325, appendix C].
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from heeler.data.preferences import Preference
from heeler.policies import loading
from heeler.policies.splitting import layer_list
from heeler.ppo.minibatches import budgeted_microbatches
from heeler.ppo.schedules import Schedule
from heeler.runtime import machine
from heeler.runtime.configs import to_json
from heeler.runtime.packages import require
from heeler.runtime.passes import PassBudget, pass_budget
from heeler.runtime.progress import progress, say
from heeler.runtime.runs import write_json
from heeler.train.run import at_least, interruptible
from heeler.types import CheckFailed, HeelerError

STATE = "training.pt"
COUNTERS = ("order", "done", "step", "seconds", "recent")
SAVE_EVERY = 300.0  # seconds
TEXTS_AT_ONCE = 512  # tokenised between two looks at the progress bar
NORMALIZED_ON = 1000  # chosen completions, drawn from all of the training set


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How a classifier is trained.

    Attributes:
        model: folder or hub id of a pretrained encoder, or of a causal language model.
        tokens: real tokens to train on; the learning rate falls to 0 over them. As many as `epochs` need where 0.
        epochs: passes over the data, where `tokens` is 0.
        batch_size: texts, or pairs, an optimiser step.
        lr: peak learning rate of the encoder.
        head_lr: peak learning rate of the fresh head.
        warmup: optimiser steps of linear warm-up.
        frozen_layers: layers at the bottom that stay as they are, with the embeddings.
        lengths: crop lengths in tokens, for labelled texts; each batch draws one. Texts are read whole where empty.
        from_start: share of crops that begin at the text's first word; the others begin anywhere.
        max_tokens: longer labelled texts lose their end, longer sides of a preference their beginning; where the model
            reads fewer tokens, its own limit holds.
        label_smoothing: pulls targets toward 1/2: keeps the logits of the reward in a range that PPO can use.
        centring: coefficient of (s(chosen) + s(rejected))^2.
        normalize: store gain and bias that give chosen completions mean 0 and standard deviation 1.
        token_budget: tokens of one forward and backward pass, padding included; None takes 1,536 on a CPU, where larger
            passes gain no speed, and 8,192 elsewhere. It changes memory and speed, not the gradient.
        seed: of the order and the crops.
        device: "auto" takes a GPU where there is one.
        threads: CPU threads; None takes one for each core that the process may use.
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
    token_budget: int | None = None
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    precision: machine.Precision = "auto"


def check_numbers(config: RewardConfig) -> None:
    """Raise a sentence where a number of the config cannot be used."""
    at_least(
        {
            "--tokens": (config.tokens, 0),
            "--epochs": (config.epochs, 0),
            "--batch-size": (config.batch_size, 1),
            "--lr": (config.lr, 0),
            "--head-lr": (config.head_lr, 0),
            "--warmup": (config.warmup, 0),
            "--frozen-layers": (config.frozen_layers, 0),
            "--lengths": (min(config.lengths, default=1), 1),
            "--max-tokens": (config.max_tokens, 1),
        }
    )


def most_tokens(path: str, tokenizer: Any) -> int | None:
    """`loading.most_tokens` of the model at `path`, whose weights are not read for it."""
    require("transformers", "lm")
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(loading.model_folder(path))
        with torch.device("meta"):  # no weights
            model = AutoModelForSequenceClassification.from_config(config)
    except (OSError, ValueError, RuntimeError):
        return loading.most_tokens(None, tokenizer)  # what cannot be loaded is refused in words where it is loaded
    return loading.most_tokens(model, tokenizer)


class _Tokenized:
    """Texts tokenised once, and put between the tokenizer's special tokens.

    Attributes:
        templated: whether each text is in the chat template: it holds its special tokens, and gets no more.
        room: tokens of a text without the special ones that it gets; the least, where some get none.
        num_cut: texts that were longer.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Any,
        max_tokens: int,
        keep: Literal["start", "end"],
        show: bool,
        templated: Sequence[bool] | None = None,
    ) -> None:
        if not texts:
            raise HeelerError("there are no texts to train the reward model on")
        self.tokenizer = tokenizer
        self.before, self.after = loading.special_tokens_around(tokenizer)
        self.templated = [False] * len(texts) if templated is None else list(templated)
        special = 0 if all(self.templated) else len(self.before) + len(self.after)
        self.room = max_tokens - special
        if self.room < 1:
            raise HeelerError(
                f"--max-tokens {max_tokens} leaves no room for a text beside the tokenizer's {special} special tokens:"
                f" give at least {special + 1}"
            )
        self.num_cut = 0
        self.ids: list[list[int]] = []
        with progress(len(texts), "tokenising", "text", show=show) as bar:
            for start in range(0, len(texts), TEXTS_AT_ONCE):
                encoded = tokenizer(list(texts[start : start + TEXTS_AT_ONCE]), add_special_tokens=False)["input_ids"]
                rooms = [max_tokens if self.templated[start + k] else self.room for k in range(len(encoded))]
                for ids, room in zip(encoded, rooms, strict=True):
                    self.ids.append(ids[:room] if keep == "start" else ids[-room:])
                    self.num_cut += len(ids) > room
                bar.update(len(encoded))

    def row(self, i: int, start: int = 0, length: int | None = None) -> list[int]:
        """Text `i` from token `start`, `length` tokens with the special ones; all of it where None."""
        before, after = ([], []) if self.templated[i] else (self.before, self.after)
        end = None if length is None else start + max(length - len(before) - len(after), 0)
        return [*before, *self.ids[i][start:end], *after]

    @property
    def num_tokens(self) -> int:
        return sum(len(self.row(i)) for i in range(len(self.ids)))

    def digest(self, also: Tensor) -> str:
        """Of the tokens, and of what is known about each text."""
        hashed = hashlib.blake2b(repr((self.before, self.after, also.tolist())).encode(), digest_size=16)
        for ids in self.ids:
            hashed.update(repr(ids).encode())
        return hashed.hexdigest()


class LabelledTexts:
    """Texts with yes-or-no labels; crops are cut from the tokens.

    `draw` gives the token rows of a batch, special tokens included; `loss` the mean loss of a batch from the scores of
    its rows; `num_tokens` is one pass over the data, whole texts. `show` draws a bar while they are tokenised.
    """

    kind = "labels"

    def __init__(
        self, texts: Sequence[str], labels: Sequence[bool], tokenizer: Any, max_tokens: int = 512, show: bool = False
    ) -> None:
        self.texts = _Tokenized(texts, tokenizer, max_tokens, keep="start", show=show)
        if len(set(labels)) == 1:
            raise HeelerError(f"all {len(labels)} labels are {labels[0]}: a reward model needs both classes")
        self.labels = torch.tensor([float(label) for label in labels])

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Of texts and labels."""
        return self.texts.digest(self.labels)

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
    """Pairs of texts, the better one first: two rows an item, otherwise like `LabelledTexts`."""

    kind = "preferences"

    def __init__(self, pairs: Sequence[Preference], tokenizer: Any, max_tokens: int = 512, show: bool = False) -> None:
        texts = [text for pair in pairs for text in (pair.chosen, pair.rejected)]
        templated = [pair.templated for pair in pairs for _ in (0, 1)]
        self.texts = _Tokenized(  # the completion is what differs
            texts, tokenizer, max_tokens, keep="end", show=show, templated=templated
        )
        for i, pair in enumerate(pairs):
            if self.texts.ids[2 * i] == self.texts.ids[2 * i + 1]:
                raise HeelerError(f"{pair.where or f'pair {i + 1}'}: {self._why_equal(pair)}")
        self.margins = torch.tensor([pair.margin for pair in pairs])

    def _why_equal(self, pair: Preference) -> str:
        chosen, rejected = (
            self.texts.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (pair.chosen, pair.rejected)
        )
        end = repr(pair.chosen[-60:])
        if chosen == rejected:
            return f"chosen and rejected have the same tokens ({end}), so that no model tells them apart: drop the row"
        return (
            f"the last {self.texts.room} tokens of chosen and rejected are equal ({end}): give a larger --max-tokens,"
            " where the model reads more, or drop the row"
        )

    def __len__(self) -> int:
        return len(self.margins)

    def digest(self) -> str:
        """Of texts and margins."""
        return self.texts.digest(self.margins)

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


def reward_gradients(
    model: Any,
    data: LabelledTexts | PreferencePairs,
    items: Sequence[int],
    rows: Sequence[list[int]],
    config: RewardConfig,
    passes: PassBudget,
    computing: AbstractContextManager[Any],
) -> float:
    """The gradient of the mean loss of `items`, whose token rows lie in `rows` in their order; returns the loss.

    Items of similar length share a forward pass (under `computing`), so that little is padded; the denominator belongs
    to all of them, so the passes do not change the gradient.
    """
    of_item = len(rows) // len(items)  # 1, or the 2 sides of a pair
    costs = [of_item * max(map(len, rows[k : k + of_item])) for k in range(0, len(rows), of_item)]

    def run(parts: Sequence[Tensor]) -> float:
        model.zero_grad(set_to_none=True)
        total = 0.0
        for part in parts:
            chosen = part.tolist()
            ids = [rows[k] for i in chosen for k in range(of_item * i, of_item * (i + 1))]
            batch = data.texts.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
            with computing:
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = data.loss([items[i] for i in chosen], logits[:, 0].float(), config) * (len(chosen) / len(items))
            if math.isfinite(loss.item()):
                loss.backward()
            total += loss.item()
        return total

    return passes.fit(partial(budgeted_microbatches, torch.arange(len(items)), torch.tensor(costs)), run)


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


@dataclass(kw_only=True)
class _Training:
    """What training changes, kept when it is interrupted.

    Attributes:
        model, optimizer: of the classifier.
        rng: of the order and the crops.
        passes: tokens of a forward and backward pass; not kept, since they are the machine's.
        order: items of this pass over the data that are still to come.
        done, step, seconds: tokens, optimiser steps and time so far.
        recent: the last losses, for the progress bar.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    rng: random.Random
    passes: PassBudget
    order: list[int] = field(default_factory=list[int])
    done: int = 0
    step: int = 0
    seconds: float = 0.0
    recent: list[float] = field(default_factory=list[float])

    def save(self, folder: Path, also: Mapping[str, Any], again: str) -> None:
        """Write aside, then rename."""
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f"{STATE}.new"
        counters = {name: getattr(self, name) for name in COUNTERS}
        state = {
            **also, "weights": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.getstate(), **counters,
        }  # fmt: skip
        try:
            torch.save(state, aside)
            aside.replace(folder / STATE)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            aside.unlink(missing_ok=True)
            reason = str(error).splitlines()[0]
            raise HeelerError(
                f"cannot keep the reward model's training in {folder}: {reason}; free some space, then {again}"
            ) from error

    def load(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.setstate(state["rng"])
        for name in COUNTERS:
            setattr(self, name, state[name])


def kept_training(out: Path) -> Path:
    """Where the state of an interrupted training of the model `out` is kept."""
    return out.with_name(out.name + ".training")


def _kept_state(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state in `folder`; None where there is none. It must be that of the same training."""
    if not (folder / STATE).exists():
        return None
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that was cut may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HeelerError(f"{folder / STATE} cannot be read ({reason}): delete {folder} to begin anew") from error
    known = state["identity"]
    other = [name for name in {**known, **identity} if known.get(name) != identity.get(name)]
    if other:
        raise HeelerError(
            f"{folder} is the state of a training with other {', '.join(other)}: give what it was begun with, or"
            " delete it to begin anew"
        )
    return state


def train_reward_model(
    config: RewardConfig,
    train: LabelledTexts | PreferencePairs,
    tests: Mapping[str, tuple[LabelledTexts | PreferencePairs, int | None]],
    out: Path,
    show: bool = True,
    on_start: Callable[[int, dict[str, Any]], None] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
    again: str = "give the same command again",
) -> dict[str, Any]:
    """Train, measure on each of `tests` (name -> data, and the length at which texts are read), and write the folder
    aside, then rename.

    Every five minutes, at Ctrl-C and at the end the state of training is kept in `kept_training(out)`; called again
    with the same config and data it goes on from there, with the same numbers on the same kind of device. `again` tells
    the user how. Who calls deletes it when it has no use for it any more.

    Args:
        config: how.
        train, tests: data.
        out: the folder of the model.
        show: print progress.
        on_start: gets the number of steps that are done already, and the precision, threads and device chosen.
        on_step: gets the metrics of each optimiser step.
        again: how an interrupted training goes on, for its message.

    Returns:
        what is written to `heeler.json`: the config, the figures, the seconds; and for preferences `scores`, the
        normalised scores of chosen and rejected of each test.
    """
    check_numbers(config)
    machine.keep_freed_memory()
    torch.manual_seed(config.seed)
    # the machine's part of the config may change before a run is resumed, the training not
    identity = to_json(replace(config, device="auto", threads=None, precision="auto", token_budget=None))
    identity |= {"number of items": len(train), "data": train.digest()}
    state = _kept_state(kept_training(out), identity)
    resolved: dict[str, Any] = state["resolved"] if state is not None else {}
    tokenizer = train.texts.tokenizer
    device = torch.device(machine.choose_device(config.device))
    threads = machine.set_threads(config.threads or resolved.get("threads"))
    known = resolved.get("precision", config.precision) if config.precision == "auto" else config.precision
    precision, _ = machine.choose_precision(known, str(device))
    resolved = {"precision": precision, "threads": threads, "device": str(device)}
    computing = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    model = loading.load_classifier(config.model, num_labels=1).to(device)
    model.config.pad_token_id = tokenizer.pad_token_id  # a causal model looks for its last token by it
    encoder, head = _parts(model, config.frozen_layers)
    optimizer = torch.optim.AdamW(
        [{"params": encoder, "lr": config.lr}, {"params": head, "lr": config.head_lr}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=machine.fused_adam(str(device)),
    )
    passes = PassBudget(pass_budget(config.token_budget, device), "--token-budget")
    training = _Training(model=model, optimizer=optimizer, rng=random.Random(config.seed), passes=passes)
    total = config.tokens or max(1, round(config.epochs * train.num_tokens))
    if state is not None:
        training.load(state)
        say(f"continuing the reward model after {training.done:,} of {total:,} tokens", show)
    if on_start is not None:
        on_start(training.step, resolved)
    keep = partial(training.save, kept_training(out), {"identity": identity, "resolved": resolved}, again)
    _train_to(total, training, train, config, computing, keep, again, on_step, show)
    score: dict[str, Any] = {"kind": train.kind, "scale": 1.0, "shift": 0.0}
    if isinstance(train, PreferencePairs) and config.normalize:
        drawn = random.Random(config.seed).sample(range(len(train)), min(len(train), NORMALIZED_ON))
        chosen = [train.texts.row(2 * i) for i in drawn]
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
        "seconds": round(training.seconds, 1),
        "steps": training.step,
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


def _train_to(
    total: int,
    training: _Training,
    train: LabelledTexts | PreferencePairs,
    config: RewardConfig,
    computing: AbstractContextManager[Any],
    keep: Callable[[], None],
    again: str,
    on_step: Callable[[dict[str, float]], None] | None,
    show: bool,
) -> None:
    """Optimiser steps until `total` tokens are done; `keep` writes the state on the way."""
    bar = progress(total, "reward model", "token", done=min(training.done, total), show=show)
    kept, saved = training.done, time.monotonic()
    try:
        with interruptible() as interrupted:
            while training.done < total and not interrupted.is_set():
                metrics = _step(training, train, config, total, computing)
                bar.update(min(training.done, total) - bar.n)
                bar.set_postfix_str(f"loss {sum(training.recent) / len(training.recent):.3f}", refresh=False)
                if on_step is not None:
                    on_step(metrics)
                if interrupted.is_set() or training.done >= total or time.monotonic() - saved > SAVE_EVERY:
                    keep()
                    kept, saved = training.done, time.monotonic()
    except KeyboardInterrupt:  # a second Ctrl-C
        stays = f"the state of {kept:,} tokens stays" if kept else "nothing was kept yet"
        raise KeyboardInterrupt(f"stopped at once: {stays}; to go on, {again}") from None
    finally:
        bar.close()
    if interrupted.is_set():
        raise KeyboardInterrupt(f"stopped after {training.done:,} of {total:,} tokens; to continue, {again}")


def _step(
    training: _Training,
    train: LabelledTexts | PreferencePairs,
    config: RewardConfig,
    total: int,
    computing: AbstractContextManager[Any],
) -> dict[str, float]:
    """One optimiser step; its metrics."""
    started = time.perf_counter()
    factor = min((training.step + 1) / max(config.warmup, 1), 1.0)
    factor *= Schedule(shape="linear").factor(training.done, total)
    groups = training.optimizer.param_groups
    for group, peak in zip(groups, (config.lr, config.head_lr), strict=True):
        group["lr"] = peak * factor
    while len(training.order) < config.batch_size:
        more = list(range(len(train)))
        training.rng.shuffle(more)
        training.order += more
    items, training.order = training.order[: config.batch_size], training.order[config.batch_size :]
    rows = train.draw(items, config, training.rng)
    loss = reward_gradients(training.model, train, items, rows, config, training.passes, computing)
    if not math.isfinite(loss):
        raise CheckFailed(f"the reward model's loss became {loss} at step {training.step + 1}: lower its learning rate")
    torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
    training.optimizer.step()
    training.done, training.step = training.done + sum(map(len, rows)), training.step + 1
    training.seconds += time.perf_counter() - started
    training.recent = [*training.recent[-29:], loss]
    return {
        "step": training.step, "tokens": training.done, "loss": loss, "lr": config.lr * factor,
        "seconds": training.seconds,
    }  # fmt: skip


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
