"""`heeler ppo translate`: a small T5 learns to translate JupyterLab's interface from English into French, or a user's
own pairs of any two languages.

1. A tokenizer is learnt on the training pairs, and a T5 of a few million weights starts from random ones.
2. Supervised fine-tuning on the training pairs; the weights with the lowest validation loss are kept.
3. PPO on the training sources: the reward is half sentence chrF and half sentence BLEU of a sampled translation, with
   a KL penalty to the fine-tuned model.
4. Corpus chrF and BLEU on the test pairs, before and after PPO, for greedy and for sampled translations.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from heeler.data.preferences import check_disjoint
from heeler.data.prompts import load_prompts
from heeler.data.translation import Pair, Part, build_tokenizer, split_pairs, translation_pairs
from heeler.policies import loading
from heeler.policies.language_model import Full
from heeler.ppo.advantages import AdvantageConfig
from heeler.ppo.kl import FixedKL
from heeler.ppo.schedules import Schedule
from heeler.ppo.update import PPOConfig
from heeler.recipes.own import digest, read_pairs, start_of
from heeler.recipes.stages import claim, finish, ppo_stage, sft_stage, write_rows
from heeler.rollout.engines.draws import GREEDY, draw_seed
from heeler.rollout.engines.seq2seq import Seq2SeqEngine
from heeler.rollout.text import decode
from heeler.runtime.packages import require
from heeler.runtime.progress import say
from heeler.runtime.runs import read_json, write_json
from heeler.train.run import at_least
from heeler.train.sft import SFTConfig
from heeler.train.text import TextConfig
from heeler.types import HeelerError, Request, Sampling


@dataclass(frozen=True, kw_only=True)
class Translate:
    """Supervised fine-tuning, then PPO, on translations: English to French, or your own pairs.

    Attributes:
        data: your own pairs: a file (JSONL, CSV, Parquet) or a datasets id with the columns source and target, or
            prompt and completion; JupyterLab's texts where None.
        eval_data: the same, held out; where None, about an eighth of the pairs of `data` is.
        model: folder or hub id of an encoder-decoder model to start from, with --sft-lr 1e-4 or so; where None, a T5
            with random weights and a tokenizer learnt on the pairs.
        out: the folder of all stages; runs/translate where None.
        seed: of the first weights and every draw.
        threads: CPU threads; None takes one for each core that the process may use.
        max_words: longer sources are left out.
        vocab_size: of the tokenizer that is learnt.
        width: of the new T5's states (d_model); heads have 32 each.
        layers: of its encoder, and of its decoder.
        sft_epochs: passes of the fine-tuning over the training pairs.
        sft_lr: its peak learning rate.
        updates: PPO updates.
        prompts_per_update: sources in each.
        samples_per_prompt: translations of each source.
        max_new_tokens: the longest translation.
        lr: of PPO's policy.
        critic_lr: of its critic.
        kl_coef: of the penalty to the fine-tuned model.
        test_pairs: held-out pairs of the figures, at most; a file of your own counts whole.
    """

    data: str | None = None
    eval_data: str | None = None
    model: str | None = None
    out: str | None = None
    seed: int = 0
    threads: int | None = None
    max_words: int = 16
    vocab_size: int = 2000
    width: int = 192
    layers: int = 3
    sft_epochs: float = 20.0
    sft_lr: float = 2e-3
    updates: int = 40
    prompts_per_update: int = 64
    samples_per_prompt: int = 2
    max_new_tokens: int = 40
    lr: float = 1e-4
    critic_lr: float = 1e-3
    kl_coef: float = 0.01
    test_pairs: int = 256


HEAD_WIDTH = 32


def rows_of(pairs: Sequence[Pair], target: str) -> list[dict[str, str]]:
    """Rows with a "prompt", and the translation in the column `target`."""
    return [{"prompt": pair.source, target: pair.target} for pair in pairs]


def parts_of(recipe: Translate, show: bool = True) -> Mapping[Part, Sequence[Pair]]:
    """The pairs of training, validation and test; test has those of the figures only."""
    if recipe.data is None:
        if recipe.eval_data is not None:
            raise HeelerError("--eval-data is held out of your own pairs: give them too, with --data")
        parts = translation_pairs(recipe.max_words)
        return {**parts, "test": parts["test"][: recipe.test_pairs]}
    read, held_out = read_pairs(recipe.data), read_pairs(recipe.eval_data) if recipe.eval_data else []
    own: dict[Part, list[Pair]] = split_pairs(read, recipe.max_words)
    if recipe.eval_data is not None:
        train, test = own["train"] + own["test"], _whole(split_pairs(held_out, recipe.max_words))
        sources = {"--data": [*train, *own["validation"]], "--eval-data": test}
        check_disjoint({flag: [pair.source for pair in pairs] for flag, pairs in sources.items()})
        own["train"], own["test"] = train, test
    left_out = len(read) + len(held_out) - len(_whole(own))
    told = f"{left_out:,} left out, which are longer than --max-words {recipe.max_words}, repeated or untranslated"
    for part, pairs in own.items():
        if not pairs:
            raise HeelerError(f"{recipe.data}: no pair is left for the part {part!r} ({told}): give more pairs")
    if recipe.eval_data is None:
        own["test"] = own["test"][: recipe.test_pairs]
    counts = ", ".join(f"{len(pairs):,} for {part}" for part, pairs in own.items())
    say(f"{len(read) + len(held_out):,} pairs: {counts}; {told}", show)
    return own


def _whole(parts: Mapping[Part, Sequence[Pair]]) -> list[Pair]:
    return [pair for pairs in parts.values() for pair in pairs]


def start_model(recipe: Translate, train: Sequence[Pair], folder: Path) -> None:
    """A tokenizer of the training pairs and a T5 with random weights, as a transformers folder."""
    require("transformers", "lm")
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = build_tokenizer([text for p in train for text in (p.source, p.target)], recipe.vocab_size)
    torch.manual_seed(recipe.seed)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=recipe.width,
            d_kv=HEAD_WIDTH,
            num_heads=recipe.width // HEAD_WIDTH,
            d_ff=recipe.width * 8 // 3,
            num_layers=recipe.layers,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **{"decoder_start_token_id": tokenizer.pad_token_id},  # as in the published T5s
        )
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(folder)


def sft_config(recipe: Translate, parts: Mapping[Part, Sequence[Pair]], out: Path) -> SFTConfig:
    """The fine-tuning as a plain `heeler sft` run."""
    updates = max(1, round(recipe.sft_epochs * len(parts["train"]) / 32))
    return SFTConfig(
        model=recipe.model or str(out / "start"),
        data=write_rows(out / "data" / "train.jsonl", rows_of(parts["train"], "completion")),
        eval_data=write_rows(out / "data" / "validation.jsonl", rows_of(parts["validation"], "completion")),
        out=str(out / "sft"),
        seed=recipe.seed,
        updates=updates,
        examples_per_update=32,
        trainable=Full(),
        lr=recipe.sft_lr,
        lr_schedule=Schedule(shape="cosine", warmup=50, end=0.05),
        adam_betas=(0.9, 0.98),
        eval_every=max(1, updates // 20),
        precision="fp32",
        threads=recipe.threads,
    )


def text_config(recipe: Translate, parts: Mapping[Part, Sequence[Pair]], out: Path) -> TextConfig:
    """PPO as a plain `heeler ppo lm` run."""
    return TextConfig(
        model=str(out / "sft"),
        prompts=write_rows(out / "data" / "prompts.jsonl", rows_of(parts["train"], "answer")),
        eval_prompts=write_rows(out / "data" / "test.jsonl", rows_of(parts["test"], "answer")),
        reward="0.5*chrf + 0.5*bleu",  # chrF alone, which counts recall more, makes translations longer
        out=str(out / "ppo"),
        seed=recipe.seed,
        updates=recipe.updates,
        prompts_per_update=recipe.prompts_per_update,
        samples_per_prompt=recipe.samples_per_prompt,
        sampling=Sampling(max_new_tokens=recipe.max_new_tokens),
        trainable=Full(),
        kl=FixedKL(coef=recipe.kl_coef),
        lr=recipe.lr,
        critic_lr=recipe.critic_lr,
        critic_warmup=min(4, recipe.updates // 4),
        lr_schedule=Schedule(shape="linear", end=0.1),
        advantage=AdvantageConfig(gamma=1.0, lam=0.95),
        ppo=PPOConfig(epochs=2, minibatches=2),
        precision="fp32",
        threads=recipe.threads,
    )


def corpus_figures(model: str, pairs: Sequence[Pair], max_new_tokens: int, seed: int) -> dict[str, float]:
    """sacrebleu's corpus chrF2 and BLEU (0 to 100), of the most likely tokens and of draws at temperature 1.

    Args:
        model: folder of an encoder-decoder model and its tokenizer.
        pairs: sources, and one reference each.
        max_new_tokens: the length cap.
        seed: of the draws.
    """
    require("sacrebleu", "translate")
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    tokenizer, loaded = loading.load_tokenizer(model), loading.load_seq2seq_lm(model)
    engine = Seq2SeqEngine(loaded, eos_ids=loading.end_of_sequence_ids(loaded, tokenizer))
    requests = [
        Request(prompt=tokenizer(pair.source)["input_ids"], seed=draw_seed(seed, 0x7E57, i))
        for i, pair in enumerate(pairs)
    ]
    references = [[pair.target for pair in pairs]]
    figures: dict[str, float] = {}
    for name, temperature in (("greedy", GREEDY), ("sampled", 1.0)):
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
        texts = [decode(tokenizer, completion) for completion in engine.generate(requests, sampling)]
        figures[f"{name}/chrf"] = CHRF().corpus_score(texts, references).score
        figures[f"{name}/bleu"] = BLEU().corpus_score(texts, references).score
    return figures


def run_translate(recipe: Translate, show: bool = True) -> Path:
    """The whole recipe; the folder of its stages."""
    require("sacrebleu", "translate")
    at_least({"--test-pairs": (recipe.test_pairs, 1), "--max-new-tokens": (recipe.max_new_tokens, 1)})
    if recipe.width < 1 or recipe.width % HEAD_WIDTH:
        raise HeelerError(f"--width {recipe.width} must be a multiple of {HEAD_WIDTH}, the width of an attention head")
    at_least({"--updates": (recipe.updates, 1), "--sft-epochs": (recipe.sft_epochs, 0)})
    parts = parts_of(recipe, show)
    if recipe.model is not None:
        start = start_of(recipe.model, seq2seq=True)
        room = start.room(recipe.max_new_tokens)
        load_prompts(rows_of(_whole(parts), "answer"), start.tokenizer, max_tokens=room, name="the sources")
    settings = {} if recipe.data is None else {"data_digest": digest([vars(pair) for pair in _whole(parts)])}
    out = claim(recipe.out, "translate", recipe, **settings)
    if recipe.model is None and not (out / "start" / "config.json").exists():
        start_model(recipe, parts["train"], out / "start")
    sft = sft_stage(sft_config(recipe, parts, out), show)
    say(f"fine-tuned: validation loss {sft['eval/after']['loss']:.3f} nats a token", show)
    ppo = ppo_stage(text_config(recipe, parts, out), show)
    stages: dict[str, dict[str, float]] = {}
    for name, folder, when in (("SFT", "sft", "before"), ("SFT+PPO", "ppo", "after")):
        file = out / f"corpus_{folder}.json"
        if not file.exists():
            write_json(file, corpus_figures(str(out / folder), parts["test"], recipe.max_new_tokens, recipe.seed))
        stages[name] = {**ppo[f"eval/{when}"], **read_json(file)}
    keep = ("reward", "sampled/chrf", "greedy/chrf", "sampled/bleu", "greedy/bleu", "length", "kl/ref")
    finish(out, stages, keep, {"validation": sft["eval/after"]})
    return out
