"""The model card: README.md of a pruned checkpoint, as the hub shows it.

Its metadata (licence, languages, ...) comes from the dense model's card, its text does not. A card is published, so it
has no paths of this machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from optima.console import one_line
from optima.files import TOKENIZERS
from optima.models.load import auto_class
from optima.patterns import parse_nm
from optima.reporting.markdown import table
from optima.reporting.record import Report
from optima.reporting.summary import bullets, code, names_of, summary

CARD_NAME = "README.md"
PAGE = Path(__file__).parent / "page"
# Settings that the card names: the method, not where and on what it ran.
SHOWN = (
    *(
        "neurons",
        "blocks",
        "sparsity",
        "pattern",
        "selector",
        "mask_from",
        "objective",
        "allocation",
        "scope",
        "solver",
        "gap",
        "damping",
    ),
    *("tuning_epochs", "learning_rate", "self_generated", "num_calibration_samples", "max_seq_length", "seed"),
)


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
    head["tags"] = [
        *([tags] if isinstance(tags, str) else tags),
        "pruning",
        *([] if report.sizes else ["sparse"]),
        "optima",
        *patterns,
    ]
    head.setdefault("library_name", "transformers")
    if base_model is not None:
        head["base_model"] = base_model
        head["base_model_relation"] = "finetune"  # the hub has no relation for pruned models
    card = ModelCard(f"---\n{ModelCardData(**head).to_yaml()}\n---\n\n{_body(directory, report)}")
    file.write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def short_name(model: str) -> str:
    """A hub id as it is; the last part of a path."""
    return Path(model).expanduser().resolve().name if os.path.exists(os.path.expanduser(model)) else model


def _body(directory: Path, report: Report) -> str:
    run, name = report.run, short_name(report.run.model)
    sources = ["passed by the caller"] if run.calibration_given else map(short_name, run.recipe.get("dataset", []))
    settings = {key: str(run.recipe[key]) for key in SHOWN if run.recipe.get(key) not in (None, "")}
    settings["calibration data"] = ", ".join(sources)
    settings |= {f"{library} version": found for library, found in run.versions.items()}
    config = json.loads(file.read_text()) if (file := directory / "config.json").is_file() else {}
    own = config.get("auto_map") or {}
    pages = Environment(loader=FileSystemLoader(PAGE), undefined=StrictUndefined, trim_blocks=True)
    return pages.get_template("card.md").render(
        title=one_line(name).replace("<", "&lt;"),
        name=code(name),
        report=report,
        run=run,
        left_out=names_of(run.weights_left_out),
        loader=_loader(config.get("architectures") or [], own),
        trust=", trust_remote_code=True" if own else "",
        has_tokenizer=any(any(directory.glob(each)) for each in TOKENIZERS),
        summary=bullets(summary(report)),
        settings=table(["setting", "value"], list(settings.items()), num_left=2),
    )


def _loader(names: Sequence[str], own: Mapping[str, str]) -> str:
    if loader := auto_class(own, names):
        return loader
    if any(name.endswith("ForCausalLM") for name in names):
        return "AutoModelForCausalLM"
    return next((name for name in names if hasattr(transformers, name)), "AutoModel")
