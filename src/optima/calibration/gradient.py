"""Regional gradients: how the norm of a block's output depends on the weights of its linears, sample by sample.

Wanda++ (arXiv 2503.04992), section 3.1. Cost: one more forward and backward pass of each block over the calibration
text, its activations for one sample, and a float32 copy of the block's weights to accumulate squares in.

Shapes: O outputs, D inputs, L tokens in a sequence, E hidden size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optima.calibration.probe import hidden_of
from optima.calibration.streams import Streams
from optima.device import GRADIENT, backward_explained, differentiable
from optima.errors import OTHER_DTYPE, ModelError, NumericalError
from optima.linalg.finite import all_finite
from optima.models.stacks import Block


def regional_gradients(block: Block, streams: Streams) -> dict[str, Tensor]:
    """Root mean square over samples of the gradient of ||f(X)||_2 / sqrt(L), for every linear of the block.

    The norm is by the root of the tokens because H is a mean over tokens: the ratio of the two is then as published.

    Args:
        block: on the device of ``streams``.
        streams: what enters the block, run one sequence at a time.

    Returns:
        gradient_OD, float32, by the linear's full name; zero where no sample reached the linear.

    Raises:
        NumericalError: if a gradient is not finite.
        ModelError: if the block cannot be run on single sequences, has no gradients, or was made inside
            ``torch.inference_mode()``.
    """
    weights = list({id(linear.parameter): linear.parameter for linear in block.linears}.values())
    if any(weight.is_inference() for weight in weights):
        raise ModelError(f"{block.name} was made inside torch.inference_mode(), and has no gradients: make it outside")
    samples = 0
    with torch.inference_mode(False), torch.enable_grad(), differentiable(block.module, weights):
        sums = {linear.name: torch.zeros(linear.shape, device=streams.device) for linear in block.linears}
        for batch, (count, length) in enumerate(streams.sizes):
            for sample in range(count):
                one = slice(sample, sample + 1)
                output_1LE = hidden_of(streams.run(block, batch, one, looks=True)).float()
                loss = torch.linalg.vector_norm(output_1LE) / length**0.5
                if not loss.requires_grad:
                    raise ModelError(f"{block.name} has no gradients, by which this selector chooses: take another one")
                scale = 2.0 ** round(math.log2(GRADIENT * length * output_1LE.shape[-1] ** 0.5))
                with backward_explained(block.name):
                    found = torch.autograd.grad(loss * scale, weights, allow_unused=True)
                gradients = {id(weight): gradient for weight, gradient in zip(weights, found, strict=True)}
                for linear in block.linears:
                    if (gradient := gradients[id(linear.parameter)]) is not None:
                        sums[linear.name] += linear.orient(gradient).float().div_(scale).square()
                samples += 1
    for name, sum_OD in sums.items():
        if not all_finite(sum_OD):
            raise NumericalError(f"the gradient at the weight of {name} is not finite: {OTHER_DTYPE}")
    samples = sum(streams.ranks.gather(samples))
    return {name: streams.ranks.all_reduce(sum_OD).div_(samples).sqrt_() for name, sum_OD in sums.items()}
