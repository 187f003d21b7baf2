"""Training a reward model: a sequence classifier on labelled texts, judged at the lengths it is used at.

PPO reads short snippets, reviews are long: training sees random crops of several lengths. The result is a plain
transformers folder with `heeler.json` beside it (its accuracy and how it was trained).
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heeler.policies import loading
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
        base: folder or hub id of a pretrained encoder.
        tokens: real tokens to train on; the learning rate falls to 0 over them.
        batch_size: texts an optimiser step.
        lr, head_lr: peak learning rates of the encoder and of the fresh head.
        warmup: optimiser steps of linear warm-up.
        frozen_layers: encoder layers at the bottom that stay as they are, with the embeddings.
        lengths: crop lengths in tokens; each batch draws one.
        from_start: share of crops that begin at the text's first word; the others begin anywhere.
        label_smoothing: pulls targets toward 1/2: keeps the logits of the reward in a range that PPO can use.
        seed: of the order and the crops.
        threads: CPU threads; None takes all.
        precision: "auto" measures; bf16 keeps the weights in fp32 and computes under autocast.
    """

    base: str
    tokens: int = 400_000
    batch_size: int = 16
    lr: float = 3e-4
    head_lr: float = 1e-3
    warmup: int = 20
    frozen_layers: int = 3
    lengths: tuple[int, ...] = (128, 128, 32)
    from_start: float = 0.5
    label_smoothing: float = 0.0
    seed: int = 0
    threads: int | None = None
    precision: machine.Precision = "auto"


class LabelledTexts:
    """Texts tokenised once; crops are cut from the ids."""

    def __init__(self, texts: Sequence[str], labels: Sequence[bool], tokenizer: Any, max_tokens: int = 512) -> None:
        if not texts:
            raise HeelerError("there are no texts to train the reward model on")
        if len(set(labels)) == 1:
            raise HeelerError(f"all {len(labels)} labels are {labels[0]}: a reward model needs both classes")
        encoded = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=max_tokens)
        self.ids: list[list[int]] = encoded["input_ids"]
        self.labels = torch.tensor([float(label) for label in labels])
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, items: Sequence[int], starts: Sequence[int], length: int) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, each `[B, L]`, special tokens counted in `length`."""
        first, last = [self.tokenizer.cls_token_id], [self.tokenizer.sep_token_id]
        rows = [[*first, *self.ids[i][s : s + length - 2], *last] for i, s in zip(items, starts, strict=True)]
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")


@torch.no_grad()
def accuracy(
    model: Any, data: LabelledTexts, length: int, batch_size: int = 64, show: bool = False
) -> dict[str, float]:
    """Share of right labels on the first `length` tokens, and the mean log loss (nats)."""
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data.ids[i]))
    logits = torch.zeros(len(data))
    bar = progress(len(data), f"testing at {length} tokens", "text", show=show)
    for start in range(0, len(order), batch_size):
        items = order[start : start + batch_size]
        logits[items] = model(**data.batch(items, [0] * len(items), length)).logits[:, 0].float()
        bar.update(len(items))
    bar.close()
    right = ((logits > 0) == (data.labels > 0.5)).float().mean()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, data.labels)
    return {"accuracy": float(right), "log_loss": float(loss)}


def train_reward_model(
    config: RewardConfig,
    train: LabelledTexts,
    tests: Mapping[str, tuple[LabelledTexts, int]],
    out: Path,
    show: bool = True,
) -> dict[str, Any]:
    """Train, measure on each of `tests` (name -> texts and length), and write the folder aside, then rename.

    Returns what is written to `heeler.json`: the config, the figures, the seconds.
    """
    machine.keep_freed_memory()
    machine.set_threads(config.threads)
    torch.manual_seed(config.seed)
    precision, _ = machine.choose_precision(config.precision, "cpu")
    model = loading.load_classifier(config.base, num_labels=1)
    encoder, head = _parts(model, config.frozen_layers)
    optimizer = torch.optim.AdamW(
        [{"params": encoder, "lr": config.lr}, {"params": head, "lr": config.head_lr}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    rng = random.Random(config.seed)
    order: list[int] = []
    schedule = Schedule(shape="linear")
    done, step, started = 0, 0, time.perf_counter()
    recent: list[float] = []
    bar = progress(config.tokens, "reward model", "token", show=show)
    while done < config.tokens:
        factor = min((step + 1) / max(config.warmup, 1), 1.0) * schedule.factor(done, config.tokens)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        while len(order) < config.batch_size:
            more = list(range(len(train)))
            rng.shuffle(more)
            order += more
        items, order = order[: config.batch_size], order[config.batch_size :]
        length = rng.choice(config.lengths)
        starts = [
            0 if rng.random() < config.from_start else rng.randrange(max(len(train.ids[i]) - (length - 2), 0) + 1)
            for i in items
        ]
        batch = train.batch(items, starts, length)
        targets = train.labels[items] * (1 - config.label_smoothing) + config.label_smoothing / 2
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(**batch).logits[:, 0].float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
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
        bar.update(min(count, config.tokens - bar.n))
        bar.set_postfix_str(f"loss {sum(recent) / len(recent):.3f}", refresh=False)
    bar.close()
    seconds = time.perf_counter() - started
    figures = {name: accuracy(model, data, length, show=show) for name, (data, length) in tests.items()}
    report = {
        "config": to_json(config),
        "precision": precision,
        "seconds": round(seconds, 1),
        "steps": step,
        "figures": figures,
    }
    aside = out.with_name(out.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    train.tokenizer.save_pretrained(aside)
    write_json(aside / "heeler.json", report)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    return report


def _parts(model: Any, frozen_layers: int) -> tuple[list[Tensor], list[Tensor]]:
    """Trained parameters of the encoder and of the head; the rest is frozen."""
    base = model.base_model
    for parameter in base.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    if frozen_layers:
        embeddings = getattr(base, "embeddings", None)
        layers = getattr(getattr(base, "encoder", base), "layer", None) or getattr(base, "layers", None)
        if layers is None or not 0 <= frozen_layers < len(layers):
            raise HeelerError(f"cannot freeze {frozen_layers} layers of {type(base).__name__}")
        for module in [*layers[:frozen_layers], *([embeddings] if embeddings is not None else [])]:
            module.requires_grad_(False)
    inside = {id(p) for name, p in base.named_parameters() if "pooler" not in name}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in inside], [p for p in trained if id(p) not in inside]
