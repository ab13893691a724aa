"""A model whose value heads are turned, so that pruning loses less of them: the same function, an ordinary checkpoint.

    python benchmarks/turn.py MODEL --output-dir TURNED --calibration c4.jsonl --pattern 0.5
    python benchmarks/accuracy.py TURNED ...

What an attention makes of its values is linear: the values of a head may be turned by any orthogonal matrix, if what
reads them is turned back. Here such matrices are found by gradients (Adam on a skew-symmetric matrix and its
exponential), so that the weights which the pattern prunes matter least: of the values' linear and of the one that reads
them, by the squared saliency of OBS, each relative to before. Tells both for every attention. That such matrices help
pruning is from DenoiseRotator (Gu et al., arXiv 2505.23049), which concentrates Wanda's and other scores by their
entropy, in hidden states too. An experiment: nothing of it is in the package.

Shapes: H heads of values, W channels of a head, C queries that share a head, D inputs of the values' linear, O outputs
of the one that reads them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from harness.treatment import make_parser, read
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.linalg.hessian import Hessian
from optima.models.ordered import write_orders
from optima.models.stacks import ModuleLinear, find_stacks, linears_of
from optima.ordering.channels import Channels, Place, inner_channels
from optima.patterns import NM, Pattern, Unstructured, parse_nm

DAMPING = 0.01
STEPS, RATE = 100, 0.4  # of Adam; the rate falls to zero, and is divided by the root of W
AGAIN = 10  # steps until thresholds are taken anew
SAMPLED = 50_000  # saliencies that decide a threshold


def main() -> None:
    parser = make_parser(__doc__, learning_rates=[])
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    pattern = parse_nm(options.pattern) or Unstructured(float(options.pattern), "layer")
    untreated = read(options)
    model = untreated.dense.float()
    parameters = dict(model.named_parameters())
    found: dict[str, Channels] = {}
    linears: dict[str, ModuleLinear] = {}
    for block in (block for stack in find_stacks(model) for block in stack.blocks):
        linears |= {each.name: each for each in linears_of(block.module, block.name) if isinstance(each, ModuleLinear)}
        ways = inner_channels(block, model.config.get_text_config())
        found |= {each[0].name: each[0] for each in ways if each[0].kind == "heads"}
    writers = {name: linears[each.places[0].name.removesuffix(".weight")] for name, each in found.items()}
    readers = {name: linears[each.readers[0]] for name, each in found.items()}
    gram = gram_of(model, untreated.tokens_NL, (*writers.values(), *readers.values()))
    for name, channels in found.items():
        writer, reader = writers[name], readers[name]
        problem = _Problem(channels, writer, reader, gram[writer.name], gram[reader.name], pattern)
        turn_HWW, values, outputs = problem.best_turn()
        print(
            f"{name}: of the saliency that is pruned {values:.3f} of the values, {outputs:.3f} of the outputs is left"
        )
        for place in channels.places:
            turn(parameters[place.name], place, turn_HWW)
    model.to(getattr(torch, options.dtype)).save_pretrained(options.output_dir)
    untreated.tokenizer.save_pretrained(options.output_dir)
    write_orders(model, options.output_dir)


@torch.no_grad()
def gram_of(model: PreTrainedModel, tokens_NL: Tensor, linears: Iterable[ModuleLinear]) -> dict[str, Tensor]:
    """X^T X of the inputs of each linear; first tokens are not counted, for attention makes sinks of them."""
    sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs_TD = given[0][:, 1:].flatten(0, 1)
            sums[name] = sums[name] + (inputs_TD.mT @ inputs_TD).double()

        return hook

    hooks = [linear.module.register_forward_pre_hook(add(linear.name)) for linear in linears]
    for tokens_L in tokens_NL:
        model.base_model(tokens_L[None], use_cache=False)  # without its head
    for hook in hooks:
        hook.remove()
    return dict(sums)


def turn(whole: Tensor, place: Place, turn_HWW: Tensor) -> None:
    """Turn the channels in one parameter, in place."""
    for turn_WW, starts in zip(turn_HWW, place.starts, strict=True):
        for start in starts:
            index = start + place.step * torch.arange(len(turn_WW))
            own = whole.data.index_select(place.dim, index)
            turned = torch.tensordot(turn_WW, own, ([1], [place.dim])).movedim(0, place.dim)
            whole.data.index_copy_(place.dim, index, turned)


class _Problem:
    """The weights of an attention's values and of what reads them, in units in which squares are saliencies."""

    def __init__(
        self, channels: Channels, writer: ModuleLinear, reader: ModuleLinear,
        gram_DD: Tensor, gram_II: Tensor, pattern: Pattern,
    ) -> None:  # fmt: skip
        self.width, self.pattern = channels.width, pattern
        value, width = writer.read().float(), torch.arange(channels.width)
        written = [starts[0] + channels.places[0].step * width for starts in channels.places[0].starts]
        self.value_HWD = (
            torch.stack([value[index] for index in written])
            / Hessian(gram_DD, DAMPING).inverse_diagonal_D.sqrt().float()
        )
        out, left = reader.read().float(), Hessian(gram_II, DAMPING).inverse_DD.float()
        read = [[start + width for start in starts] for starts in channels.read]
        self.out_HCOW = torch.stack([torch.stack([out[:, index] for index in head]) for head in read])
        self.left_HCWW = torch.stack([torch.stack([left[index][:, index] for index in head]) for head in read])

    def saliencies(self, turn_HWW: Tensor) -> tuple[Tensor, Tensor]:
        """Squared: of the values' weights, (H, W, D), and of those that read them, (H, C, O, W)."""
        left_HCW = ((turn_HWW[:, None] @ self.left_HCWW) * turn_HWW[:, None]).sum(-1)
        out_HCOW = self.out_HCOW @ turn_HWW.mT[:, None]
        return (turn_HWW @ self.value_HWD).square(), out_HCOW.square() / left_HCW[:, :, None]

    def pruned(self, saliency: Tensor, threshold: Tensor) -> Tensor:
        """What the pattern prunes of it, n:m along the last dimension."""
        if isinstance(self.pattern, NM):
            group = saliency.unflatten(-1, (-1, self.pattern.m)).sort(-1).values
            return group[..., : self.pattern.m - self.pattern.n].sum()
        return torch.where(saliency < threshold, saliency, 0.0).sum()

    def threshold(self, saliency: Tensor) -> Tensor:
        some = saliency.detach().flatten()
        some = some[:: max(some.numel() // SAMPLED, 1)]
        return some.kthvalue(max(round(self.pattern.sparsity * len(some)), 1)).values

    def best_turn(self) -> tuple[Tensor, float, float]:
        """Of all heads, and what is left of the saliencies that are pruned, relative to before."""
        heads = len(self.value_HWD)
        as_it_is = self.saliencies(torch.eye(self.width).expand(heads, -1, -1))
        before = [float(self.pruned(each, self.threshold(each))) for each in as_it_is]
        generator = torch.Generator().manual_seed(0)
        skew_HWW = (0.01 * torch.randn(heads, self.width, self.width, generator=generator)).requires_grad_()
        optimizer = torch.optim.Adam([skew_HWW])
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE / self.width**0.5 * (1.0 - step / STEPS)
            found = self.saliencies(torch.matrix_exp(skew_HWW - skew_HWW.mT))
            if step % AGAIN == 0:
                thresholds = [self.threshold(each) for each in found]
            parts = zip(found, thresholds, before, strict=True)
            sum(self.pruned(each, threshold) / was for each, threshold, was in parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            turn_HWW = torch.matrix_exp(skew_HWW - skew_HWW.mT)
            found = self.saliencies(turn_HWW)
            values, outputs = (
                float(self.pruned(each, self.threshold(each))) / was for each, was in zip(found, before, strict=True)
            )
        return turn_HWW, values, outputs


if __name__ == "__main__":
    main()
