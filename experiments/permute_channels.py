"""Order channels for 2:4: the same model, with its weights where keeping 2 of every 4 loses less.

    python experiments/permute_channels.py MODEL OUT --calibration c4_calibration.jsonl
    optima prune OUT --output-dir PRUNED --pattern 2:4

Channels inside an MLP may have any order, as long as gate, up and down agree on it. So may those of a value head, with
the outputs of v and the inputs of o that belong to it. OUT is an ordinary checkpoint that computes what MODEL does.

Two of four are lost, so weights of which all matter had better not stand together: channels are dealt out to groups of
four by what they are worth, and then change places where two groups gain by it (as in Pool & Yu, NeurIPS 2021, and in
RIA, Zhang et al., ICLR 2024). A weight is worth w^2 u^2, u^2 between H_ii and 1 / K_ii, K the inverse of the damped H
(``optima.linalg.scaling.saliency_unit``), on inputs of the dense model.

Shapes: O outputs (rows), D inputs, R rows that count, C channels, G groups of four, P pairs of groups.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.calibration.text import Documents, TextSource, calibration_tokens
from optima.linalg.hessian import Hessian
from optima.linalg.scaling import saliency_unit, scaled_weight
from optima.models.source import find_source, load_model, load_tokenizer

DAMPING = 0.01
# Rows of a linear by which its channels are ordered, at most: more take longer.
ROWS = 512


@dataclass(frozen=True)
class Channels:
    """Channels that may change places among themselves.

    Attributes:
        reader: has them as inputs.
        writers: have them as outputs.
        heads: of the writers; channels stay in theirs.
        copies: heads of the reader, one after the other, that read the same head of the writers.
    """

    reader: nn.Linear
    writers: tuple[nn.Linear, ...]
    heads: int = 1
    copies: int = 1


def find_channels(model: PreTrainedModel) -> list[Channels]:
    """Those of every block of a decoder whose modules have the names that Llama gave them."""
    found = []
    for module in model.modules():
        names = dict(module.named_children())
        if {"gate_proj", "up_proj", "down_proj"} <= set(names):
            found.append(Channels(names["down_proj"], (names["gate_proj"], names["up_proj"])))
        if {"v_proj", "o_proj"} <= set(names):
            heads = names["v_proj"].out_features // module.head_dim
            copies = names["o_proj"].in_features // names["v_proj"].out_features
            found.append(Channels(names["o_proj"], (names["v_proj"],), heads, copies))
    if not found:
        raise SystemExit(f"{type(model).__name__} has no gate_proj, up_proj and down_proj, and no v_proj and o_proj")
    for channels in found:
        if channels.writers[0].out_features // channels.heads % 4:
            raise SystemExit(f"{channels.writers[0]} has no groups of four channels that stay in their head")
    return found


def lost(worth: Tensor) -> Tensor:
    """The sum of the two smallest of four, (..., 4) to (...)."""
    a, b, c, d = worth.unbind(-1)
    low, other = torch.minimum(a, b), torch.minimum(c, d)
    high, another = torch.maximum(a, b), torch.maximum(c, d)
    return torch.minimum(low, other) + torch.minimum(torch.maximum(low, other), torch.minimum(high, another))


def dealt_out(worth_RC: Tensor) -> Tensor:
    """Channels by groups, (G, 4): the first quarter by their worth one to each group, then the next quarter."""
    return worth_RC.sum(dim=0).argsort(descending=True).reshape(4, -1).mT.contiguous()


def order(worth_RC: Tensor, sweeps: int, generator: torch.Generator) -> Tensor:
    """The order of channels, (C,), that loses least of what was tried: in a sweep each group meets another.

    Of the 16 ways in which two groups can change a channel, the best is taken if it loses less.
    """
    channel_G4 = dealt_out(worth_RC)
    half = len(channel_G4) // 2
    for _ in range(sweeps if half else 0):
        met_G = torch.randperm(len(channel_G4), generator=generator)
        first_P, second_P = met_G[:half], met_G[half : 2 * half]
        first_RP4, second_RP4 = worth_RC[:, channel_G4[first_P]], worth_RC[:, channel_G4[second_P]]
        least_P = lost(first_RP4).sum(dim=0) + lost(second_RP4).sum(dim=0)
        least_P = least_P * (1.0 - torch.finfo(least_P.dtype).eps)  # rounding is no gain
        best_P = torch.full((half,), -1)
        for way in range(16):
            mine, theirs = divmod(way, 4)
            one_RP4, two_RP4 = first_RP4.clone(), second_RP4.clone()
            one_RP4[..., mine], two_RP4[..., theirs] = second_RP4[..., theirs], first_RP4[..., mine]
            lost_P = lost(one_RP4).sum(dim=0) + lost(two_RP4).sum(dim=0)
            best_P[lost_P < least_P] = way
            least_P = torch.minimum(least_P, lost_P)
        swap_P = best_P >= 0
        one, two = first_P[swap_P], second_P[swap_P]
        mine_P, theirs_P = best_P[swap_P] // 4, best_P[swap_P] % 4
        moved_P = channel_G4[one, mine_P]
        channel_G4[one, mine_P] = channel_G4[two, theirs_P]
        channel_G4[two, theirs_P] = moved_P
    return channel_G4.flatten()


@torch.no_grad()
def permute(channels: Channels, hessian: Hessian, sweeps: int, generator: torch.Generator) -> float:
    """Give channels a better order in place; what 2:4 then loses of their worth, relative to before."""
    reader, heads, copies = channels.reader, channels.heads, channels.copies
    weight_OD = reader.weight.float()
    worth_OD = scaled_weight(weight_OD, hessian, saliency_unit(hessian)).square()
    rows = torch.randperm(len(worth_OD), generator=generator)[:ROWS]
    width = worth_OD.shape[1] // (heads * copies)
    outputs, inputs = [], []
    for head, worth_RKC in enumerate(worth_OD[rows].unflatten(1, (heads, copies, width)).unbind(1)):
        order_C = order(worth_RKC.flatten(0, 1), sweeps, generator)
        outputs.append(order_C + head * width)
        inputs.extend(order_C + (head * copies + copy) * width for copy in range(copies))
    output_D, input_D = torch.cat(outputs), torch.cat(inputs)
    before = lost(worth_OD.unflatten(1, (-1, 4))).sum()
    for writer in channels.writers:
        writer.weight.copy_(writer.weight[output_D])
        if writer.bias is not None:
            writer.bias.copy_(writer.bias[output_D])
    reader.weight.copy_(reader.weight[:, input_D])
    return float(lost(worth_OD[:, input_D].unflatten(1, (-1, 4))).sum() / before)


@torch.inference_mode()
def hessians(model: PreTrainedModel, linears: list[nn.Linear], tokens_NL: Tensor) -> list[Hessian]:
    """Of the linears' inputs in the dense model; first tokens, which are sinks, do not count."""
    sums = [torch.zeros(linear.in_features, linear.in_features) for linear in linears]

    def see(sum_DD: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        input_TD = args[0][:, 1:].flatten(0, -2).float()
        sum_DD += input_TD.mT @ input_TD

    with ExitStack() as hooks:
        for linear, sum_DD in zip(linears, sums, strict=True):
            hooks.callback(linear.register_forward_pre_hook(partial(see, sum_DD)).remove)
        for token_L in tokens_NL:
            model.get_decoder()(token_L[None], use_cache=False)
    return [Hessian(sum_DD / tokens_NL[:, 1:].numel(), DAMPING) for sum_DD in sums]


def main() -> None:
    """Write MODEL with its channels in a better order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local directory or GGUF file")
    parser.add_argument("output", type=Path, help="a directory that does not exist yet")
    parser.add_argument("--calibration", nargs="+", required=True, help="text")
    parser.add_argument("--sweeps", type=int, default=60)
    parser.add_argument("--num-calibration-samples", type=int, default=32)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists: name a directory that does not")
    torch.set_num_threads(options.threads)
    source = find_source(options.model)
    model, tokenizer = load_model(source, options.dtype), load_tokenizer(source)
    documents = Documents(TextSource(tuple(options.calibration)))
    tokens_NL = calibration_tokens(documents, tokenizer, options.num_calibration_samples, options.max_seq_length)
    every, generator = find_channels(model), torch.Generator().manual_seed(0)
    found = hessians(model, [channels.reader for channels in every], tokens_NL)
    names = {module: name for name, module in model.named_modules()}
    for channels, hessian in zip(every, found, strict=True):
        left = permute(channels, hessian, options.sweeps, generator)
        print(f"{names[channels.reader]}: 2:4 loses {left:.3f} of what it did", flush=True)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
