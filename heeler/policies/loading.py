"""Loading, converting and saving language models through transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from heeler.policies.attention import use_fast_attention
from heeler.runtime.packages import quiet_transformers, require
from heeler.runtime.progress import progress
from heeler.types import HeelerError

SCORE_KEY = "heeler_score"  # of a reward model's config: what it was trained on, gain and bias of its score


def model_folder(path: str) -> str:
    """`path` itself, or the model that a finished run folder holds (`policy/`, or `model/` of a reward model)."""
    folder = Path(path)
    if not (folder / "summary.json").is_file():
        return path
    for name in ("policy", "model"):
        if (folder / name / "config.json").is_file():
            return str(folder / name)
    raise HeelerError(
        f"{path} has no model yet: it is written at the end of a run; continue with: heeler resume {path}"
    )


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model, with a padding token whatever the model ships.

    Heeler pads with zeros that no forward pass reads, so a missing pad token, or one that equals the end of
    sequence, changes nothing; a pad is set only so that exported folders work elsewhere.
    """
    require("transformers", "lm")
    from transformers import AutoTokenizer

    quiet_transformers()
    path = model_folder(path)
    check_path("tokenizer", path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise HeelerError(_not_loadable("tokenizer", path, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str) -> Any:
    """Any causal LM that transformers' AutoModel loads, in float32, dropout off, with plain weights."""
    require("transformers", "lm")
    import torch
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    path = model_folder(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise HeelerError(_not_loadable("causal language model", path, error)) from error
    return model.eval()


def load_seq2seq_lm(path: str) -> Any:
    """Any encoder-decoder LM that transformers' AutoModelForSeq2SeqLM loads, in float32, dropout off."""
    require("transformers", "lm")
    import torch
    from transformers import AutoModelForSeq2SeqLM

    quiet_transformers()
    path = model_folder(path)
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise HeelerError(_not_loadable("encoder-decoder language model", path, error)) from error
    return model.eval()


def is_seq2seq(path: str) -> bool:
    """Whether the config at `path` is an encoder-decoder model's; False where there is no config to read."""
    require("transformers", "lm")
    from transformers import AutoConfig

    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(model_folder(path))
    except (OSError, ValueError):
        return False
    return bool(getattr(config, "is_encoder_decoder", False))


def load_language_model(path: str) -> Any:
    """The causal or the encoder-decoder LM, whichever the config says, in float32, dropout off."""
    return load_seq2seq_lm(path) if is_seq2seq(path) else load_causal_lm(path)


def decoder_start_id(model: Any) -> int:
    """The token that an encoder-decoder model's decoder reads first.

    Raises:
        HeelerError: neither the config nor the generation config says.
    """
    for config in (model.config, getattr(model, "generation_config", None)):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise HeelerError(
        f"{type(model).__name__} does not say what its decoder starts from: set decoder_start_token_id in its"
        " config.json"
    )


def most_tokens(model: Any, tokenizer: Any) -> int | None:
    """Tokens of the longest text that a model (or None) reads, special ones included; None where nothing says.

    RoBERTa and its like count positions from behind the padding's, so they read fewer tokens than they have positions.
    """
    from torch.nn import Embedding

    limits = [tokenizer.model_max_length]
    positions = (context_length(model) or 0) if model is not None else 0
    if model is not None and positions > 0:  # XLNet says -1
        of_padding = [
            module.padding_idx
            for name, module in model.named_modules()
            if isinstance(module, Embedding) and "position" in name and module.num_embeddings == positions
        ]
        limits.append(positions - max((i + 1 for i in of_padding if i is not None), default=0))
    limit = min(limits)
    return int(limit) if limit < 10**9 else None  # a tokenizer that knows no limit says 10 to the 30


def load_classifier(path: str, num_labels: int | None = None) -> Any:
    """A sequence classifier in float32, dropout off.

    Args:
        path: folder or hub id.
        num_labels: of the head of a model that is about to be trained: where the folder has no such head, it starts
            from random weights. None loads a trained classifier with its own head.

    Raises:
        HeelerError: it cannot be loaded, or a weight of a trained classifier is missing.
    """
    require("transformers", "lm")
    import torch
    from transformers import AutoModelForSequenceClassification

    quiet_transformers()
    path = model_folder(path)
    options: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError) as error:
        raise HeelerError(_not_loadable("sequence classifier", path, error)) from error
    missing = sorted(found["missing_keys"])
    if missing and num_labels is None:
        raise HeelerError(
            f"{path!r} is not a trained sequence classifier: its files have no {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, so its scores would be random; give a"
            " reward model's folder, or train one with: heeler reward"
        )
    use_fast_attention(model)
    return model.eval()


def special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise HeelerError("the tokenizer changes a text's own tokens where it adds special ones: it cannot be used here")


def check_path(kind: str, path: str) -> None:
    """A name that can only be a path is not looked for on the hub."""
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().exists():
        raise HeelerError(f"cannot load the {kind} {path!r}: there is no such folder; give a local folder or a hub id")


def _not_loadable(kind: str, path: str, error: Exception) -> str:
    where = (
        "the folder exists, but transformers could not read it"
        if Path(path).exists()
        else ("there is no such folder, and no such model could be had from the hub")
    )
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return f"cannot load the {kind} {path!r}: {where} ({reason}); give a local folder or a hub id"


def end_of_sequence_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those of the generation config."""
    ids: set[int] = set()
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    if configured is not None:
        ids.update([configured] if isinstance(configured, int) else configured)
    return sorted(ids)


def context_length(model: Any) -> int | None:
    """Tokens that the model's positions allow, or None where its config does not say."""
    length = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    return int(length) if length else None


def prompt_room(model: Any, max_new_tokens: int, *, value_after: bool = False) -> int | None:
    """Tokens that a prompt may have beside a completion of `max_new_tokens`, or None where nothing limits them.

    An encoder-decoder model reads prompts and writes completions at positions of their own, and T5 has none to
    run out of. With `value_after` the decoder reads the completion's last token too, for the value after it.

    Raises:
        HeelerError: the completion does not fit the decoder's positions.
    """
    if not model.config.is_encoder_decoder:
        context = context_length(model)
        return None if context is None else context - max_new_tokens
    source, target = seq2seq_lengths(model)
    read = max_new_tokens + int(value_after)  # the decoder's start, and all tokens but the last
    if target is not None and read > target:
        raise HeelerError(
            f"completions of up to {max_new_tokens} tokens take {read} positions of the decoder, which has {target}:"
            " allow fewer new tokens"
        )
    return source


def seq2seq_lengths(model: Any) -> tuple[int | None, int | None]:
    """Tokens that encoder and decoder have positions for, None where they are not limited."""
    config = model.config
    both = getattr(config, "max_position_embeddings", None)
    return (
        getattr(config, "max_encoder_position_embeddings", both),
        getattr(config, "max_decoder_position_embeddings", both),
    )


@contextmanager
def _gguf_read_once(bar: Any) -> Iterator[None]:
    """Keep the parsed file and the table of names, which transformers makes anew for each part and each weight.

    The bar gets the number of tensors when the file is parsed, and each tensor again when it is de-quantised, in place
    of the bar that transformers draws there.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as utils

    made = gguf.GGUFReader

    def read(*args: Any, **options: Any) -> Any:
        reader = made(*args, **options)
        bar.update(len(reader.tensors))
        return reader

    def counted(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        for tensor in tensors:
            yield tensor
            bar.update(1)

    replaced = [
        (gguf, "GGUFReader", cache(read)),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        (utils, "tqdm", counted),
    ]
    whole = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    try:
        for module, name, ours in replaced:
            setattr(module, name, ours)
        yield
    finally:
        for module, name, theirs in whole:
            setattr(module, name, theirs)


def _count_gguf_tensors(file: Path) -> int:
    """What the header says: after 4 bytes of magic and 4 of version."""
    with file.open("rb") as opened:
        return int.from_bytes(opened.read(16)[8:], "little")


def convert_gguf(folder: Path, gguf_file: str, destination: Path, show: bool = False) -> None:
    """De-quantise a GGUF file into a plain transformers folder, written aside and renamed.

    `show` draws a bar that counts each tensor three times: parsed, de-quantised, written.
    """
    import shutil

    require("gguf", "demo")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    count = _count_gguf_tensors(folder / gguf_file)
    with progress(3 * count, "converting", "tensor", show=show) as bar:
        with _gguf_read_once(bar):
            loaded = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=gguf_file, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=gguf_file)
        config = type(loaded.config).from_dict(loaded.config.to_dict())
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.tie_weights()
        aside = destination.with_name(destination.name + ".partial")
        shutil.rmtree(aside, ignore_errors=True)
        plain.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(destination, ignore_errors=True)
        aside.rename(destination)
        bar.update(count)
