"""Reward-model training on a tiny encoder: it overfits one batch, its folder loads, and it serves as a reward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from heeler.rewards.classifier import ClassifierReward
from heeler.train.reward import LabelledTexts, RewardConfig, accuracy, train_reward_model
from heeler.types import HeelerError
from tests.tiny import samples_of

WORDS = ["good", "fine", "bad", "poor", "film", "the", "a"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


TEXTS = ["the good film", "a fine film", "the bad film", "a poor film"] * 4
LABELS = [True, True, False, False] * 4


def test_it_learns_loads_and_rewards(encoder: str, tmp_path: Path) -> None:
    from heeler.policies.loading import load_tokenizer

    data = LabelledTexts(TEXTS, LABELS, load_tokenizer(encoder))
    config = RewardConfig(base=encoder, tokens=12000, lr=3e-3, head_lr=3e-3, frozen_layers=0, lengths=(8,), threads=1)
    report = train_reward_model(config, data, {"test": (data, 8)}, tmp_path / "rm", show=False)
    assert report["figures"]["test"]["accuracy"] == 1.0
    assert json.loads((tmp_path / "rm" / "heeler.json").read_text())["figures"] == report["figures"]
    reward = ClassifierReward(str(tmp_path / "rm"), batch_tokens=16)
    output = reward(samples_of(["the", "the"], [" good film", " poor film"]))
    assert output.components["probability"][0] > 0.9 > 0.1 > output.components["probability"][1]
    torch.testing.assert_close(output.scores.sigmoid(), output.components["probability"])
    assert accuracy(reward.model, data, 8)["accuracy"] == 1.0


def test_batching_by_length_changes_nothing(encoder: str, tmp_path: Path) -> None:
    from heeler.policies.loading import load_tokenizer

    data = LabelledTexts(TEXTS, LABELS, load_tokenizer(encoder))
    config = RewardConfig(base=encoder, tokens=200, frozen_layers=1, lengths=(8,), threads=1)
    train_reward_model(config, data, {}, tmp_path / "rm", show=False)
    texts = ["good", "the bad film the good a poor film", "a film", "fine fine fine"]
    one = ClassifierReward(str(tmp_path / "rm"), batch_tokens=1).logits(texts)
    torch.testing.assert_close(ClassifierReward(str(tmp_path / "rm")).logits(texts), one, atol=1e-5, rtol=1e-5)


def test_labels_of_one_class_are_refused(encoder: str) -> None:
    from heeler.policies.loading import load_tokenizer

    with pytest.raises(HeelerError, match="needs both classes"):
        LabelledTexts(["a", "b"], [True, True], load_tokenizer(encoder))


def test_bf16_learns_too(encoder: str, tmp_path: Path) -> None:
    from heeler.policies.loading import load_tokenizer

    data = LabelledTexts(TEXTS, LABELS, load_tokenizer(encoder))
    config = RewardConfig(
        base=encoder, tokens=6000, lr=3e-3, head_lr=3e-3, frozen_layers=0, lengths=(8,), threads=1, precision="bf16"
    )
    report = train_reward_model(config, data, {"test": (data, 8)}, tmp_path / "rm", show=False)
    assert report["precision"] == "bf16" and report["figures"]["test"]["accuracy"] == 1.0
