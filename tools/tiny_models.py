"""Tiny random models of every causal language-model family that transformers knows: `tiny_model(family)`.

Every size of a family's default configuration is cut down by its name; `FIXES` holds what that breaks.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 64
FAMILIES: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)  # model_type -> class

_SIZES = {
    0: """layer_types mlp_layer_types layers_block_type no_rope_layers moe_layers attn_layers indexer_types
        activation_sparsity_pattern layer_rope_theta attention_layers full_attn_idxs hybrid_layer_ids
        num_attention_heads_per_layer cross_attention_layers intermediate_layers_indices per_layer_config
        qk_head_dim architectures transformers_version dtype""",  # not passed: follow from the sizes
    VOCABULARY: """vocab_size vocab_size_per_layer_input decoder_vocab_size encoder_hash_byte_group_vocab
        shape_vocab_size pronunciation_vocab_size audio_vocab_size codebook_size ngram_vocab_size_base""",
    256: """max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length
        original_max_position_embeddings max_target_positions max_source_positions image_seq_length""",
    32: """hidden_size d_model n_embd embed_dim hidden_dim emb_dim embedding_dim embedding_size lru_width
        word_embed_proj_dim attention_hidden_size input_embedding_size output_embedding_size ple_embed_dim
        hidden_size_global pronunciation_embed_dim shape_embed_dim vision_output_dim out_hidden_size
        backbone_hidden_size router_hidden_size input_size projector_input_dim projector_output_dim
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner
        feed_forward_size moe_intermediate_size shared_expert_intermediate_size mlp_dim prompt_mid_dim
        shared_experts_intermediate_size shared_intermediate_size intermediate_size_mlp adapter_in_dim
        expert_ffn_hidden_size dense_intermediate_size moe_shared_expert_intermediate_size adapter_out_dim
        sliding_window sliding_window_size""",
    16: """head_dim global_head_dim v_head_dim swa_head_dim qk_nope_head_dim q_lora_rank kv_lora_rank
        kv_channels index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim dim_head d_head
        attention_head_size attention_head_dim mamba_chunk_size chunk_size query_pre_attn_scalar laurel_rank
        hidden_size_per_layer_input state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank
        o_lora_rank hc_lowrank d_rel rel_extent patch_size image_size adapter_rank index_topk window_size
        block_size local_attn_chunk_length lsh_attn_chunk_length""",
    8: "qk_rope_head_dim rotary_dim mamba_d_head mamba_head_dim",
    4: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_blocks num_experts n_routed_experts num_local_experts moe_num_experts
        zero_expert_num num_codebooks""",
    2: """num_layers_per_stack depth num_global_layers num_attention_heads n_head n_heads num_heads
        attention_heads decoder_attention_heads encoder_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token
        moe_k moe_topk top_k_experts swa_num_attention_heads swa_num_key_value_heads linear_num_key_heads
        linear_num_value_heads linear_num_heads index_n_heads num_global_key_value_heads""",
    1: """n_group topk_group num_expert_group n_groups mamba_n_groups num_kv_shared_layers n_shared_experts
        first_k_dense_replace num_dense_layers num_nextn_predict_layers num_shared_experts""",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}

# Settings that act between hidden states and logits, and the spread of weights, where a family has them: far
# from 1 and from 0, so that errors show.
ACTING = {
    "logit_scale": 0.25,
    "output_multiplier": 0.25,
    "lm_head_multiplier": 0.25,
    "logits_scaling": 4.0,
    "logits_mup_width_multiplier": 4.0,
    "dim_model_base": 8,  # MiniCPM3: logits_scaling is hidden_size / dim_model_base
    "final_logit_softcapping": 0.5,
    "logits_soft_cap": 0.5,
    "output_logit_soft_cap": 0.5,
    "unpadded_vocab_size": VOCABULARY - 4,
    "initializer_range": 0.3,  # layers matter, so that what padding does to them shows
    "init_std": 0.3,
}

_LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
FIXES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": 4},
    "codegen": {"n_head": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"head_dim": 16, "partial_rotary_factor": 0.5, "rope_parameters": None},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        f"swa_{name}": size
        for name, size in {
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "head_dim": 24,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        }.items()
    },
    "gemma3": {"text_config": {"final_logit_softcapping": None}},  # it does not apply one
    "gemma3n_text": {"intermediate_size": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": _LINEAR_AND_FULL},
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _LINEAR_AND_FULL},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "minimax": {"layer_types": _LINEAR_AND_FULL},  # as in MiniMax-Text-01, whose first layer is linear
    "mpt": {"logit_scale": None},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mimo_v2_flash": {"num_attention_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": _INDEXER,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_dt_rank": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "mamba_ngroups": 1,
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 32,
        "num_query_groups": 2,
    },
}


def model_class(family: str) -> Any:
    """The class of transformers that AutoModelForCausalLM takes for a model_type."""
    return getattr(transformers, FAMILIES[family])


def tiny_config(family: str, **settings: Any) -> Any:
    """The family's default configuration with small sizes, then `settings`."""
    kind = model_class(family).config_class
    return kind(**{**_shrunk(kind().to_dict(), kind.model_type), **settings})


def tiny_model(family: str, seed: int = 0, **settings: Any) -> Any:
    """A model of the family with small sizes and random weights, in float32 and evaluation mode.

    Its logits are spread over a few nats, and a bias of its head is not zero. settings: of its configuration.
    """
    torch.manual_seed(seed)
    model = model_class(family)(tiny_config(family, **settings)).eval()
    output = model.get_output_embeddings()
    with torch.no_grad():
        if isinstance(getattr(output, "weight", None), torch.Tensor):
            output.weight.normal_(std=0.5)
        if isinstance(getattr(output, "bias", None), torch.Tensor):
            output.bias.normal_()
    return model


def _shrunk(config: dict[str, Any], family: str) -> dict[str, Any]:
    small: dict[str, Any] = {}
    mla = "qk_rope_head_dim" in config  # where the configuration computes head_dim
    for name, value in config.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if _SIZE_OF.get(name) == 0 or name.startswith("_") or (mla and name == "head_dim"):
            continue
        if isinstance(value, dict) and name.endswith("config"):
            small[name] = _shrunk(value, value.get("model_type", ""))
        elif name.endswith(("token_id", "token_index")):
            usual = (
                0
                if name == "pad_token_id"
                else 1
                if "eos" in name or "bos" in name or "start" in name
                else VOCABULARY
            )
            small[name] = value if value is None else usual  # an image's token is never sampled
        elif name in ACTING:
            small[name] = ACTING[name]
        elif name == "head_dim" and value is None:
            small[name] = 16
        else:
            small[name] = min(value, _SIZE_OF.get(name, value)) if whole else value
    for name, value in FIXES.get(family, {}).items():
        small[name] = {**small[name], **value} if isinstance(small.get(name), dict) and value else value
    return small
