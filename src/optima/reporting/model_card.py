"""The model card: README.md of a pruned checkpoint, as the hub shows it.

Its head (licence, languages, ...) is taken over from the dense model's card. Of that card's text nothing is, for it
speaks of another model. Paths of this machine are left out: a card is published.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from optima.errors import ModelError
from optima.models.files import TOKENIZERS, explain_write_errors, write_whole
from optima.models.own_code import auto_class
from optima.models.weights import LEFT_OUT
from optima.patterns import parse_nm
from optima.reporting.markdown import table
from optima.reporting.record import GIVEN_NOTE, OBJECT_NOTE, Report
from optima.reporting.summary import bullets, pattern_weights, summary
from optima.runtimes import HEADING, table_rows

CARD_NAME = "README.md"
BEGIN, END = "<!-- optima:results -->", "<!-- /optima:results -->"  # what eval --save replaces
TAGS = ("pruning", "sparse", "optima")
SETTINGS = ("selector", "sparsity", "pattern", "scope", "allocation", "keep_dense", "swaps", "objective", "solver")
MORE_SETTINGS = (
    "gap",
    "damping",
    "rounding",
    "sink_weight",
    "swept_share",
    "allocation_spread",
    "tuning_epochs",
    "tuning_share",
    "learning_rate",
    "num_calibration_samples",
    "max_seq_length",
    "self_generated",
    "seed",
)
OFF_AT_ZERO, OF_TUNING = ("swaps", "self_generated"), {"tuning_epochs", "tuning_share", "learning_rate"}
AGAIN = "`recipe.yaml` gives the same run again{}."
ON_GIVEN = " on the same calibration text, which the caller gave"
BY_OBJECT = " with the selector's settings, which are in `report.json` alone"
NOT_YET = "Not evaluated yet: `optima eval DENSE THIS --save` writes its results here."

WITHOUT = ", without weights that transformers has no place for: {}"

BODY = """
# {title}

{origin} with **{sparsity} of the weights** in {count} linears set to zero, in one shot, by OPTIMA.
It is an ordinary checkpoint with the names and shapes of the dense one{but}.

## How to load

{load}

Where the weights end in `.packed.safetensors`, run `optima unpack` on the directory first.

## What came out

{summary}

## How it was pruned

{settings}

{again} `report.html` and `report.json` say what every linear lost.

## Results

{begin}
{results}
{end}

## What runs it

{runtimes}

## Limits

{limits}
"""

LOAD = """
```python
from transformers import {names}

model = {loader}.from_pretrained("PATH_OR_REPO", dtype="auto"{trust})
{tokenizer}```
""".strip()
LOAD_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO"{trust})\n'
NO_TOKENIZER = "\n\nThe tokenizer was not given, and is not here: take the dense model's."

LIMITS = (
    "The certificate is about each linear's error on the calibration text, before cast and tuning, not about tasks.",
    "Nothing was trained after pruning, but for what the table calls `tuning_epochs`.",
    "Embeddings, norms and whatever the report names as dense were not pruned. Tuning moves norms and biases too.",
    "The dense model's licence, intended use and biases are this model's too; read its card.",
)


def write_card(directory: Path, report: Report, base_model: str | None) -> None:
    """Write the card of a pruned checkpoint.

    Args:
        directory: of the checkpoint; the head of a README.md that is there is kept.
        report: of the run.
        base_model: hub id of the dense model, if it has one.
    """
    file = directory / CARD_NAME
    head = (metadata_load(file) or {}) if file.is_file() else {}
    card = ModelCard(f"---\n{_card_data(head, report, base_model).to_yaml()}\n---\n{_body(directory, report)}")
    file.write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def add_results(directory: Path, name: str, results: Sequence[EvalResult], text: str) -> bool:
    """Put results into a card's head, and between the marks of its section; False where there is no card.

    Args:
        directory: of the checkpoint.
        name: of the model, for the head.
        results: for the head; earlier ones of other data sets stay.
        text: Markdown for the section.

    Raises:
        ModelError: if the card's head cannot be read.
    """
    file = directory / CARD_NAME
    if (card := check_card(directory)) is None:
        return False
    data = card.data
    assert isinstance(data, ModelCardData)
    mine = {(each.dataset_type, each.dataset_config, each.dataset_split) for each in results}
    earlier = [
        each
        for each in data.eval_results or []
        if (each.dataset_type, each.dataset_config, each.dataset_split) not in mine
    ]
    data.model_name = name
    data.eval_results = [*earlier, *results]
    begin, end = card.text.find(BEGIN), card.text.find(END)
    if 0 <= begin < end:  # whoever took the marks away writes the section himself
        card.text = f"{card.text[: begin + len(BEGIN)]}\n{text}\n{card.text[end:]}"
    with explain_write_errors(file, "see that it may be written, and measure again"):
        write_whole(file, f"{str(card).rstrip()}\n".encode())
    return True


def check_card(directory: Path) -> ModelCard | None:
    """The card in ``directory``; None if there is none.

    Raises:
        ModelError: if its head cannot be read.
    """
    file = directory / CARD_NAME
    if not file.is_file():
        return None
    try:
        return ModelCard(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ModelError(f"the head of {file} cannot be read ({text}): correct it, or remove the file") from error


def short_name(model: str) -> str:
    """A hub id as it is; of a path, the last part."""
    return Path(model).expanduser().resolve().name if os.path.exists(os.path.expanduser(model)) else model


def _card_data(head: dict[str, Any], report: Report, base_model: str | None) -> ModelCardData:
    patterns = sorted({linear.pattern for linear in report.linears if parse_nm(linear.pattern)})
    tags = head.pop("tags", None) or []
    head["tags"] = [*([tags] if isinstance(tags, str) else tags), *TAGS, *patterns]
    head.setdefault("library_name", "transformers")
    if base_model is not None:
        head["base_model"] = base_model
        head["base_model_relation"] = "finetune"  # the hub has no word for pruned; this one lists it under the model
    return ModelCardData(**head)


def _body(directory: Path, report: Report) -> str:
    recipe = report.run.recipe
    name = short_name(report.run.model)
    idle = set() if any(block.tuning for block in report.blocks) else OF_TUNING
    idle |= set() if recipe.get("objective") == "loss" else {"swept_share"}
    idle |= {"gap"} if recipe.get("solver") == "none" else set()
    told = [key for key in SETTINGS + MORE_SETTINGS if recipe.get(key) not in (None, []) and key not in idle]
    rows = [[key, _plain(recipe[key])] for key in told if recipe[key] or key not in OFF_AT_ZERO]
    given = GIVEN_NOTE in report.run.notes
    by_object = any(note.startswith(OBJECT_NOTE) for note in report.run.notes)
    lost = [note.removesuffix(LEFT_OUT[1]) for note in report.run.notes if note.endswith(LEFT_OUT[1])]
    texts = [short_name(text) for text in dict.fromkeys(recipe.get("dataset", []))]
    rows.append(["calibration text", "given by the caller" if given else ", ".join(texts)])
    rows += [[f"{library} version", version] for library, version in report.run.versions.items()]
    return BODY.format(
        title=f"{name}, {report.sparsity:.0%} sparse",
        origin=f"`{name}`",
        sparsity=f"{report.sparsity:.1%}",
        count=len(report.linears) + len(report.run.kept_dense),
        but="".join(WITHOUT.format(note.partition(LEFT_OUT[0])[2]) for note in lost),
        load=_load(directory),
        again=AGAIN.format((ON_GIVEN if given else "") + (BY_OBJECT if by_object else "")),
        summary=bullets(summary(report)),
        settings=table(["setting", "value"], rows, num_left=2),
        begin=BEGIN,
        results=NOT_YET,
        end=END,
        runtimes=table(HEADING, table_rows(pattern_weights(report.linears)), num_left=len(HEADING)),
        limits=bullets(LIMITS),
    )


def _load(directory: Path) -> str:
    loader, trust = _loader(directory), ", trust_remote_code=True" if _config(directory).get("auto_map") else ""
    if not any(any(directory.glob(name)) for name in TOKENIZERS):
        return LOAD.format(names=loader, loader=loader, trust=trust, tokenizer="") + NO_TOKENIZER
    tokenizer = LOAD_TOKENIZER.format(trust=trust)
    return LOAD.format(names=f"AutoTokenizer, {loader}", loader=loader, trust=trust, tokenizer=tokenizer)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def _loader(directory: Path) -> str:
    """The class of transformers that loads the checkpoint with its head, if it has one."""
    config = _config(directory)
    names = config.get("architectures") or []
    if (auto := auto_class(config.get("auto_map") or {}, names)) is not None:
        return auto
    if any(name.endswith("ForCausalLM") for name in names):
        return "AutoModelForCausalLM"
    return next((name for name in names if hasattr(transformers, name)), "AutoModel")
