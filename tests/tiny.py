"""Tiny models and tokenizers, made on the spot: a folder that transformers loads like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from heeler.types import Samples

ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3", "gpt_neox")
SEQ2SEQ = ("t5", "t5_untied", "bart", "marian")


def tiny_config(architecture: str, vocab_size: int, hidden: int = 32, layers: int = 3) -> Any:
    import transformers

    common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": None}
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 64,
    }
    if architecture == "llama":
        return transformers.LlamaConfig(**common, **sizes, num_key_value_heads=2, tie_word_embeddings=True)
    if architecture == "qwen2":
        return transformers.Qwen2Config(**common, **sizes, num_key_value_heads=2)
    if architecture == "qwen3":
        return transformers.Qwen3Config(**common, **sizes, num_key_value_heads=2, head_dim=8)
    if architecture == "gpt_neox":
        return transformers.GPTNeoXConfig(**common, **sizes)
    if architecture == "gpt2":
        return transformers.GPT2Config(**common, n_embd=hidden, n_layer=layers, n_head=4, n_positions=64)
    raise ValueError(architecture)


def tiny_seq2seq_config(architecture: str, vocab_size: int, hidden: int = 32, layers: int = 2) -> Any:
    """T5 starts from its pad as the published ones do, BART and Marian from a token of their own."""
    import transformers

    if architecture in ("t5", "t5_untied"):
        return transformers.T5Config(
            vocab_size=vocab_size, d_model=hidden, d_kv=8, d_ff=2 * hidden, num_layers=layers, num_heads=4,
            pad_token_id=1, eos_token_id=0, decoder_start_token_id=1, dropout_rate=0.1,
            tie_word_embeddings=architecture == "t5", relative_attention_num_buckets=8,
            scale_decoder_outputs=architecture == "t5",
        )  # fmt: skip
    kind = {"bart": transformers.BartConfig, "marian": transformers.MarianConfig}[architecture]
    return kind(
        vocab_size=vocab_size, d_model=hidden, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=2 * hidden, decoder_ffn_dim=2 * hidden,
        max_position_embeddings=64, dropout=0.1, pad_token_id=1, bos_token_id=2, eos_token_id=0,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip


def word_tokenizer(words: list[str]) -> Any:
    """One token a word, split at spaces; id 0 is the end of sequence, and there is no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def byte_tokenizer() -> Any:
    """One token a byte: what every byte-level BPE class of transformers makes of a vocabulary without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def save_tiny_model(
    folder: Path,
    architecture: str = "llama",
    words: list[str] | None = None,
    hidden: int = 32,
    layers: int = 3,
    seed: int = 0,
    std: float = 0.3,
) -> str:
    """A model with random weights and its tokenizer (bytes, or one token for each of `words`); returns the path."""
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer() if words is None else word_tokenizer(words)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, len(tokenizer), hidden, layers))
    for parameter in model.parameters():  # a wide spread, so that no distribution is nearly uniform
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_tiny_seq2seq(
    folder: Path,
    architecture: str = "t5",
    words: list[str] | None = None,
    hidden: int = 32,
    std: float = 0.3,
) -> str:
    """An encoder-decoder model with random weights and its tokenizer; returns the path."""
    from transformers import AutoModelForSeq2SeqLM

    tokenizer = byte_tokenizer() if words is None else word_tokenizer(words)
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(tiny_seq2seq_config(architecture, len(tokenizer), hidden))
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    if hasattr(model, "final_logits_bias"):
        torch.nn.init.normal_(model.final_logits_bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def samples_of(
    prompts: list[Any], completions: list[str], truncated: list[bool] | None = None, **columns: list[Any]
) -> Samples:
    """Samples as a rollout gives them; every word is a token."""
    return Samples(
        prompts=prompts,
        completions=completions,
        columns=columns,
        completion_ids=[list(range(len(text.split()))) for text in completions],
        truncated=truncated or [False] * len(completions),
    )
