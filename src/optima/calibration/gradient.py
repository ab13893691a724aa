"""Regional gradients: how the norm of a block's output depends on the weights of its linears, sample by sample.

Wanda++ (arXiv 2503.04992), section 3.1. Cost: one more forward and backward pass of each block over the calibration
text, its activations for one sample, and a float32 copy of the block's weights to accumulate squares in.

Shapes: O outputs, D inputs, L tokens in a sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from optima.calibration.capture import BlockInputs
from optima.models.stacks import Block


def regional_gradients(block: Block, inputs: BlockInputs, device: torch.device) -> dict[str, Tensor]:
    """Root mean square over samples of the gradient of ||f(X)||_2 / sqrt(L), for every linear of the block.

    The norm is by the root of the tokens because H is a mean over tokens: the ratio of the two is then as published.

    Args:
        block: on ``device``.
        inputs: its calibration inputs, run one sequence at a time.
        device: where to compute.

    Returns:
        gradient_OD, float32, by the linear's full name; zero where no sample reached the linear.
    """
    sums = {linear.name: torch.zeros(linear.shape, device=device) for linear in block.linears}
    weights = [linear.parameter for linear in block.linears]
    samples = 0
    with torch.enable_grad(), _differentiable(block.module, weights):
        for batch, hidden in enumerate(inputs.hidden):
            for sample in range(len(hidden)):
                output_1LE = inputs.run_sample(block, batch, sample, device).float()
                loss = torch.linalg.vector_norm(output_1LE) / output_1LE.shape[1] ** 0.5
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                for linear, gradient in zip(block.linears, gradients, strict=True):
                    if gradient is not None:
                        gradient_OD = gradient.mT if linear.transposed else gradient
                        sums[linear.name] += gradient_OD.float().square()
                samples += 1
    return {name: sum_OD.div_(samples).sqrt_() for name, sum_OD in sums.items()}


@contextmanager
def _differentiable(module: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Only ``weights`` require gradients inside this context."""
    before = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        module.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)
