"""What distil.py and tuning.py share: a model, text of which the last fifth is held out, and one way to prune."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.table import machine
from harness.text import split
from optima import Recipe, prune
from optima.data.text import calibration_tokens
from optima.models.load import find_source, load_model, load_tokenizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Untreated:
    """What every treatment begins with.

    Attributes:
        dense: the model.
        tokenizer: its own.
        tokens_NL: what it is calibrated on.
        held_out: documents that nothing is calibrated on.
        recipe: the default's, with sparsity shared out where the pattern lets it be.
    """

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens_NL: Tensor
    held_out: list[str]
    recipe: Recipe

    def pruned(self, recipe: Recipe) -> PreTrainedModel:
        model = copy.deepcopy(self.dense)
        prune(model, recipe, calibration=self.tokens_NL, progress=False)
        return model


def read(options: argparse.Namespace) -> Untreated:
    """With the threads that ``options`` ask for from now on."""
    torch.set_num_threads(options.threads)
    source = find_source(options.model)
    dense, tokenizer = load_model(source, options.dtype), load_tokenizer(source)
    documents, held_out = split(options.calibration, held_out=0.2, seed=0)
    tokens_NL = calibration_tokens(documents, tokenizer, options.num_calibration_samples, options.max_seq_length)
    allocation = "uniform" if ":" in options.pattern else "loss"
    recipe = Recipe(pattern=[options.pattern], allocation=allocation, tuning_epochs=0)
    return Untreated(dense, tokenizer, tokens_NL, held_out, recipe)


def heading(options: argparse.Namespace) -> str:
    size = f"{options.num_calibration_samples} x {options.max_seq_length} tokens"
    return f"{machine(CPU, options.threads)}\n{Path(options.model).name}, {size}, {options.pattern}"


def make_parser(description: str | None, learning_rates: list[float]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local directory or GGUF file")
    parser.add_argument("--calibration", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--pattern", default="0.5")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=learning_rates)
    parser.add_argument("--num-calibration-samples", type=int, default=64)
    parser.add_argument("--max-seq-length", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser
