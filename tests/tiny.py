"""What several tests build: a tokenizer, models of a few thousand weights, and directories that hold both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from optima.models.blocks import Block, find_stacks

LINES = ["The quick brown fox jumps over the lazy dog.", "Pack my box with five dozen jugs.", "the fox\n\nthe dog"]
TEMPLATES = {"none": None, "bos": "<s> $A", "bert": "[CLS] $A [SEP]", "eos": "$A </s>"}
SPECIAL = ["<s>", "</s>", "[CLS]", "[SEP]"]
VOCAB = 300
POSITIONS = 64
TEXT = " ".join(LINES) * 20
WEIGHTS = "model.safetensors"

Refused = Callable[..., str]  # runs a command, expecting a refusal; returns the message


def make_tokenizer(template: str = "bos", **options: object) -> PreTrainedTokenizerFast:
    """A byte-level BPE: ids 0..3 are the special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    pattern = TEMPLATES[template]
    if pattern is not None:
        ids = [(token, backend.token_to_id(token)) for token in SPECIAL]
        backend.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def make_llama(**options: object) -> LlamaForCausalLM:
    """Two blocks of width 32 with grouped queries, random weights."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB,
        "max_position_embeddings": POSITIONS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | options)).eval()


def make_bert() -> BertModel:
    """A two-block encoder without a head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        max_position_embeddings=POSITIONS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return BertModel(config).eval()


def make_tokens(samples: int = 5, length: int = 16) -> Tensor:
    """Random token ids, (samples, length)."""
    return torch.randint(len(SPECIAL), VOCAB, (samples, length), generator=torch.Generator().manual_seed(1))


def save_model(directory: Path, model: PreTrainedModel | None = None, template: str | None = "bos") -> Path:
    """A checkpoint directory with its tokenizer (none if ``template`` is None)."""
    (make_llama() if model is None else model).save_pretrained(directory)
    if template is not None:
        make_tokenizer(template).save_pretrained(directory)
    return directory


def weight_files(directory: Path) -> dict[str, bytes]:
    """The safetensors files of a checkpoint, and its index if it has one."""
    return {path.name: path.read_bytes() for path in directory.glob("model*.safetensors*")}


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, in one file or many."""
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def save_text(file: Path, text: str = TEXT) -> Path:
    """A text file, long enough for a few tiny calibration sequences."""
    file.write_text(text, encoding="utf-8")
    return file


def blocks_of(model: nn.Module) -> tuple[Block, ...]:
    """The model's blocks with all their linears."""
    (stack,) = find_stacks(model)
    return stack.blocks


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Every path below ``directory``, hidden ones too, with the bytes of the files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def prune_arguments(*options: str, model: str = "model") -> list[str]:
    """``optima prune model --output-dir out`` on text.txt, a few tokens; later options override."""
    size = ["--num-calibration-samples", "4", "--max-seq-length", "16", "--batch-size", "2"]
    return ["prune", model, "--output-dir", "out", "--dataset", "text.txt", *size, *options]


class NoBackward(torch.autograd.Function):
    """A kernel without a backward pass."""

    @staticmethod
    def forward(ctx: object, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()
