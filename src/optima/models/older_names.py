"""Names in config.json that readers from before transformers 5 look for: it writes the same under others.

transformers 4, and servers built on it, know rotary embeddings by ``rope_theta`` and ``rope_scaling``. Where these are
missing they compute with their own defaults, and say nothing (``rope_parameters`` is not read there).
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from optima.models.source import Source, explain_read_errors

_logger = logging.getLogger("optima")

ROTARY = re.compile("rope|rotary")
DTYPE, OLD_DTYPE = "dtype", "torch_dtype"


def keep_older_names(config: PretrainedConfig, source: Source | None, directory: Path) -> None:
    """Add them to the config.json in ``directory``: as the source has them, else by what is written there.

    Left out if transformers would then read another configuration.
    """
    file = directory / "config.json"
    text = file.read_text(encoding="utf-8")
    saved = json.loads(text)
    if source is None or source.gguf_file:
        older = _derived(saved)
    else:
        with explain_read_errors(source, "configuration"):
            older = PretrainedConfig.get_config_dict(source.path, **source.of_hub)[0]
    found = _carried(older, saved)
    if found == saved:
        return
    before = type(config).from_pretrained(directory).to_dict()
    file.write_text(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    after = type(config).from_pretrained(directory).to_dict()
    if before != {key: after.get(key) for key in before}:  # names that mean nothing there may be there
        file.write_text(text, encoding="utf-8")
        _logger.warning("config.json has rotary embeddings as transformers 5 names them: older ones read them wrongly")


def _carried(older: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """``saved`` with those of ``older``, in the configurations inside it too."""
    found = dict(saved)
    for key, value in older.items():
        if isinstance(value, dict) and isinstance(saved.get(key), dict):
            found[key] = _carried(value, saved[key])
        elif key == OLD_DTYPE and DTYPE in saved:
            found[key] = saved[DTYPE]
        elif key not in saved and ROTARY.search(key):
            found[key] = value
    return found


def _derived(saved: dict[str, Any]) -> dict[str, Any]:
    """From rotary embeddings that all layers share: others have names of their model's own."""
    older = {key: _derived(value) for key, value in saved.items() if isinstance(value, dict)}
    rotary = saved.get("rope_parameters")
    if isinstance(rotary, dict) and "rope_theta" in rotary:
        scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
        older |= {key: value for key, value in rotary.items() if key not in scaling}
        if scaling.get("rope_type", "default") != "default":
            older["rope_scaling"] = scaling
    return older
