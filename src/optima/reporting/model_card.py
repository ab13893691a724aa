"""The model card: README.md of a pruned checkpoint, as the hub shows it.

Its metadata (licence, languages, ...) comes from the dense model's card, its text does not. A card is published, so it
has no paths of this machine.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import transformers
from huggingface_hub import ModelCard, ModelCardData, metadata_load

from optima.console import printable
from optima.files import TOKENIZERS
from optima.models.load import auto_class
from optima.patterns import parse_nm
from optima.reporting.markdown import table
from optima.reporting.record import Report
from optima.reporting.summary import bullets, code, names_of, summary

CARD_NAME = "README.md"
TAGS = ("pruning", "sparse", "optima")
# Settings that the card names: the method, not where and on what it ran.
SHOWN = (
    *("sparsity", "pattern", "selector", "mask_from", "objective", "allocation", "scope", "solver", "gap", "damping"),
    *("tuning_epochs", "learning_rate", "self_generated", "num_calibration_samples", "max_seq_length", "seed"),
)
BODY = """
# {title}

{name} with **{sparsity:.1%} of the weights** of {count} linear layers set to zero, pruned after training by OPTIMA.
It is an ordinary checkpoint with the names and shapes of the dense model's weights{without}.

```python
from transformers import {classes}

{load}
```{no_tokenizer}

## Summary

{summary}

## Settings

{settings}

`recipe.yaml` repeats the run{again}. `report.html` and `report.json` have the error of every linear layer.

## Results

Measure it with `optima eval DENSE THIS`; `evaluation.json`, if it is here, has results.

## Limits

- A certificate is about the error of a linear layer on the calibration text, not about tasks.
- Embeddings, norms and the layers that the report names as excluded are not pruned.
- The dense model's licence, intended use and biases apply to this model; read its card.
"""


def write_card(directory: Path, report: Report, base_model: str | None) -> None:
    """Write the card of a pruned checkpoint; the metadata of a README.md in ``directory`` is kept.

    Args:
        directory: of the checkpoint.
        report: of the run.
        base_model: hub id of the dense model, if it has one.
    """
    file = directory / CARD_NAME
    head = (metadata_load(file) or {}) if file.is_file() else {}
    tags = head.pop("tags", None) or []
    patterns = sorted({linear.pattern for linear in report.linears if parse_nm(linear.pattern)})
    head["tags"] = [*([tags] if isinstance(tags, str) else tags), *TAGS, *patterns]
    head.setdefault("library_name", "transformers")
    if base_model is not None:
        head["base_model"] = base_model
        head["base_model_relation"] = "finetune"  # the hub has no relation for pruned models
    card = ModelCard(f"---\n{ModelCardData(**head).to_yaml()}\n---\n{_body(directory, report)}")
    file.write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def short_name(model: str) -> str:
    """A hub id as it is; the last part of a path."""
    return Path(model).expanduser().resolve().name if os.path.exists(os.path.expanduser(model)) else model


def _body(directory: Path, report: Report) -> str:
    run = report.run
    name = short_name(run.model)
    sources = ["passed by the caller"] if run.calibration_given else map(short_name, run.recipe.get("dataset", []))
    known = {key: str(run.recipe[key]) for key in SHOWN if run.recipe.get(key) not in (None, "")}
    known["calibration data"] = ", ".join(sources)
    known |= {f"{library} version": found for library, found in run.versions.items()}
    again = [" on the same calibration data"] * run.calibration_given
    again += [" with the selector's settings from `report.json`"] * run.selector_is_object
    classes, load = _loading(directory)
    left_out = f", without weights that transformers has no place for: {names_of(run.weights_left_out)}"
    return BODY.format(
        title=f"{printable(name).replace('<', '&lt;')}, {report.sparsity:.0%} sparse",
        name=code(name),
        sparsity=report.sparsity,
        count=len(report.linears),
        without=left_out if run.weights_left_out else "",
        classes=classes,
        load=load,
        no_tokenizer="" if "tokenizer" in load else "\n\nThe tokenizer is not included: use the dense model's.",
        summary=bullets(summary(report)),
        settings=table(["setting", "value"], [[key, printable(value)] for key, value in known.items()], num_left=2),
        again=" and".join(again),
    )


def _loading(directory: Path) -> tuple[str, str]:
    """The classes of transformers that load the checkpoint, with its head if it has one, and the lines that do."""
    config = json.loads(file.read_text()) if (file := directory / "config.json").is_file() else {}
    names, own = config.get("architectures") or [], config.get("auto_map") or {}
    loader = auto_class(own, names)
    if loader is None and any(name.endswith("ForCausalLM") for name in names):
        loader = "AutoModelForCausalLM"
    loader = loader or next((name for name in names if hasattr(transformers, name)), "AutoModel")
    trust = ", trust_remote_code=True" if own else ""
    load = f'model = {loader}.from_pretrained("PATH_OR_REPO", dtype="auto"{trust})'
    if not any(any(directory.glob(each)) for each in TOKENIZERS):
        return loader, load
    return f"AutoTokenizer, {loader}", f'{load}\ntokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO"{trust})'
