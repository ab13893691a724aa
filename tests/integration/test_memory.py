"""Peak memory of pruning stays within what the plan states, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, LlamaForCausalLM
from optima import Recipe, prune
from optima.device import PeakMemory
from optima.models.source import find_source
from optima.plan import make_plan

directory, options, samples, layers = json.loads(sys.argv[1])
recipe = Recipe(num_calibration_samples=samples, max_seq_length=128, device="cpu", **options)
plan = make_plan(find_source(directory), recipe)

def peak(layers):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers = layers
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(0, 64, (samples, 128))
    memory = PeakMemory(torch.device("cpu"))
    prune(model, recipe, calibration=tokens)
    return memory.peak() - memory.baseline

peak(1)  # the first run also pays for the libraries' own buffers
print(plan.work_bytes + plan.inputs_bytes, peak(layers))
"""
SIZES = {
    "optima": (512, 2048, {"selector": "optima"}),
    "alps, wide": (256, 2816, {"selector": "alps"}),
}


@pytest.mark.parametrize(("hidden", "intermediate", "options"), SIZES.values(), ids=SIZES)
def test_peak_memory_is_within_the_plan(
    hidden: int, intermediate: int, options: dict[str, str], tmp_path: Path
) -> None:
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=64, max_position_embeddings=512, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    arguments = json.dumps([str(tmp_path), options, 4, config.num_hidden_layers])
    command = [sys.executable, "-c", SCRIPT, arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    predicted, measured = map(int, result.stdout.split())
    print(f"predicted {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert measured <= predicted
