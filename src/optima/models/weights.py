"""Where a block's weights are while it is worked on: all in main memory, one block at a time on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from optima.device import Stopwatch, on_device
from optima.models.stacks import Block


class Resident:
    """The whole model is in main memory: a block moves to the device and back."""

    @contextmanager
    def on(self, block: Block, device: torch.device, clock: Stopwatch | None = None) -> Iterator[None]:
        """The block's weights are on ``device`` inside; the way there and back counts as stage ``read``."""
        clock = clock or Stopwatch(device)
        with ExitStack() as stack:
            with clock("read"):
                stack.enter_context(on_device(block.module, device))
            yield
            with clock("read"):
                stack.close()
