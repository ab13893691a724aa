"""How much of what distilling the whole model under a mask gains, the tuning of blocks gains, and at what cost.

    python benchmarks/distil.py MODEL --calibration c4.jsonl --evaluation wikitext2_test.txt --pattern 0.7

One mask, the default selector's with sparsity shared out, under three treatments of the weights that survive: solved;
solved and tuned block by block; solved and distilled, which is gradient steps on all of them at once towards the dense
model's predictions. Distilling holds weights, gradients, Adam's moments and the dense model in memory. The last fifth
of the calibration text is measured on too; nothing is calibrated on it. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness.table import machine
from harness.text import split
from torch import Tensor
from transformers import PreTrainedModel

from optima import Recipe, hold_zeros, prune
from optima.calibration.text import Documents, TextSource, calibration_tokens
from optima.device import PeakMemory
from optima.evaluation.perplexity import evaluation_windows, perplexity
from optima.models.source import find_source, load_model, load_tokenizer
from optima.tuning import size_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Bench:
    """What every treatment shares."""

    dense: PreTrainedModel
    tokens_NL: Tensor
    texts: tuple[Tensor, ...]  # windows to measure on

    def row(self, name: str, treat: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """Treat and measure; the model that comes out."""
        memory, started = PeakMemory(CPU), time.perf_counter()
        model = treat()
        seconds, peak = time.perf_counter() - started, memory.peak()
        found = " / ".join(f"{perplexity(model, windows_NL):.2f}" for windows_NL in self.texts)
        print(f"| {name} | {found} | {seconds:.0f} | {peak / 1e9:.2f} |", flush=True)
        return model

    def pruned(self, recipe: Recipe) -> PreTrainedModel:
        model = copy.deepcopy(self.dense)
        prune(model, recipe, calibration=self.tokens_NL, progress=False)
        return model

    def distilled(self, solved: PreTrainedModel, epochs: int, rate: float) -> PreTrainedModel:
        """Adam on every tensor but the embeddings, at ``rate`` times its root mean square, falling along a cosine."""
        model = copy.deepcopy(solved).float()
        held = hold_zeros(model)
        model.get_input_embeddings().requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [{"params": [each], "size": size_of(each) * rate} for each in trained]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        generator, step, steps = torch.Generator().manual_seed(0), 0, epochs * len(self.tokens_NL)
        for _ in range(epochs):
            for index in torch.randperm(len(self.tokens_NL), generator=generator).tolist():
                tokens_1L = self.tokens_NL[index : index + 1]
                with torch.no_grad():
                    target_LV = self.dense(tokens_1L, use_cache=False).logits[0].float().log_softmax(-1)
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
        held.remove()
        return model.to(solved.dtype)


def main() -> None:
    options = make_parser().parse_args()
    torch.set_num_threads(options.threads)
    source = find_source(options.model)
    dense, tokenizer = load_model(source, options.dtype), load_tokenizer(source)
    samples, length = options.num_calibration_samples, options.max_seq_length
    documents, held_out = split(TextSource(tuple(options.calibration)), held_out=0.2, seed=0)
    texts = [list(Documents(TextSource(tuple(options.evaluation)))), held_out]
    windows = tuple(evaluation_windows(text, tokenizer, options.window, options.max_windows) for text in texts)
    bench = Bench(dense, calibration_tokens(documents, tokenizer, samples, length), windows)
    print(
        f"{machine(CPU, options.threads)}\n{Path(options.model).name}, {samples} x {length} tokens, {options.pattern}"
    )
    print("\n| | perplexity: evaluation / held out | seconds | peak GB |\n| --- | ---: | ---: | ---: |")
    bench.row("dense", lambda: dense)
    recipe = Recipe(pattern=[options.pattern], allocation="uniform" if ":" in options.pattern else "loss")
    solved = bench.row("solved", lambda: bench.pruned(recipe))
    with tempfile.TemporaryDirectory() as place:
        solved.save_pretrained(place)  # whose zeros are the mask
        same_mask = Recipe(selector="external", mask_from=place, objective="loss", tuning_epochs=options.epochs)
        bench.row(f"tuned by blocks, {options.epochs} epochs", lambda: bench.pruned(same_mask))
    for rate in options.learning_rates:
        name = f"distilled, {options.epochs} epochs, rate {rate:g}"
        bench.row(name, lambda rate=rate: bench.distilled(solved, options.epochs, rate))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local directory or GGUF file")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", nargs="+", required=True, help="text to measure perplexity on")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-3, 3e-3], help="of distilling")
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-windows", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


if __name__ == "__main__":
    main()
