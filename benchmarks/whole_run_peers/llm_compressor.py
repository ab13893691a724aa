"""SparseGPT of llm-compressor as its documentation runs it; for an environment of its own (pip install llmcompressor).

python llm_compressor.py MODEL --tokens TOKENS --output OUT --sparsity 0.5 --threads 1
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", required=True, help="safetensors file with tokens, (samples, length)")
    parser.add_argument("--output", required=True)
    parser.add_argument("--sparsity", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = load_file(options.tokens)["tokens"]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=SparseGPTModifier(sparsity=options.sparsity, targets=["Linear"], ignore=["re:.*lm_head"]),
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    model.save_pretrained(options.output, save_compressed=False)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
