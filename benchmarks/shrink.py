"""Perplexity of models that lost MLP neurons, whole blocks or both: published methods, and ours, on one model.

    python benchmarks/shrink.py MODEL --calibration c4.jsonl --evaluation wikitext2_test.txt --output shrink.json

--remove lists what goes: a fraction of the neurons of every MLP, a number of blocks, or both. A method is a preset of
``optima shrink`` (fast, balanced, best), or a baseline, written from its paper. Baselines remove neurons with the
smallest

- magnitude: norm of the neuron's weights, rows and column;
- wanda-sp: Wanda's scores, summed over the column of the down projection (as described in arXiv 2312.11983). A block
  reads what the smaller blocks before it compute;
- flap: variance of the down projection's input, times the squared norm of its column (arXiv 2312.11983). A bias makes
  up for the mean of the removed inputs where the configuration can hold one. FLAP standardises scores to compare
  blocks; here all blocks lose the same number of neurons, which standardised scores do not change;
- flap-no-bias: the same without the bias;

and blocks with the smallest influence, 1 - mean cosine between a block's input and output (shortgpt, arXiv
2403.03853). A baseline that loses both loses the blocks first, by shortgpt, and then the neurons.

All calibration sequences run as one batch. MLPs have gate, up and down projections, as in Llama and Gemma 3.
--held-out, --output, --resume and --known-only are those of accuracy.py. Prints Markdown.

Shapes: N sequences, L tokens in each, T tokens in all of them, D neurons of an MLP, K kept ones.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accuracy import DENSE, Bench, find, held_out, known_results, loss, made_with, make_bench, print_table, save
from pydantic_core import to_jsonable_python
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForCausalLM, PreTrainedModel

import optima
from optima.data.text import data_hash
from optima.device import find_device
from optima.errors import OptimaError
from optima.evaluation.perplexity import perplexity
from optima.models.blocks import Block, count_parameters, find_stacks
from optima.models.forward import hidden_of
from optima.recipe import load_options

REMOVED = ["neurons=0.25", "neurons=0.5", "blocks=6", "blocks=3,neurons=0.125"]
PRESETS = ["fast", "balanced", "best"]
SHORTGPT = "shortgpt"


class Moments(NamedTuple):
    """Of each input of a down projection, over all tokens."""

    norm_D: Tensor
    mean_D: Tensor
    var_D: Tensor


def magnitude(mlp: nn.Module, moments: Moments | None) -> Tensor:
    rows_D = (linear.weight.float().square().sum(dim=1) for linear in (mlp.gate_proj, mlp.up_proj))
    return sum(rows_D, mlp.down_proj.weight.float().square().sum(dim=0))


def wanda_sp(mlp: nn.Module, moments: Moments) -> Tensor:
    return mlp.down_proj.weight.float().abs().sum(dim=0) * moments.norm_D


def flap(mlp: nn.Module, moments: Moments) -> Tensor:
    return mlp.down_proj.weight.float().square().sum(dim=0) * moments.var_D


SCORES = {"magnitude": magnitude, "wanda-sp": wanda_sp, "flap": flap, "flap-no-bias": flap}
METHODS = [*SCORES, SHORTGPT]


def without_neurons(model: PreTrainedModel, tokens_NL: Tensor, method: str, kept: int) -> PreTrainedModel:
    """A model with ``kept`` neurons in every MLP, the best by one of ``SCORES``."""
    tensors, changes, blocks = dict(model.state_dict()), {"intermediate_size": kept}, find_stacks(model)[0].blocks
    if compensated := method == "flap" and hasattr(model.config, "mlp_bias"):
        changes["mlp_bias"] = True

    def shrink(block: Block, moments: Moments | None) -> Tensor:
        """Replace the tensors of the block's MLP; returns which neurons go."""
        mlp, prefix = block.module.mlp, f"{block.name}.mlp"
        keep_K = SCORES[method](mlp, moments).topk(kept).indices.sort().values
        down, gone_D = mlp.down_proj, keep_K.new_ones(mlp.down_proj.in_features).index_fill(0, keep_K, 0).bool()
        for name in ("gate_proj", "up_proj"):
            for kind, tensor in getattr(mlp, name).named_parameters():
                tensors[f"{prefix}.{name}.{kind}"] = tensor[keep_K]
            if compensated and getattr(mlp, name).bias is None:
                tensors[f"{prefix}.{name}.bias"] = down.weight.new_zeros(kept)
        tensors[f"{prefix}.down_proj.weight"] = down.weight[:, keep_K]
        if compensated:
            bias = down.weight.float() @ (moments.mean_D * gone_D)
            tensors[f"{prefix}.down_proj.bias"] = bias if down.bias is None else bias + down.bias
        return gone_D

    def shrink_input(block: Block, _: nn.Module, args: tuple[Tensor]) -> Tensor:
        return args[0].masked_fill(shrink(block, moments_of(args[0])), 0.0)

    with torch.no_grad():
        if method == "wanda-sp":
            downs = [(block.module.mlp.down_proj, partial(shrink_input, block)) for block in blocks]
            run(model, tokens_NL, [down.register_forward_pre_hook(hook) for down, hook in downs])
        else:
            found = {} if method == "magnitude" else dense_moments(model, tokens_NL)
            for block in blocks:
                shrink(block, found.get(block.name))
    return rebuilt(model, changes, tensors)


def moments_of(inputs: Tensor) -> Moments:
    inputs_TD = inputs.flatten(0, -2).float()
    return Moments(inputs_TD.norm(dim=0), inputs_TD.mean(dim=0), inputs_TD.var(dim=0))


@cache
def dense_moments(model: PreTrainedModel, tokens_NL: Tensor) -> dict[str, Moments]:
    """Of the down projection of each block, by the name of the block."""
    found: dict[str, Moments] = {}

    def see(name: str, _: nn.Module, args: tuple[Tensor]) -> None:
        found[name] = moments_of(args[0])

    downs = {block.name: block.module.mlp.down_proj for block in find_stacks(model)[0].blocks}
    run(model, tokens_NL, [down.register_forward_pre_hook(partial(see, name)) for name, down in downs.items()])
    return found


@cache
def without_blocks(model: PreTrainedModel, tokens_NL: Tensor, count: int) -> PreTrainedModel:
    """A model without the ``count`` blocks of smallest influence."""
    blocks, influences = find_stacks(model)[0].blocks, block_influences(model, tokens_NL)
    if not 0 < count < len(blocks):
        raise OptimaError(f"cannot remove {count} of {len(blocks)} blocks")
    kept = sorted(sorted(range(len(blocks)), key=influences.__getitem__)[count:])
    root = blocks[0].name.removesuffix("0")
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(root)}
    for new, old in enumerate(kept):
        tensors |= {f"{root}{new}.{name}": tensor for name, tensor in blocks[old].module.state_dict().items()}
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    if types := getattr(model.config, "layer_types", None):
        changes["layer_types"] = [types[old] for old in kept]
    return rebuilt(model, changes, tensors)


@cache
def block_influences(model: PreTrainedModel, tokens_NL: Tensor) -> list[float]:
    found: list[float] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        found.append(1.0 - cosine_similarity(args[0].float(), hidden_of(output).float(), dim=-1).mean().item())

    run(model, tokens_NL, [block.module.register_forward_hook(see) for block in find_stacks(model)[0].blocks])
    return found


@torch.no_grad()
def run(model: PreTrainedModel, tokens_NL: Tensor, hooks: Sequence[RemovableHandle]) -> None:
    """All sequences in one batch, without the LM head; hooks end."""
    model.base_model(tokens_NL.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()


def rebuilt(model: PreTrainedModel, changes: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of the changed configuration with these tensors: what loading a checkpoint of it would give."""
    config = type(model.config).from_dict(model.config.to_dict() | changes)
    smaller: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    smaller.load_state_dict(tensors)
    smaller.generation_config = model.generation_config
    return smaller.to(model.device).eval()


def shrunk(model: PreTrainedModel, method: str, removed: str, tokens_NL: Tensor, multiple: int) -> PreTrainedModel:
    """A smaller model by any method; ``model`` stays as it is."""
    neurons, blocks = amounts(removed)
    if method in PRESETS:
        return ours(model, method, neurons, blocks, tokens_NL)
    if blocks:
        model = without_blocks(model, tokens_NL, blocks)
    if neurons:
        size = model.config.intermediate_size
        kept = round((1.0 - neurons) * size / multiple) * multiple
        if not 0 < kept < size:
            raise OptimaError(f"{removed} of {size} neurons leaves no other multiple of {multiple}: lower --multiple")
        model = without_neurons(model, tokens_NL, method, kept)
    return model


def ours(model: PreTrainedModel, preset: str, neurons: float, blocks: int, tokens_NL: Tensor) -> PreTrainedModel:
    model, removed = copy.deepcopy(model), {"neurons": neurons or None, "blocks": blocks or None}
    optima.shrink(model, load_options(optima.Shrink, preset, **removed), calibration=tokens_NL)
    return model


def amounts(removed: str) -> tuple[float, int]:
    """The fraction of neurons and the number of blocks in a value of --remove."""
    parts = dict(part.split("=") for part in removed.split(","))
    if not parts or not parts.keys() <= {"neurons", "blocks"}:
        raise ValueError(removed)
    return float(parts.get("neurons", 0.0)), int(parts.get("blocks", 0))


class ShrinkBench(Bench):
    """What every run shares; a pattern is a value of --remove."""

    def settings(self, method: str, pattern: str) -> dict[str, Any]:
        evaluation = super().settings(DENSE, "-")
        if method == DENSE:
            return evaluation
        calibration = {"calibration_hash": data_hash(self.tokens_NL), "calibration": list(self.tokens_NL.shape)}
        return {"removed": amounts(pattern), "multiple": self.options.multiple} | calibration | evaluation

    def run(self, method: str, pattern: str) -> dict[str, Any]:
        """Shrink a copy of the model and measure it."""
        model, asked = self.model.to(find_device(self.options.device)), self.settings(method, pattern)
        if method != DENSE:
            model = shrunk(model, method, pattern, self.tokens_NL, self.options.multiple)
        result = {"method": method, "pattern": pattern, "parameters": count_parameters(model)}
        result["perplexity"] = perplexity(model, self.windows_NL)
        if self.held_out_NL is not None:
            result["perplexity_held_out"] = perplexity(model, self.held_out_NL)
        return result | {"settings": asked, "made_with": made_with(self.options)}


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.output and options.output.exists() and options.resume is None:
        parser.error(f"{options.output} exists: go on from it with --resume, or name another file")
    try:
        results = known_results(options)
        bench = ShrinkBench(**vars(make_bench(options)))
        options.patterns = options.remove
        runs = [(DENSE, "-"), *((method, removed) for removed in options.remove for method in options.methods)]
        for method, removed in [] if options.known_only else runs:
            if fits(method, removed) and find(results, bench, method, removed) is None:
                results.append(to_jsonable_python(bench.run(method, removed), inf_nan_mode="strings"))
                print(json.dumps(results[-1]), flush=True)
            save(results, options.output)
    except OptimaError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    both = "perplexity" if bench.held_out_NL is None else "perplexity / of held-out calibration text"
    print_table(both, perplexities, results, bench)
    print_table("parameters, millions", lambda result: f"{result['parameters'] / 1e6:.1f}", results, bench)


def fits(method: str, removed: str) -> bool:
    """Whether a method removes that: shortgpt alone removes no neurons."""
    return method in (DENSE, *PRESETS) or (method == SHORTGPT) == (amounts(removed)[0] == 0.0)


def perplexities(result: dict[str, Any]) -> str:
    return " / ".join([loss(result), *([held_out(result)] if "perplexity_held_out" in result else [])])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or local directory")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", required=True, help="text to measure perplexity on")
    parser.add_argument("--remove", nargs="+", default=REMOVED, type=checked, metavar="WHAT", help="see above")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=[*METHODS, *PRESETS], help="see above")
    parser.add_argument("--multiple", type=int, default=64, help="that the number of kept neurons is of")
    parser.add_argument("--held-out", type=float, metavar="SHARE", help="of the calibration text, to measure on too")
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512, help="tokens in a calibration sequence")
    parser.add_argument("--window", type=int, default=1024, help="tokens in a window of the evaluation text")
    parser.add_argument("--max-windows", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the order of calibration documents")
    parser.add_argument("--dtype", default="auto", help="of the model: auto (the checkpoint's own), bfloat16, float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write the results as JSON after every run")
    parser.add_argument("--resume", nargs="*", type=Path, help="keep the results of --output and these")
    parser.add_argument("--known-only", action="store_true", help="run nothing; print what --resume finds")
    # What only accuracy.py has.
    parser.set_defaults(tasks={}, task_limit=None, own_samples=0, keep=None, patterns=[])
    return parser


def checked(removed: str) -> str:
    amounts(removed)
    return removed


if __name__ == "__main__":
    main()
