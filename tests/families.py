"""Tiny models of the library's families: two to four blocks of width 32 with random weights.

``FAMILIES[name]`` is (model class, config class, what differs from the library's defaults). Each family has something
that no other has: another linear class, attention, router, block order, or state that blocks share.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny import make_tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.calibration.activations import capture
from optima.calibration.fisher import fisher_weights, label_gradient
from optima.calibration.weights import FisherWeights
from optima.models.blocks import Stack, find_stacks, select_linears
from optima.models.forward import arguments

VOCAB = 101
Family = tuple[str, str, dict[str, Any]]
# fmt: off
V = {"vocab_size": VOCAB}
SMALL = V | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
H = {"hidden_size": 32, "num_attention_heads": 4}
BERT = SMALL | H | {"intermediate_size": 48, "num_hidden_layers": 2}
LLAMA = BERT | {"num_key_value_heads": 2}
HEAD = LLAMA | {"head_dim": 8}
GEMMA = HEAD | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
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
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
T5 = V | {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = SMALL | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}

FAMILIES: dict[str, Family] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEAD),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "opt": ("OPTForCausalLM", "OPTConfig", BERT | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        V | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "bloom": ("BloomForCausalLM", "BloomConfig", V | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptForCausalLM", "MptConfig", V | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    # Encoders.
    "bert": ("BertModel", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "modernbert": ("ModernBertModel", "ModernBertConfig", BERT | {"local_attention": 8}),
    "t5_encoder": ("T5EncoderModel", "T5Config", T5),
    "xlnet": ("XLNetLMHeadModel", "XLNetConfig", V | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}),
    # Mixtures of experts.
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | LOCAL),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", HEAD | EXPERTS | {"mlp_only_layers": [0]}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA),
    "llama4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        HEAD | LOCAL | {"intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", LLAMA | LOCAL),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", HEAD | LOCAL | {"sliding_window": 8}),
    "gemma4_moe": (
        "Gemma4ForCausalLM", "Gemma4TextConfig",
        GEMMA | EXPERTS | {
            "global_head_dim": 8, "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2,
        },
    ),
    # A block needs more of the last one than hidden states.
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", MLA | DSA | {"num_hidden_layers": 4}),
    "gemma3n": (
        "Gemma3nForCausalLM", "Gemma3nTextConfig",
        SHARED_KV | {"laurel_rank": 4, "altup_num_inputs": 4, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", SHARED_KV | {"global_head_dim": 8}),
    # Several hidden states for each token.
    "deepseek_v4": (
        "DeepseekV4ForCausalLM", "DeepseekV4Config",
        SMALL | H | DSA | {
            "num_hidden_layers": 4, "head_dim": 16, "partial_rotary_factor": 0.25, "q_lora_rank": 16, "hc_mult": 3,
            "hc_sinkhorn_iters": 3, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "layer_types": [
                f"{each}_attention" for each in ("sliding", "compressed_sparse", "heavily_compressed", "sliding")
            ],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "sliding_window": 8, "o_groups": 2, "o_lora_rank": 8,
        },
    ),
    # Blocks of several kinds in one stack.
    "qwen3_next": (
        "Qwen3NextForCausalLM", "Qwen3NextConfig",
        HEAD | EXPERTS | {
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
            "shared_expert_intermediate_size": 16,
        },
    ),
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", HEAD | MAMBA | {"mamba_d_ssm": 64}),
    "nemotron_h": (
        "NemotronHForCausalLM", "NemotronHConfig",
        HEAD | ROUTED | {
            "num_hidden_layers": 4, "layers_block_type": ["mamba", "attention", "moe", "mlp"], "mamba_num_heads": 8,
            "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", V | {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}),
    # Two stacks.
    "t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"decoder_start_token_id": 0}),
    "switch": (  # its experts are modules, of which a batch may not reach some
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        T5 | {
            "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
            "num_experts": 4, "decoder_start_token_id": 0,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "t5gemma": (
        "T5GemmaForConditionalGeneration", "T5GemmaConfig",
        V | {"encoder": dict(GEMMA), "decoder": GEMMA | {"cross_attention_hidden_size": 32}, "pad_token_id": 0},
    ),
    # The language part is pruned.
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 99},
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
# What text alone cannot prune, and what the error says of it.
REFUSED: dict[str, tuple[Family, str]] = {
    "whisper": (
        (
            "WhisperForConditionalGeneration", "WhisperConfig",
            {key: value for key, value in BART.items() if key != "max_position_embeddings"}
            | {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16},
        ),
        "WhisperForConditionalGeneration reads input_features",
    ),
    "albert": (("AlbertModel", "AlbertConfig", BERT | {"embedding_size": 16}), "AlbertModel does not call each of"),
    "mllama": (
        (
            "MllamaForCausalLM", "MllamaTextConfig",
            LLAMA | {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        ),
        r"not called: model\.layers\.1, model\.layers\.3\)",
    ),
    "zamba2": (  # blocks that share weights
        (
            "Zamba2ForCausalLM", "Zamba2Config",
            BERT | MAMBA | {
                "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8,
                "mamba_ngroups": 1, "chunk_size": 8, "num_mem_blocks": 1, "adapter_rank": 4, "num_key_value_heads": 4,
            },
        ),
        "--ignore 'shared_transformer",
    ),
    "rwkv": (  # divides hidden states between blocks
        ("RwkvForCausalLM", "RwkvConfig", V | {"hidden_size": 32, "num_hidden_layers": 4, "rescale_every": 2}),
        r"rwkv\.blocks\.2 does not give what it gives inside RwkvForCausalLM",
    ),
}
# fmt: on


def build(family: str, **changes: object) -> PreTrainedModel:
    """A model of ``family``, with ``changes`` of its configuration; always the same weights."""
    name, config, arguments = FAMILIES[family] if family in FAMILIES else REFUSED[family][0]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, name)(getattr(transformers, config)(**arguments | changes)).eval()
    return model


def make_ids(samples: int = 5, length: int = 16) -> Tensor:
    """Random token ids, (samples, length)."""
    return torch.randint(3, VOCAB, (samples, length), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    """Logits, or the last hidden states, of a few sequences."""
    with torch.no_grad():
        result = model(**arguments(model, make_ids(2, 16) if batch is None else batch))
    return result.logits if "logits" in result else result.last_hidden_state


def gradient_at(model: nn.Module, module: nn.Module, tokens_NL: Tensor) -> Tensor:
    """At the outputs of a module, by autograd through the whole model with the labels of seed 3, (T, E)."""
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, args, output: seen.append(output) or output.retain_grad())
    drawn_T = torch.rand(tokens_NL.numel(), generator=torch.Generator().manual_seed(3))
    logits_TV = model(input_ids=tokens_NL).logits.flatten(0, 1)
    logits_TV.backward(label_gradient(logits_TV.detach(), drawn_T))
    assert seen[0].grad is not None
    return seen[0].grad.flatten(0, 1)


def stack_of(model: nn.Module) -> Stack:
    """The only one of a model, with all of its linears."""
    (stack,) = select_linears(find_stacks(model), [".*"], [])
    return stack


def fisher_of(model: nn.Module, batch_size: int = 4, fraction: float = 1.0) -> tuple[FisherWeights, Tensor]:
    """The Fisher weights of eight sequences, and these."""
    stack, tokens_NL = stack_of(model), make_tokens(8, 16)
    acts = capture(model, stack, list(tokens_NL.split(batch_size)), whole=True)
    return fisher_weights(model, stack, acts, seed=3, share=fraction), tokens_NL  # type: ignore[arg-type]
