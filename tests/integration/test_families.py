"""Every family of the library that we name: prune, save, reload, and compare with the model in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import load_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima import Recipe, prune
from optima.calibration.capture import capture_block_inputs
from optima.errors import ModelError
from optima.models.source import find_source
from optima.models.stacks import find_blocks
from optima.plan import Plan, make_plan

VOCAB = 101
SMALL = {"vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = SMALL | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = LLAMA | {"num_key_value_heads": None}
BERT.pop("num_key_value_heads")
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCAB,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
OPT = SMALL | {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 16,
}
GEMMA = LLAMA | {"head_dim": 8, "sliding_window": 8}

FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "falcon-alibi": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", LLAMA),
    "bert": ("BertModel", "BertConfig", BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 64},
    ),
}


def build(family: str) -> PreTrainedModel:
    model_class, config_class, arguments = FAMILIES[family]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**arguments)).eval()


def tokens(samples: int = 5, length: int = 16) -> Tensor:
    return torch.randint(3, VOCAB, (samples, length), generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result = model(input_ids=tokens(2, 16))
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["unstructured", "2:4"])
def test_prune_save_reload(family: str, options: dict[str, object], tmp_path: Path) -> None:
    model = build(family)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = prune(model, Recipe(batch_size=2, **options), output_dir=tmp_path / "out", calibration=tokens())  # type: ignore[arg-type]

    pruned_names = {record.name for record in report.linears}
    assert pruned_names == {linear.name for block in find_blocks(model) for linear in block.linears}
    assert report.rows_not_converged == 0
    for block in find_blocks(model):
        for linear in block.linears:
            check_mask(linear.weight_OD, options)
    for record in report.linears:
        assert record.error <= record.error_mask * (1 + 1e-6) + 1e-12
        assert record.sparsity == pytest.approx(0.5, abs=0.02)

    reloaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(reloaded), outputs(model))
    for name, tensor in model.state_dict().items():
        if name.removesuffix(".weight") not in pruned_names:
            assert torch.equal(tensor, dense[name]), f"{name} is not a target and changed"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "report.json", "report.md", "recipe.yaml", "model.safetensors.index.json"} <= files
    assert not list(tmp_path.glob(".out*"))


def check_mask(weight_OD: Tensor, options: dict[str, object]) -> None:
    zeros = weight_OD == 0
    if "pattern" in options:
        assert (zeros.reshape(-1, 4).sum(dim=1) == 2).all()
    else:
        assert (zeros.sum(dim=1) == round(0.5 * weight_OD.shape[1])).all()


def test_block_inputs_are_exact(family: str) -> None:
    """Carrying the inputs from block to block gives bit for bit what the model's own forward pass gives."""
    model = build(family)
    blocks = find_blocks(model)
    batches = list(tokens().split(2))
    expected: list[Tensor] = []
    hook: Callable[..., None] = lambda module, args, output: expected.append(  # noqa: E731
        output[0] if isinstance(output, tuple) else output
    )
    handle = blocks[-1].module.register_forward_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch)
        handle.remove()
        store = capture_block_inputs(model, blocks, batches)
        for block in blocks:
            store.hidden = [store.run(block, batch, torch.device("cpu")) for batch in range(len(batches))]
    for hidden, want in zip(store.hidden, expected, strict=True):
        assert torch.equal(hidden, want)


def test_plan_needs_no_weights(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    plan = make_plan(find_source(str(tmp_path)), Recipe(max_seq_length=16))
    assert plan.num_parameters == sum(p.numel() for p in model.parameters())
    planned = {linear.name: linear.shape for block in plan.blocks for linear in block.linears}
    assert planned == {linear.name: linear.shape for block in find_blocks(model) for linear in block.linears}


def test_plan_counts_what_is_computed(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)

    def planned(**options: Any) -> Plan:
        return make_plan(find_source(str(tmp_path)), Recipe(max_seq_length=16, **options))

    solvers = ["none", "cholesky", "low-rank-cg", "shared-inverse-cg"]
    assert sorted(solvers, key=lambda solver: planned(solver=solver).operations) == solvers
    assert planned().operations == planned(solver="low-rank-cg").operations
    assert planned(max_change=0.5).operations == planned(solver="bounded").operations > planned().operations
    assert planned(selector="optima").operations > planned(selector="sparsegpt").operations > planned().operations
    assert planned(selector="alps").memory_bytes >= planned(selector="optima").memory_bytes >= planned().memory_bytes


@pytest.mark.parametrize("options", [{"selector": "sparsegpt"}, {"selector": "magnitude"}, {"solver": "cholesky"}])
def test_selectors_and_solvers_end_to_end(options: dict[str, str]) -> None:
    report = prune(build("llama"), Recipe(sparsity=0.5, **options), calibration=tokens())  # type: ignore[arg-type]
    assert report.rows_not_converged == 0
    assert all(record.error <= record.error_selector * (1 + 1e-6) for record in report.linears)


@pytest.mark.parametrize("solver", ["auto", "bounded"])
def test_max_change_is_held(solver: str) -> None:
    model, dense = build("llama"), build("llama")
    report = prune(model, Recipe(sparsity=0.5, solver=solver, max_change=0.2), calibration=tokens())
    assert report.rows_not_converged == 0
    for sparse_block, block in zip(find_blocks(model), find_blocks(dense), strict=True):
        for sparse, linear in zip(sparse_block.linears, block.linears, strict=True):
            weight_OD, result_OD = linear.weight_OD, sparse.weight_OD
            moved_OD = (result_OD - weight_OD).abs() * (result_OD != 0)
            assert (moved_OD <= 0.2 * weight_OD.square().mean(dim=1, keepdim=True).sqrt() * (1 + 1e-5)).all()


def test_bfloat16_and_sharing_of_tied_weights(tmp_path: Path) -> None:
    model = build("gemma3").to(torch.bfloat16)
    assert model.config.tie_word_embeddings
    embedding = model.get_input_embeddings().weight.clone()
    prune(model, Recipe(sparsity=0.5), output_dir=tmp_path / "out", calibration=tokens())
    saved = load_weights(tmp_path / "out")
    assert "lm_head.weight" not in saved
    assert torch.equal(saved["model.embed_tokens.weight"], embedding)
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_reloads_where_optima_is_not_installed(tmp_path: Path) -> None:
    model = build("llama")
    prune(model, Recipe(sparsity=0.5), output_dir=tmp_path / "out", calibration=tokens())
    script = (
        "import sys; sys.modules['optima'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"torch.save(model(input_ids=torch.tensor({tokens(2, 16).tolist()})).logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), outputs(model), atol=1e-5)


def test_models_that_share_one_block_are_refused() -> None:
    config = transformers.AlbertConfig(
        vocab_size=VOCAB, embedding_size=16, hidden_size=32, intermediate_size=48, num_attention_heads=4
    )
    with pytest.raises(ModelError, match="exactly once"):
        prune(transformers.AlbertModel(config).eval(), Recipe(sparsity=0.5), calibration=tokens())


def test_same_seed_same_bits() -> None:
    first, second = build("llama"), build("llama")
    prune(first, Recipe(sparsity=0.6), calibration=tokens())
    prune(second, Recipe(sparsity=0.6), calibration=tokens())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_swaps_refine_a_selector_and_are_reported(pattern: str) -> None:
    errors = {}
    for refine in ("none", "swaps"):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
        recipe = Recipe(pattern=[pattern], selector="wanda", refine=refine, refine_candidates=0, targets=["layers.0"])
        tokens = torch.randint(0, VOCAB, (8, 32), generator=torch.Generator().manual_seed(1))
        report = prune(model, recipe, calibration=tokens)
        errors[refine] = [linear.error for linear in report.linears]
        for linear in report.linears:
            refined = refine == "swaps"
            assert linear.rows_swap_optimal == (linear.rows if refined else None)
            assert (linear.swaps is not None) == refined
    assert sum(errors["swaps"]) < 0.97 * sum(errors["none"])
