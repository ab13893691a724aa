"""Tiny models of the library's families: a few blocks of width 32 with random weights.

``FAMILIES[name]`` is (model class, config class, what differs from the library's defaults).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny import make_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.calibration.activations import capture
from optima.calibration.fisher import fisher_weights
from optima.calibration.weights import FisherWeights
from optima.models.blocks import Stack, find_stacks, select_linears

VOCAB = 101
V = {"vocab_size": VOCAB}
SMALL = V | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
H = {"hidden_size": 32, "num_attention_heads": 4}
BERT = SMALL | H | {"intermediate_size": 48, "num_hidden_layers": 3}
LLAMA = BERT | {"num_key_value_heads": 2}
HEAD = LLAMA | {"head_dim": 8}
# fmt: off
GPT2 = V | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
FALCON = SMALL | H | {"num_hidden_layers": 2}
GEMMA = HEAD | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SHARED_KV = GEMMA | {
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
}
MLA = LLAMA | ROUTED | {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DSA = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
}
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
T5 = V | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEAD),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "opt": ("OPTForCausalLM", "OPTConfig", FALCON | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "falcon-alibi": (
        "FalconForCausalLM", "FalconConfig", FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", V | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", LLAMA),
    "gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT2),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", LLAMA),
    "mpt": ("MptForCausalLM", "MptConfig", V | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    # Encoders.
    "bert": ("BertModel", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "distilbert": (
        "DistilBertModel", "DistilBertConfig",
        V | {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "modernbert": ("ModernBertModel", "ModernBertConfig", BERT | {"local_attention": 8}),
    "electra": ("ElectraModel", "ElectraConfig", BERT | {"embedding_size": 16}),
    "deberta_v2": ("DebertaV2Model", "DebertaV2Config", BERT | {"relative_attention": True, "pos_att_type": ["p2c"]}),
    "t5_encoder": ("T5EncoderModel", "T5Config", T5),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", V | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    # Mixtures of experts.
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | LOCAL),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", HEAD | EXPERTS | {"mlp_only_layers": [0]}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", MLA),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", HEAD | ROUTED),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        HEAD | LOCAL | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", LLAMA | LOCAL),
    "hunyuan_moe": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", HEAD | {"num_experts": 4, "moe_topk": 2}),
    "afmoe": (
        "AfmoeForCausalLM", "AfmoeConfig",
        HEAD | EXPERTS | {"num_dense_layers": 1, "sliding_window": 8, "num_shared_experts": 1},
    ),
    # A block is given what the last one returned besides hidden states.
    "glm_moe_dsa": (
        "GlmMoeDsaForCausalLM", "GlmMoeDsaConfig",
        MLA | DSA | {"num_hidden_layers": 4},
    ),
    "zaya": ("ZayaForCausalLM", "ZayaConfig", HEAD | EXPERTS | {"num_experts_per_tok": 1, "router_hidden_size": 8}),
    # Several streams of hidden states for each token.
    "deepseek_v4": (
        "DeepseekV4ForCausalLM", "DeepseekV4Config",
        SMALL | H | {
            "num_hidden_layers": 4, "head_dim": 16, "partial_rotary_factor": 0.25, "q_lora_rank": 16, "hc_mult": 3,
            "hc_sinkhorn_iters": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "layer_types": [
                f"{each}_attention" for each in ("sliding", "compressed_sparse", "heavily_compressed", "sliding")
            ],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "sliding_window": 8, "o_groups": 2, "o_lora_rank": 8,
        } | DSA,
    ),
    "hy_v4": ("HYV4ForCausalLM", "HYV4Config", MLA | DSA | {"num_hidden_layers": 4, "hc_mult": 3}),
    # A table of n-grams inside a block, which stays in main memory.
    "qwen4_exp": (
        "Qwen4ExpForCausalLM", "Qwen4ExpTextConfig",
        HEAD | EXPERTS | DELTA | {
            "shared_expert_intermediate_size": 16, "hc_count": 3, "hc_lowrank": 8, "ple_layer_ids": [1],
            "heads_per_ngram": 2, "ngram_vocab_size_base": 500, "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
            "indexer_budget": 8, "indexer_compress_ratio": 4,
        },
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", HEAD | LOCAL | {"sliding_window": 8}),
    "granite_moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", LLAMA | LOCAL),
    "gemma4_moe": (
        "Gemma4ForCausalLM", "Gemma4TextConfig",
        GEMMA | EXPERTS | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "global_head_dim": 8,
            "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2,
        },
    ),
    # Blocks of several kinds in one stack.
    "jamba": (
        "JambaForCausalLM", "JambaConfig",
        LLAMA | {
            "num_hidden_layers": 4, "num_experts": 4, "attn_layer_offset": 1, "attn_layer_period": 2,
            "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False,
        },
    ),
    "olmo_hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", LLAMA | DELTA),
    "qwen3_next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig", HEAD | EXPERTS | DELTA | {"shared_expert_intermediate_size": 16},
    ),
    "bamba": ("BambaForCausalLM", "BambaConfig", LLAMA | MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", HEAD | MAMBA | {"mamba_d_ssm": 64}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", LLAMA | {"layer_types": ["conv", "full_attention", "conv"]}),
    "nemotron_h": (
        "NemotronHForCausalLM", "NemotronHConfig",
        HEAD | ROUTED | {
            "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "moe", "mlp"], "mamba_num_heads": 8,
            "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "minimax": (
        "MiniMaxForCausalLM", "MiniMaxConfig", HEAD | LOCAL | {"layer_types": DELTA["layer_types"], "block_size": 8},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", V | {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", V | {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        HEAD | {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    ),
    # Blocks that hand each other more than hidden states.
    "gemma3n": (
        "Gemma3nForCausalLM", "Gemma3nTextConfig",
        SHARED_KV | {"laurel_rank": 4, "altup_num_inputs": 4, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", SHARED_KV | {"global_head_dim": 8}),
}
# Two stacks.
BART = SMALL | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
}
FAMILIES |= {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"decoder_start_token_id": 0}),
    "switch": (  # its experts are modules, of which a batch may not reach some
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        T5 | {
            "num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
            "num_experts": 4, "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5gemma": (
        "T5GemmaForConditionalGeneration", "T5GemmaConfig",
        V | {"encoder": dict(GEMMA), "decoder": GEMMA | {"cross_attention_hidden_size": 32}, "pad_token_id": 0},
    ),
}
# The language part is pruned.
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}
FAMILIES |= {
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 99},
    ),
    "llava": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {
            "text_config": LLAMA | {"model_type": "llama"}, "image_token_index": 99,
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        },
    ),
    # Reads keys and values that several blocks leave at one place.
    "mistral_large4": (
        "MistralLarge4ForConditionalGeneration", "MistralLarge4Config",
        {
            "text_config": MLA | DSA | {
                "num_hidden_layers": 4, "kv_source_layers": [0, 0, 2, 2], "no_rope_layers": [1] * 4,
            },
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8}, "image_token_index": 99,
        },
    ),
    # What sees is larger than what reads.
    "git": ("GitForCausalLM", "GitConfig", BERT | {"vision_config": VISION | {"num_hidden_layers": 8}}),
    # Its head is that of the language model inside.
    "nemotron_h_omni": (
        "NemotronH_Omni_Reasoning_V3", "NemotronH_Omni_Reasoning_V3_Config",
        {
            "text_config": FAMILIES["nemotron_h"][2] | {"model_type": "nemotron_h"},
            "vision_config": VISION | {"model_type": "radio", "max_img_size": 16, "video_temporal_patch_size": 2},
            "vision_hidden_size": 32, "projector_hidden_size": 32, "image_token_id": 99, "video_token_id": 98,
            "audio_config": None,
        },
    ),
    # Several streams of hidden states for each token.
    "glm5_next": (
        "Glm5NextForConditionalGeneration", "Glm5NextConfig",
        {
            "text_config": MLA | DSA | {
                "num_hidden_layers": 4, "hc_mult": 3, "hc_sinkhorn_iters": 3, "qk_rope_head_dim": 0, "index_kpool": 4,
                "linear_head_dim": 8, "linear_num_heads": 4,
            },
            "vision_config": VISION | {"depth": 2, "num_heads": 4, "out_hidden_size": 32}, "image_token_id": 99,
        },
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
        {
            "text_config": LLAMA | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {
                "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "mlp_ratio": 2,
            },
            "image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96,
        },
    ),
}
# It reads sounds, which text does not tell of.
WHISPER = (
    "WhisperForConditionalGeneration", "WhisperConfig",
    {key: value for key, value in BART.items() if key != "max_position_embeddings"}
    | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16},
)
# What cannot be pruned, and what is said of it.
REFUSED: dict[str, tuple[tuple[str, str, dict[str, Any]], str]] = {
    "whisper": (WHISPER, "WhisperForConditionalGeneration reads input_features, not text: from Python, give prune"),
    "clip": (
        ("CLIPModel", "CLIPConfig", {"text_config": BERT, "vision_config": VISION, "projection_dim": 16}),
        "CLIPModel reads text with images or sounds, not text alone: from Python, give prune",
    ),
    "albert": (
        ("AlbertModel", "AlbertConfig", BERT | {"embedding_size": 16}), "AlbertModel does not call each of .* once",
    ),
    "mllama": (
        (
            "MllamaForCausalLM", "MllamaTextConfig",
            LLAMA | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        ),
        r"not called: model\.layers\.1, model\.layers\.3\)\. If some of them read images or sounds, give prune",
    ),
    "zamba2": (
        (
            "Zamba2ForCausalLM", "Zamba2Config",
            BERT | MAMBA | {
                "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8,
                "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4, "num_key_value_heads": 4,
            },
        ),
        r"are one weight.*--ignore 'shared_transformer",
    ),
    # Divides hidden states between blocks.
    "rwkv-rescaled": (
        ("RwkvForCausalLM", "RwkvConfig", V | {"hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2}),
        r"rwkv\.blocks\.2 does not give what it gives inside RwkvForCausalLM",
    ),
}
# fmt: on


def build(family: str, **changes: object) -> PreTrainedModel:
    """A model of ``family``, with ``changes`` of its configuration; always the same weights."""
    kind, config, arguments = FAMILIES[family] if family in FAMILIES else REFUSED[family][0]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, kind)(getattr(transformers, config)(**arguments | changes)).eval()
    return model


def make_ids(samples: int = 5, length: int = 16) -> Tensor:
    """Random token ids, (samples, length)."""
    return torch.randint(3, VOCAB, (samples, length), generator=torch.Generator().manual_seed(1))


def stack_of(model: nn.Module) -> Stack:
    """The only one of a model, with all of its linears."""
    (stack,) = select_linears(find_stacks(model), [".*"], [])
    return stack


def sweep(model: nn.Module, batch_size: int = 4, share: float = 1.0) -> tuple[FisherWeights, Tensor]:
    """The weights by the loss of eight sequences, and these."""
    stack, tokens_NL = stack_of(model), make_tokens(8, 16)
    batches = list(tokens_NL.split(batch_size))
    acts = capture(model, stack, batches, whole=True)
    found = fisher_weights(model, stack, acts, seed=3, share=share)  # type: ignore[arg-type]
    return found, tokens_NL
