"""Mask-preserving fine-tuning: the mask stays as it is, bit for bit, and the rest moves."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from pathlib import Path

import families
import pytest
import torch
from tiny import blocks_of, make_llama, make_tokens
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import optima
from optima.errors import ModelError, RecipeError


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def sparse_llama(sparsity: float = 0.6) -> nn.Module:
    """A tiny model, random weights of whose linears inside the blocks are zero."""
    model = make_llama().train()
    generator = torch.Generator().manual_seed(3)
    for block in blocks_of(model):
        for linear in block.linears:
            weight = linear.read()
            weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {linear.name: linear.parameter.detach().clone() for block in blocks_of(model) for linear in block.linears}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    tokens = make_tokens()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


def check_preserved(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name, old in before.items():
        new, zero = after[name], old == 0
        assert not new[zero].view(torch.int32).any(), f"{name}: not +0 in every bit"
        assert bool((new[~zero] != old[~zero]).double().mean() > 0.9), f"{name} has hardly moved"


def test_masks_are_freed_with_their_model() -> None:
    model = sparse_llama()
    optima.preserve_masks(model)
    module = weakref.ref(model)
    del model
    gc.collect()
    assert module() is None


def test_a_plain_loop_leaves_zeros_alone() -> None:
    model = sparse_llama()
    before = weights(model)
    handle = optima.preserve_masks(model)
    assert handle.keep.keys() == before.keys()
    train(model, adamw(model.parameters()))
    check_preserved(before, weights(model))
    for linear, keep in handle.keep.items():
        gradient = model.get_submodule(linear).weight.grad
        assert not gradient[~keep].any()
        assert gradient[keep].any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    handle.apply()  # after a change outside of optimizers, such as the merge of an adapter
    assert all(not weights(model)[name][old == 0].any() for name, old in before.items())
    handle.remove()


def test_masks_outlast_moments_from_before() -> None:
    """An optimizer that has seen gradients of pruned weights moves them, whatever their gradients are now."""
    model = make_llama().train()
    optimizer = adamw(model.parameters())
    train(model, optimizer)
    keep = {
        name: torch.arange(weight.numel()).reshape(weight.shape) % 2 == 0 for name, weight in weights(model).items()
    }
    handle = optima.preserve_masks(model, {f"{name}.weight": mask for name, mask in keep.items()})
    before = weights(model)
    assert all(torch.equal(before[name] != 0, mask) for name, mask in keep.items())
    train(model, optimizer)
    check_preserved(before, weights(model))
    handle.remove()


def test_trainer_until_the_masks_are_removed(tmp_path: Path) -> None:
    model = sparse_llama()
    before = weights(model)
    data = [{"input_ids": row, "labels": row} for row in make_tokens(samples=8)]
    options = {"max_steps": 3, "learning_rate": 1e-2, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    handle = optima.preserve_masks(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), **options, **quiet)
    Trainer(model, arguments, train_dataset=data).train()
    check_preserved(before, weights(model))
    handle.remove()
    train(model, adamw(model.parameters()), steps=1)
    assert any(bool((weights(model)[name][old == 0] != 0).any()) for name, old in before.items())


def test_adapters_and_tied_embeddings_have_no_mask() -> None:
    model = make_llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 0  # a row of padding
        model.model.layers[0].mlp.up_proj.weight[:, 3] = 0
        model.model.layers[0].mlp.down_proj.weight.zero_()  # as an adapter begins
    handle = optima.preserve_masks(model)
    handle.remove()
    assert list(handle.keep) == ["model.layers.0.mlp.up_proj"]


def test_what_cannot_be_preserved_is_refused() -> None:
    with pytest.raises(ModelError, match="has zeros: prune it first"):
        optima.preserve_masks(make_llama())
    with pytest.raises(RecipeError, match=r"keep names nowhere, and the model has no such linear"):
        optima.preserve_masks(make_llama(), {"nowhere": torch.ones(2, 2, dtype=torch.bool)})
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(RecipeError, match=rf"the mask of {name} must be a bool tensor of shape \(48, 32\)"):
        optima.preserve_masks(make_llama(), {name: torch.ones(48, 32)})


def test_experts_of_one_parameter_share_one_mask() -> None:
    model = families.build("qwen3_moe")
    optima.prune(model, optima.Recipe(selector="magnitude", solver="none"), calibration=families.make_ids())
    linears = {linear.name: linear for block in blocks_of(model) for linear in block.linears}
    before = {name: linear.read().clone() for name, linear in linears.items()}
    handle = optima.preserve_masks(model.train())
    assert handle.keep.keys() == before.keys()
    masks = {mask.untyped_storage().data_ptr(): mask.untyped_storage().nbytes() for mask in handle.keep.values()}
    assert sum(masks.values()) == sum(weight.numel() for weight in before.values())
    ids = families.make_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name, linear in linears.items():
        assert not linear.read()[before[name] == 0].any(), name
    handle.remove()
    (name,) = [name for name in before if name.endswith("layers.1.mlp.experts.down_proj.2")]
    keep = torch.rand(before[name].shape) > 0.5
    optima.preserve_masks(model, {name: keep}).remove()
    assert not linears[name].read()[~keep].any()
    assert linears[name.removesuffix("2") + "1"].read().any()
