"""`heeler rlhf lm`: the three stages of RLHF on a user's own files.

1. Fine-tuning on demonstrations, as `heeler sft` reads them.
2. A reward model from preferences or labels, as `heeler reward` reads them; it starts from the fine-tuned policy unless
   another model is given.
3. PPO with that reward, from the fine-tuned policy, on prompts as `heeler ppo lm` reads them.

Base model, fine-tuned policy and PPO's policy complete the same held-out prompts. The files are read and checked before
anything is trained, and what the stages read is kept in OUT/data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from heeler.data.examples import load_examples
from heeler.data.preferences import check_disjoint, load_labels, load_preferences
from heeler.data.prompts import load_prompts
from heeler.data.tables import named_rows
from heeler.policies.loading import load_tokenizer
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import FixedKL
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig
from heeler.recipes.own import Start, digest, hold_out, key_of, start_of
from heeler.recipes.stages import claim, train_chain, write_rows
from heeler.rewards.specs import load_judges
from heeler.runtime.progress import say
from heeler.train.reward import RewardConfig
from heeler.train.reward_run import RewardTask
from heeler.train.run import at_least
from heeler.train.sft import SFTConfig
from heeler.train.text import TextConfig
from heeler.types import HeelerError, Sampling

Rows = Sequence[dict[str, Any]]
PREFERENCES_SHARE, MOST_PREFERENCES = 0.1, 1000  # held out, as of `heeler reward`, and at most


@dataclass(frozen=True, kw_only=True)
class RLHFLM:
    """Fine-tuning, a reward model, PPO, on your own files (JSONL, CSV, Parquet) or data sets.

    Attributes:
        model: folder or hub id of any causal model.
        demonstrations: rows with prompt and completion, messages, or text.
        preferences: rows with prompt, chosen and rejected, or with text and label.
        prompts: rows with a prompt.
        eval_prompts: the same, held out; where None, a fifth of the prompts is, at most 256.
        reward_model: folder or hub id of the encoder or causal model that becomes the reward model; the fine-tuned
            policy where None.
        judges: "name=REWARD" scorers that are only reported, as of heeler ppo lm.
        out: the folder of all stages; runs/rlhf-lm where None.
        seed: of every draw.
        layers: at the top, that fine-tuning and PPO train, and the reward model too where it starts from the policy.
        epochs: passes of the fine-tuning over the demonstrations.
        sft_lr: its peak learning rate.
        too_long: "error" refuses demonstrations longer than the model's context, "drop" leaves them out.
        updates: PPO updates.
        prompts_per_update: prompts in each.
        max_new_tokens: the longest completion.
        lr: peak learning rate of PPO; the critic's is ten times as high.
        kl_coef: of the penalty to the fine-tuned model.
        threads: CPU threads; None takes one for each core that the process may use.
    """

    model: str
    demonstrations: str
    preferences: str
    prompts: str
    eval_prompts: str | None = None
    reward_model: str | None = None
    judges: tuple[str, ...] = ()
    out: str | None = None
    seed: int = 1
    layers: int = 10
    epochs: float = 1.0
    sft_lr: float = 1e-4
    too_long: Literal["error", "drop"] = "error"
    updates: int = 20
    prompts_per_update: int = 64
    max_new_tokens: int = 64
    lr: float = 1e-4
    kl_coef: float = 0.05
    threads: int | None = None


def run_rlhf_lm(recipe: RLHFLM, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    at_least(
        {
            "--layers": (recipe.layers, 1),
            "--epochs": (recipe.epochs, 0),
            "--updates": (recipe.updates, 1),
            "--prompts-per-update": (recipe.prompts_per_update, 1),
            "--max-new-tokens": (recipe.max_new_tokens, 1),
        }
    )
    start = start_of(recipe.model)
    judges = load_judges(recipe.judges)
    demonstrations, name = named_rows(recipe.demonstrations, None)
    load_examples(demonstrations, start.tokenizer, max_tokens=start.context, name=name, too_long=recipe.too_long)
    prompts, held_out = read_prompts(recipe, start)
    demonstrations = without(demonstrations, held_out, name, strict=recipe.eval_prompts is not None, show=show)
    preferences, others = read_preferences(recipe)
    read = (demonstrations, preferences, others, prompts, held_out)
    out = claim(recipe.out, "rlhf-lm", recipe, data_digest=digest(*read))
    say(
        f"{len(demonstrations):,} demonstrations; {len(preferences):,} preferences or labels, {len(others):,} more held"
        f" out; {len(prompts):,} prompts, {len(held_out):,} more held out",
        show,
    )
    files = ("demonstrations", "preferences", "preferences-held-out", "prompts", "held_out")
    written = [write_rows(out / "data" / f"{name}.jsonl", rows) for name, rows in zip(files, read, strict=True)]
    top = start.top(recipe.layers)
    sft = SFTConfig(
        model=recipe.model,
        data=written[0],
        out=str(out / "sft"),
        seed=recipe.seed,
        epochs=recipe.epochs,
        too_long=recipe.too_long,
        trainable=top,
        lr=recipe.sft_lr,
        threads=recipe.threads,
    )
    training = RewardConfig(
        model=recipe.reward_model or sft.out or "",
        frozen_layers=0 if recipe.reward_model else start.layers - top.layers,
        seed=recipe.seed,
        threads=recipe.threads,
    )
    config = TextConfig(
        model=str(out / "sft"),
        prompts=written[3],
        eval_prompts=written[4],
        reward=str(out / "reward"),
        judges=recipe.judges,
        out=str(out / "ppo"),
        seed=recipe.seed,
        updates=recipe.updates,
        threads=recipe.threads,
        prompts_per_update=recipe.prompts_per_update,
        sampling=Sampling(max_new_tokens=recipe.max_new_tokens),
        trainable=top,
        kl=FixedKL(coef=recipe.kl_coef),
        lr=recipe.lr,
        critic_lr=10 * recipe.lr,
        lr_schedule=Schedule(shape="linear", end=0.1),
        advantage=AdvantageConfig(gamma=1.0, lam=0.95),
        ppo=PPOConfig(epochs=2, minibatches=2),
    )
    task = RewardTask(data=written[1], eval_data=written[2], out=str(out / "reward"), training=training)
    keep = (*judges, "reward", "distinct_2", "duplicates", "length", "truncated_fraction", "kl/ref")
    return train_chain(out, sft, task, config, keep, show)


def read_prompts(recipe: RLHFLM, start: Start) -> tuple[Rows, Rows]:
    """The rows of PPO's prompts, and of those that are held out."""
    room = start.room(recipe.max_new_tokens)
    prompts, name = named_rows(recipe.prompts, None)
    load_prompts(prompts, start.tokenizer, max_tokens=room, name=name)
    if recipe.eval_prompts is None:
        held_out, rest = hold_out(prompts, [key_of(row["prompt"]) for row in prompts], recipe.seed, name)
        return rest, held_out
    held_out, name = named_rows(recipe.eval_prompts, None)
    load_prompts(held_out, start.tokenizer, max_tokens=room, name=name)
    parts = {"--prompts": prompts, "--eval-prompts": held_out}
    check_disjoint({flag: [row["prompt"] for row in rows] for flag, rows in parts.items()})
    return prompts, held_out


def without(demonstrations: Rows, held_out: Rows, name: str, strict: bool, show: bool) -> Rows:
    """The demonstrations whose prompt is not held out; where `strict`, others are refused."""
    keys = {key_of(row["prompt"]) for row in held_out}
    rest = [row for row in demonstrations if key_of(_prompt_of(row)) not in keys]
    left_out = len(demonstrations) - len(rest)
    if left_out and (strict or not rest):
        cure = "take them out of one of the two" if strict else "give more, or the held-out ones with --eval-prompts"
        raise HeelerError(f"{name}: {left_out} of {len(demonstrations)} demonstrations are of held-out prompts: {cure}")
    if left_out:
        say(f"left out {left_out:,} demonstrations of held-out prompts", show)
    return rest


def _prompt_of(demonstration: Mapping[str, Any]) -> Any:
    """What is asked; of a conversation, the messages before the first answer; None of a text."""
    if (prompt := demonstration.get("prompt")) is not None:
        return prompt
    messages = demonstration.get("messages") or []
    return list(takewhile(lambda message: message["role"] != "assistant", messages)) or None


def read_preferences(recipe: RLHFLM) -> tuple[Rows, Rows]:
    """The rows that the reward model learns from, and those that it is tested on; no prompt, or text, is in both."""
    rows, name = named_rows(recipe.preferences, None)
    if not {"chosen", "text"} & rows[0].keys():
        raise HeelerError(
            f"{name}: its columns ({', '.join(rows[0])}) are neither those of preferences (chosen, rejected) nor those"
            " of labels (text, label): name them so"
        )
    tokenizer = load_tokenizer(recipe.reward_model or recipe.model)
    if labelled := "chosen" not in rows[0]:
        keys, _ = load_labels(rows, name=name)
    else:
        pairs = load_preferences(rows, tokenizer, max_tokens=None, name=name)
        keys = [key_of(pair.prompt or [pair.chosen, pair.rejected]) for pair in pairs]
    held_out, rest = hold_out(rows, keys, recipe.seed, name, share=PREFERENCES_SHARE, most=MOST_PREFERENCES)
    for part, of in (("learns from", rest), ("is tested on", held_out)) if labelled else ():
        load_labels(of, name=f"{name}, of which the reward model {part} {len(of)}")
    return rest, held_out
