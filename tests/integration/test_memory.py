"""Peak memory of pruning stays below the plan's bound, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import psutil
import torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from optima.calibration.activations import capture
from optima.device import PeakMemory
from optima.prune import prune_stack
from optima.state import RunState
from optima.plan import LIBRARIES_BYTES, peak_bytes, resolve
from optima.recipe import Recipe

config = LlamaConfig(
    hidden_size={hidden}, intermediate_size={intermediate}, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=64, max_position_embeddings=512,
)
options = dict(batch_size={batch}, max_seq_length={length}, num_calibration_samples={samples})
recipe = Recipe(sparsity=0.5, objective="sink", selector="{selector}", **options)
CPU = torch.device("cpu")
with torch.device("meta"):
    skeleton = LlamaForCausalLM(config)
predicted = peak_bytes(resolve(skeleton, recipe, CPU), streamed=False)[0] - LIBRARIES_BYTES

def prune(layers):
    torch.manual_seed(0)
    config.num_hidden_layers = layers
    model = LlamaForCausalLM(config).eval()
    found = resolve(model, recipe, CPU)
    batches = list(torch.randint(0, 64, ({samples}, {length})).split({batch}))
    acts = capture(model, found.stacks[0], batches)
    before, memory = psutil.Process().memory_info().rss, PeakMemory(CPU)
    run = RunState(found.recipe, found.methods, CPU)
    prune_stack(found.stacks[0], acts, None, None, found.patterns, run)
    return memory.peak() - before

prune(1)  # the first run also pays for the libraries' own buffers
print(predicted, prune(2))
"""

FEW = {"batch": 2, "length": 128, "samples": 4}
MANY = {"batch": 16, "length": 512, "samples": 16}
SIZES = {
    "optima": {"hidden": 512, "intermediate": 1408, "selector": "optima", **FEW},
    "alps, wide": {"hidden": 256, "intermediate": 2048, "selector": "alps", **FEW},
    "thanos, wide": {"hidden": 256, "intermediate": 1408, "selector": "thanos", **FEW},
    "activation-bound": {"hidden": 256, "intermediate": 512, "selector": "wanda", **MANY},
}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_peak_memory_is_below_the_bound(sizes: dict[str, object]) -> None:
    script = SCRIPT.format(**sizes)
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    predicted, measured = map(int, result.stdout.split())
    print(f"bound {predicted / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert measured <= predicted
