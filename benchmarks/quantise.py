"""Quantising a pruned model: which rounding keeps its zeros, and what it costs in perplexity.

    python benchmarks/quantise.py DENSE PRUNED --evaluation wikitext2_test.txt
    python benchmarks/quantise.py PRUNED --dump-dir DUMP --evaluation wikitext2_test.txt

Rounds the linears of the model's blocks and back, weights only, and measures the perplexity of each model: int8 with
one scale a row, int4 with one scale for each --group inputs, both symmetric (zero stands for zero), and int4 with an
offset (zero is a number like any other). See docs/howto/quantise.md. With the Hessians of every linear, written by
dump.py, there is also int4 in which the other kept weights compensate for each error. Solved weights that are not tuned
have the least error under their mask, so rounding them under the same Hessian is rounding and solving jointly.

Shapes: O outputs, D inputs, G groups of inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness.rounding import compensated, descended, nearest, scales
from safetensors.torch import load_file
from torch import Tensor

from optima.core.hessian import Hessian
from optima.data.datasets import load_documents
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.models.blocks import find_stacks
from optima.models.load import find_source, load_model, load_tokenizer
from optima.reporting.markdown import table

Way = Callable[[Tensor, str], Tensor]  # a weight and the name of its linear


def with_offset(weight_OD: Tensor, bits: int, group: int) -> Tensor:
    """Rounded to a grid from the least to the largest weight of a group, which seldom has a zero."""
    groups_OGD = weight_OD.float().unflatten(1, (-1, group))
    least_OG1, most_OG1 = groups_OGD.amin(dim=2, keepdim=True), groups_OGD.amax(dim=2, keepdim=True)
    scale_OG1 = ((most_OG1 - least_OG1) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return (((groups_OGD - least_OG1) / scale_OG1).round() * scale_OG1 + least_OG1).flatten(1)


def main(arguments: list[str] | None = None) -> list[list[str]]:
    options = make_parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    ways: dict[str, Way] = {
        "as it is": lambda weight_OD, _: weight_OD,
        "int8, a scale a row": lambda weight_OD, _: nearest(weight_OD, scales(weight_OD, 8), 8),
        f"int4, a scale for {options.group} inputs": lambda weight_OD, _: nearest(
            weight_OD, scales(weight_OD, 4, options.group), 4
        ),
        f"int4 with an offset, for {options.group}": lambda weight_OD, _: with_offset(weight_OD, 4, options.group),
    }
    if options.dump_dir is not None:
        ways |= by_hessian(options)
    rows = [row for model in options.models for row in measure(model, ways, options)]
    print(table(["model", "weights", "perplexity", "zeros kept"], rows, num_left=2))
    return rows


def by_hessian(options: argparse.Namespace) -> dict[str, Way]:
    """int4 as the symmetric one, errors made up for as they come, and then one weight of a row at a time."""

    def rounded(weight_OD: Tensor, name: str, passes: int) -> Tensor:
        hessian = Hessian(load_file(options.dump_dir / f"{name}.safetensors")["hessian"])
        scale_OD = scales(weight_OD, 4, options.group)
        found_OD = compensated(weight_OD, scale_OD, 4, hessian)
        return descended(weight_OD, found_OD, scale_OD, 4, hessian, passes) if passes else found_OD

    ways = {"compensated": 0, "and descended": 3}
    return {
        f"int4, {way}": lambda weight_OD, name, passes=passes: rounded(weight_OD, name, passes)
        for way, passes in ways.items()
    }


def measure(name: str, ways: dict[str, Way], options: argparse.Namespace) -> list[list[str]]:
    source = find_source(name)
    model = load_model(source, options.dtype)
    text = list(load_documents(options.evaluation))
    windows_NL = evaluation_windows(text, load_tokenizer(source), options.max_seq_length, options.max_windows)
    linears = [linear for stack in find_stacks(model) for block in stack.blocks for linear in block.linears]
    before = [linear.read().clone() for linear in linears]
    rows = []
    for way, rounded in ways.items():
        for linear, weight_OD in zip(linears, before, strict=True):
            linear.write(rounded(weight_OD, linear.name).to(weight_OD.dtype))
        found = perplexity(model.cpu(), windows_NL)
        rows.append([name, way, f"{found:.2f}", zeros_kept(before, [linear.read() for linear in linears])])
        print(*rows[-1], flush=True)
    return rows


def zeros_kept(before: Sequence[Tensor], after: Sequence[Tensor]) -> str:
    """The share of the zeros that are still there; nothing for a dense model."""
    zeros = sum(int((weight_OD == 0).sum()) for weight_OD in before)
    kept = sum(int(((old_OD == 0) & (new_OD == 0)).sum()) for old_OD, new_OD in zip(before, after, strict=True))
    size = sum(weight_OD.numel() for weight_OD in before)
    return f"{kept / zeros:.0%}" if zeros > size / 10 else ""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="hub ids, local directories or GGUF files")
    parser.add_argument("--evaluation", nargs="+", required=True, help="text to measure on")
    parser.add_argument("--group", type=int, default=32, help="inputs that share a scale in int4")
    parser.add_argument("--dump-dir", type=Path, help="hessians of the linears, written by dump.py")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--max-windows", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


if __name__ == "__main__":
    main()
