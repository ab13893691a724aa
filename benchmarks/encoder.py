"""How far pruning moves the sentence embeddings of an encoder: cosine similarity with those of the dense model.

    python benchmarks/encoder.py MODEL --text c4.jsonl

Calibrates on the first 80% of the documents and measures on sentences of the others. Embeddings are means over tokens,
as all-MiniLM-L6-v2 takes them. Prints Markdown: the mean, and the tenth percentile, of the similarity.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from harness.machine import machine
from harness.text import split
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima import Recipe, prune
from optima.data.text import calibration_tokens
from optima.models.load import find_source, load_model, load_tokenizer

METHODS = {
    "magnitude": Recipe(selector="magnitude", solver="none"),
    "wanda": Recipe(selector="wanda", solver="none"),
    "wanda, re-solved": Recipe(selector="wanda", objective="sink", tuning_epochs=0),
    "objective loss": Recipe(tuning_epochs=0),
    "the default recipe": Recipe(),
    "objective loss, tuned": Recipe(tuning_epochs=4, learning_rate=3e-3, tuning_fraction=1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or local directory")
    parser.add_argument("--text", nargs="+", required=True, help="documents to calibrate and to measure on")
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--num-calibration-samples", type=int, default=256)
    parser.add_argument("--max-seq-length", type=int, default=128)
    parser.add_argument("--sentences", type=int, default=500)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = find_source(options.model)
    model, tokenizer = load_model(source), load_tokenizer(source)
    documents, held_out = split(options.text, held_out=0.2, seed=0)
    samples, length = options.num_calibration_samples, options.max_seq_length
    tokens_NL = calibration_tokens(documents, tokenizer, samples, length)
    sentences = [s for text in held_out for s in text.split(". ") if 20 < len(s) < 300][: options.sentences]
    dense_NE = embeddings(model, tokenizer, sentences)
    print(f"{machine(torch.device('cpu'), options.threads)}\n{Path(options.model).name}, {len(sentences)} sentences\n")
    print("| mean (tenth percentile) | " + " | ".join(options.patterns) + " |")
    print("| --- |" + " ---: |" * len(options.patterns))
    for name, recipe in METHODS.items():
        cells = []
        for pattern in options.patterns:
            sparse = copy.deepcopy(model)
            prune(sparse, with_pattern(recipe, pattern), calibration=tokens_NL)
            cosine_N = (embeddings(sparse, tokenizer, sentences) * dense_NE).sum(dim=1)
            cells.append(f"{cosine_N.mean():.3f} ({cosine_N.quantile(0.1):.3f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def with_pattern(recipe: Recipe, pattern: str) -> Recipe:
    return Recipe(**(recipe.to_dict() | {"pattern": [pattern]}))


@torch.no_grad()
def embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> Tensor:
    """Unit vectors, (sentences, E)."""
    found = []
    for start in range(0, len(sentences), 50):
        batch = tokenizer(sentences[start : start + 50], return_tensors="pt", padding=True, truncation=True)
        hidden_NLE, mask_NL1 = model(**batch).last_hidden_state.float(), batch["attention_mask"][:, :, None]
        found.append(torch.nn.functional.normalize((hidden_NLE * mask_NL1).sum(1) / mask_NL1.sum(1), dim=1))
    return torch.cat(found)


if __name__ == "__main__":
    main()
