"""Names in config.json that readers from before transformers 5 look for: it writes the same under others.

transformers 4, and servers built on it, know rotary embeddings by ``rope_theta`` and ``rope_scaling``. Where these are
missing they compute with their own defaults, and say nothing (``rope_parameters`` is not read there).
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any, TypeGuard

from transformers import PretrainedConfig

from optima.models.failures import BAD_INPUT
from optima.models.source import Source, explain_read_errors

_logger = logging.getLogger("optima")

ROTARY, THETA, TYPE, PARTIAL = "rope_parameters", "rope_theta", "rope_type", "partial_rotary_factor"
OLDER = re.compile("rope|rotary")
DTYPE, OLD_DTYPE = "dtype", "torch_dtype"
TEXT = "text_config"
FULL, SLIDING, LOCAL_THETA, GEMMA = "full_attention", "sliding_attention", "rope_local_base_freq", "gemma3"
UNKNOWN = "config.json has rotary embeddings as transformers 5 names them: older ones read them wrongly"


def keep_older_names(config: PretrainedConfig, source: Source | None, directory: Path) -> None:
    """Add them to the config.json in ``directory``: as the source has them, else by what is written there.

    Of rotary embeddings that differ between layers only the source knows the names, but for Gemma 3's. None are added
    if transformers would then read another configuration.
    """
    raw: dict[str, Any] = {}
    if source is not None and not source.gguf_file:
        with explain_read_errors(source, "configuration"):
            raw = PretrainedConfig.get_config_dict(source.path, **source.of_hub)[0]
    file = directory / "config.json"
    text = file.read_text(encoding="utf-8")
    saved = json.loads(text)
    raw = raw or {OLD_DTYPE: saved.get(DTYPE)}
    found = with_older(saved, raw)
    newer = any(ROTARY in each for each in _both(raw))  # the source has no older ones either
    if not newer and any(_is_by_layer(each.get(ROTARY)) and not _has_older(each) for each in _both(found)):
        _logger.warning(UNKNOWN)
    if found == saved:
        return
    try:
        before = type(config).from_pretrained(directory).to_dict()
        file.write_text(json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        after = type(config).from_pretrained(directory).to_dict()
        same = before == {key: after.get(key) for key in before}  # names that mean nothing there may be there
    except BAD_INPUT:
        same = False
    if not same:
        file.write_text(text, encoding="utf-8")
        _logger.warning(UNKNOWN)


def with_older(saved: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """A configuration, or one inside it, with the older names beside; ``raw``: the source's own."""
    found = dict(saved)
    rotary = saved.get(ROTARY)
    if _is_by_layer(rotary) and str(saved.get("model_type")).startswith(GEMMA):
        found[LOCAL_THETA], rotary = rotary[SLIDING][THETA], rotary[FULL]
    if isinstance(rotary, dict) and THETA in rotary:  # all layers share it
        scaling = {key: value for key, value in rotary.items() if key not in (THETA, PARTIAL)}
        found |= {key: value for key, value in rotary.items() if key in (THETA, PARTIAL)}
        if scaling not in ({}, {TYPE: "default"}):
            found["rope_scaling"] = scaling
    moved = TEXT in saved and TEXT not in raw  # into a configuration of its own
    found |= {key: value for key, value in raw.items() if key not in saved and OLDER.search(key) and not moved}
    if OLD_DTYPE in raw and DTYPE in saved:
        found[OLD_DTYPE] = saved[DTYPE]
    for key, inner in saved.items():
        if isinstance(inner, dict) and key != ROTARY:
            own = raw.get(key)
            found[key] = with_older(inner, own if isinstance(own, dict) else {})
    return found


def _both(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A configuration, and that of its text, if it has one."""
    return [config, config.get(TEXT) or {}]


def _has_older(config: dict[str, Any]) -> bool:
    return any(OLDER.search(key) and key != ROTARY for key in config)


def _is_by_layer(rotary: Any) -> TypeGuard[dict[str, Any]]:
    """Whether layers of two kinds have rotary embeddings of their own."""
    return isinstance(rotary, dict) and all(isinstance(rotary.get(kind), dict) for kind in (FULL, SLIDING))
