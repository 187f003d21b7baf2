"""GGUF files become plain transformers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from heeler.policies.loading import convert_gguf, load_causal_lm, load_tokenizer
from tests.tiny import save_tiny_model

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of queries and keys as GGUF has them: the two halves that rotate together stand in turns."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(model: Any, tokenizer: Any, file: Path) -> None:
    import gguf

    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (config.vocab_size - 1)])
    writer.add_token_scores([0.0] * config.vocab_size)  # in place of merges, of which there are none
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(config.num_hidden_layers):
        names |= {
            f"model.layers.{layer}.{theirs}.weight": f"blk.{layer}.{ours}.weight" for ours, theirs in BLOCK.items()
        }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # the embeddings once more
            kind = names[name].split(".")[-2]
            array = weight.numpy()
            writer.add_tensor(names[name], interleaved(array, heads[kind]) if kind in heads else np.array(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_a_plain_folder_and_is_parsed_once(tmp_path: Path) -> None:
    """The same weights, logits and tokens as the model that was written; what reads GGUF is as before afterwards."""
    import gguf

    source = save_tiny_model(tmp_path / "source", "llama")
    model, tokenizer = load_causal_lm(source), load_tokenizer(source)
    (tmp_path / "gguf").mkdir()
    write_gguf(model, tokenizer, tmp_path / "gguf" / "tiny.gguf")
    before = (gguf.GGUFReader, gguf.get_tensor_name_map)
    parse = gguf.GGUFReader._build_fields
    with mock.patch.object(gguf.GGUFReader, "_build_fields", autospec=True, side_effect=parse) as parsed:
        convert_gguf(tmp_path / "gguf", "tiny.gguf", tmp_path / "plain")
    assert parsed.call_count == 1
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    converted = load_causal_lm(str(tmp_path / "plain"))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], weight, atol=0, rtol=0)
    ids = torch.tensor([tokenizer("a film, and more")["input_ids"]])
    assert load_tokenizer(str(tmp_path / "plain"))("a film, and more")["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(converted(input_ids=ids).logits, model(input_ids=ids).logits)
