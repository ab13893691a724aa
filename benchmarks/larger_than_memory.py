"""Prune a model that is larger than the memory a run may have, and compare with a run that may have all of it.

A Llama-shaped checkpoint of random weights is written. A first run is held to a hard limit of anonymous memory: the
kernel refuses it more (RLIMIT_DATA: the heap and private mappings; pages of mapped files do not count). A second run
has no limit. Their outputs are compared file by file.

    python benchmarks/larger_than_memory.py    # 12 GB within 3 GiB
    python benchmarks/larger_than_memory.py --gigabytes 1 --limit 1GiB --width 1024 --solver none    # a quick look
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import optima

SEQUENCES, LENGTH, VOCABULARY = 4, 128, 4096
HEAD = 128  # width of an attention head
# What is compared: all but the report, which tells the time of the run.
WRITTEN = ("*.safetensors", "*.json")


def config(width: int, gigabytes: float) -> LlamaConfig:
    """A Llama with as many blocks of ``width`` as it takes."""
    settings: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "architectures": ["LlamaForCausalLM"],
    }
    block = 2 * (4 * width**2 + 3 * 2 * width**2)
    return LlamaConfig(num_hidden_layers=max(round(gigabytes * 1e9 / block), 1), **settings)


def write_checkpoint(directory: Path, wanted: LlamaConfig) -> int:
    """Random weights, a file a block, never two of them in memory; bytes written."""
    with torch.device("meta"):
        shapes = LlamaForCausalLM(wanted).state_dict()
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "outside"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    directory.mkdir(parents=True)
    size = 0
    for file, names in files.items():
        tensors = {
            name: torch.ones(shapes[name].shape, dtype=torch.bfloat16)
            if name.endswith("norm.weight")
            else torch.randn(shapes[name].shape, generator=generator).mul_(0.02).bfloat16()
            for name in names
        }
        save_file(tensors, directory / file, {"format": "pt"})
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {name: file for file in files for name in files[file]}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    wanted.save_pretrained(directory)
    return size


def prune(model: Path, out: Path, solver: str, limit: int | None) -> None:
    """In this process, which may not have more anonymous memory than ``limit``."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    recipe = optima.Recipe(selector="wanda", solver=solver, objective="sink")
    optima.prune(model, recipe, output_dir=out, tokenizer=tokenizer(), calibration=tokens)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of numbers: the text is given as tokens."""
    vocabulary = {str(token): token for token in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="0")))


def digests(out: Path) -> dict[str, str]:
    """Of every file of the checkpoint."""
    found = {}
    for file in sorted(file for pattern in WRITTEN for file in out.glob(pattern)):
        with file.open("rb") as opened:
            found[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    found.pop("report.json", None)
    return found


def run(model: Path, out: Path, solver: str, limit: int | None) -> float:
    """Prune in a process of its own; its seconds."""
    command = [sys.executable, __file__, "--child", str(model), str(out), solver, str(limit or 0)]
    started = time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"MALLOC_ARENA_MAX": "2"})
    return time.perf_counter() - started


def main() -> None:
    """Write, prune twice, compare."""
    if sys.argv[1:2] == ["--child"]:
        model, out, solver, limit = sys.argv[2:]
        prune(Path(model), Path(out), solver, int(limit) or None)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12.0, help="of weights")
    parser.add_argument("--width", type=int, default=3072, help="of the hidden states; a block has 20 width^2 bytes")
    parser.add_argument("--limit", type=TypeAdapter(ByteSize).validate_python, default="3GiB", help="anonymous memory")
    parser.add_argument("--solver", default="auto", help="none: masks alone, in a fraction of the time")
    parser.add_argument("--directory", type=Path, help="on a disk with room for three such models")
    options = parser.parse_args()
    limit = TypeAdapter(ByteSize).validate_python(options.limit)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        model = Path(directory, "model")
        size = write_checkpoint(model, config(options.width, options.gigabytes))
        print(f"weights {size / 1e9:.2f} GB, limit of anonymous memory {limit / 2**30:.2f} GiB", flush=True)
        outputs = []
        for name, bound in (("limited", limit), ("unlimited", None)):
            out = Path(directory, name)
            seconds = run(model, out, options.solver, bound)
            peak = optima.load_report(out).run.peak_memory_bytes
            print(f"{name}: {seconds:.0f} s, peak resident memory {peak / 2**30:.2f} GiB", flush=True)
            outputs.append(digests(out))
    limited, unlimited = outputs
    different = [name for name in sorted({*limited, *unlimited}) if limited.get(name) != unlimited.get(name)]
    print(f"{len(limited)} files compared, {len(different)} different {different}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
