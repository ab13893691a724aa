"""How much of what distilling the whole model under a mask gains, the tuning of blocks gains, and at what cost.

    python benchmarks/distil.py MODEL --calibration c4.jsonl --evaluation wikitext2_test.txt --pattern 0.7

One mask, the default selector's with sparsity shared out, under three treatments of the weights that survive: solved;
solved and tuned block by block; solved and distilled, which is gradient steps on all of them at once towards the dense
model's predictions. Seconds are of what a row names: those of the first row belong to every other way to the mask, and
distilling begins with the solved model. Distilling holds weights, gradients, Adam's moments and the dense model in
memory. The last fifth of the calibration text is measured on too; nothing is calibrated on it. Prints Markdown.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness.treatment import CPU, Untreated, heading, make_parser, read
from torch import Tensor
from transformers import PreTrainedModel

from optima import preserve_masks
from optima.data.datasets import load_documents
from optima.device import PeakMemory
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.tune import size_of

RATE = 3e-3  # of tuning by blocks, as in the recipe best


@dataclass(frozen=True)
class Bench:
    """What every treatment shares."""

    untreated: Untreated
    texts: tuple[Tensor, ...]  # windows to measure on

    def row(self, name: str, treat: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Treat and measure; the model that comes out."""
        memory, started = PeakMemory(CPU), time.perf_counter()
        model = treat()
        seconds, peak = time.perf_counter() - started, memory.peak()
        found = " / ".join(f"{perplexity(model, windows_NL):.2f}" for windows_NL in self.texts)
        print(f"| {name} | {found} | {seconds:.0f} | {peak / 1e9:.2f} |", flush=True)
        return model

    def distilled(self, solved: str, epochs: int, rate: float) -> PreTrainedModel:
        """Adam on every tensor but the embeddings, at ``rate`` times its root mean square, falling along a cosine.

        ``solved``: where the model is that it begins with.
        """
        dense = self.untreated.dense
        model = type(dense).from_pretrained(solved, dtype=torch.float32).eval()
        masks = preserve_masks(model)
        model.get_input_embeddings().requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": [each], "size": size_of(each) * rate} for each in trained]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        generator, step, steps = torch.Generator().manual_seed(0), 0, epochs * len(self.untreated.tokens_NL)
        for _ in range(epochs):
            for index in torch.randperm(len(self.untreated.tokens_NL), generator=generator).tolist():
                tokens_1L = self.untreated.tokens_NL[index : index + 1]
                with torch.no_grad():
                    target_LV = dense(tokens_1L, use_cache=False).logits[0].float().log_softmax(-1)
                with torch.autocast("cpu", torch.bfloat16):
                    found_LV = model(tokens_1L, use_cache=False).logits[0]
                loss = torch.nn.functional.kl_div(
                    found_LV.float().log_softmax(-1), target_LV, reduction="batchmean", log_target=True
                )
                loss.backward()
                for group in optimizer.param_groups:
                    group["lr"] = group["size"] * 0.5 * (1.0 + math.cos(math.pi * step / steps))
                optimizer.step()
                optimizer.zero_grad()
                step += 1
        masks.remove()
        return model.to(dense.dtype)


def main() -> None:
    parser = make_parser(__doc__, learning_rates=[1e-3, 3e-3])
    parser.add_argument("--evaluation", nargs="+", required=True, help="text to measure perplexity on")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=20)
    options = parser.parse_args()
    untreated = read(options)
    texts = [list(load_documents(options.evaluation)), untreated.held_out]
    windows = (evaluation_windows(text, untreated.tokenizer, options.window, options.max_windows) for text in texts)
    bench = Bench(untreated, tuple(windows))
    print(heading(options))
    print("\n| | perplexity: evaluation / held out | seconds | peak GB |\n| --- | ---: | ---: | ---: |")
    bench.row("dense", lambda: untreated.dense)
    with tempfile.TemporaryDirectory() as place:
        # Saved, and no longer held: it would count in the memory of the rows behind it. Its zeros are the mask.
        bench.row("mask found, solved", lambda: untreated.pruned(untreated.recipe)).save_pretrained(place)
        same_mask = untreated.recipe.replace(
            selector="external", mask_from=place, sparsity=None, pattern=[], allocation="uniform",
            tuning_epochs=options.epochs, tuning_fraction=1.0, learning_rate=RATE,
        )  # fmt: skip
        name = f"solved and tuned by blocks, {options.epochs} epochs, rate {same_mask.learning_rate:g}"
        bench.row(name, lambda: untreated.pruned(same_mask))
        for rate in options.learning_rates:
            name = f"distilled, {options.epochs} epochs, rate {rate:g}"
            bench.row(name, lambda rate=rate: bench.distilled(place, options.epochs, rate))


if __name__ == "__main__":
    main()
