"""Write the hessian and the dense weight of linears, a safetensors file each, for qp.py, certificate.py, quantise.py.

    python benchmarks/dump.py MODEL --dataset TEXT --dump-dir DUMP --regex '\\.8\\.'

Linears are pruned by magnitude, one after another, and not solved, so that hessians are those of a pruned model.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import optima
from optima.patterns import Pattern, Scope
from optima.selectors.base import LinearTask, Selection, Selector, make_selector


@dataclass(frozen=True)
class Dumping:
    """A selector that writes what it sees of the linears whose name matches.

    With objective loss, rows of the weight come scaled by the roots of their weights.
    """

    directory: Path
    regex: str = ""
    inner: Selector = field(default_factory=lambda: make_selector("magnitude"))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(getattr(self.inner, "needs", ()))

    @property
    def published_scope(self) -> Scope:
        return self.inner.published_scope

    def select(self, task: LinearTask, pattern: Pattern) -> Selection:
        """See ``Selector``."""
        if re.search(self.regex, task.name):
            self.directory.mkdir(parents=True, exist_ok=True)
            tensors = {"hessian": task.hessian.matrix_DD, "weight": task.weight_OD}
            file = self.directory / f"{task.name}.safetensors"
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
        return self.inner.select(task, pattern)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or local directory")
    parser.add_argument("--dataset", nargs="+", required=True, help="calibration text")
    parser.add_argument("--dump-dir", type=Path, required=True, help="where the files go")
    parser.add_argument("--regex", default="", help="which linears (default: all)")
    parser.add_argument("--targets", nargs="+", help="prune these linears only (default: all)")
    parser.add_argument("--objective", default="plain", help="of the hessians")
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512)
    given = parser.parse_args()
    targets = {"targets": given.targets} if given.targets else {}
    recipe = optima.Recipe(
        selector=Dumping(given.dump_dir, given.regex),
        solver="none",
        allocation="uniform",
        objective=given.objective,
        dataset=given.dataset,
        num_calibration_samples=given.num_calibration_samples,
        max_seq_length=given.max_seq_length,
        **targets,
    )
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto")
    optima.prune(model, recipe, tokenizer=AutoTokenizer.from_pretrained(given.model))


if __name__ == "__main__":
    main()
