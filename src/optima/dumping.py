"""The hessian and the dense weight of linears, written for benchmarks and research."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors.torch import save_file

from optima.linalg.statistics import Statistics
from optima.models.files import explain_write_errors, sync
from optima.models.stacks import Linear
from optima.pipeline import Dump

DUMP_DIRECTORY = "layers"


def dump_into(directory: Path, regex: str) -> Dump:
    """Write the hessian and the dense weight of each linear whose name matches."""

    def dump(linear: Linear, statistics: Statistics) -> None:
        if re.search(regex, linear.name):
            tensors = {"hessian": statistics.hessian.matrix_DD, "weight": linear.read()}
            file = directory / f"{linear.name}.safetensors"
            with explain_write_errors(file):
                directory.mkdir(exist_ok=True)
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
                # safetensors gives its files to their owner alone.
                file.chmod(directory.stat().st_mode & 0o666)
                sync(file, directory, directory.parent)  # a block that is resumed is not dumped again

    return dump
