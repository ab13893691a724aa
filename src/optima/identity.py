"""What a run is: all that decides its result. A journal binds it, so that no run goes on with what another began."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optima.device import describe_device, units_of_cpu
from optima.distributed import Ranks
from optima.errors import ModelError
from optima.models.fingerprint import bytes_of, fingerprint_files, hash_tensors
from optima.models.journal import differences, shown
from optima.models.masks import MaskFiles
from optima.models.own_code import imported_files
from optima.recipe import SELECTOR_NAMES, Recipe
from optima.reporting.record import library_versions
from optima.selectors.base import Selector

# Of a configuration: its place, and what saving a model in memory adds to it.
SAVED = ("_name_or_path", "architectures", "dtype", "transformers_version")


def identity(recipe: Recipe, selector: Selector, device: torch.device, model: PreTrainedModel) -> dict[str, Any]:
    """What is known before weights and text are read.

    Names of places are no part of it where the content is: the model's path is not here, ``contents`` has its weights.

    Args:
        recipe: as resolved, but for a scope that nobody named, which what the loss says of rows may change. Its
            ``device`` does not count, what it leads to does.
        selector: as built: of one that is not the package's own, settings and code count.
        device: that the linears are solved on. Its kind counts, and on a CPU the number of threads and the instruction
            set with its units for short numbers: sums in another order are other sums. Another card of the same kind
            may go on.
        model: its class and configuration count, and code that came with it; weights are not looked at.
    """
    values = recipe.to_dict()
    del values["device"]
    versions = library_versions()
    del versions["python"]
    config = {key: value for key, value in model.config.to_dict().items() if key not in SAVED}
    return {
        "recipe": values,
        "selector": None if recipe.selector in SELECTOR_NAMES else _foreign(selector),
        "versions": versions,
        "code": _code(model),
        "class": type(model).__name__,
        "device": _kind(device),
        "configuration": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        # No part of a configuration, and in another one sums have another order.
        "attention": _implementations(model, "_attn_implementation"),
        "experts": _implementations(model, "_experts_implementation"),
    }


def _code(model: PreTrainedModel) -> str:
    """A hash of this package's code, and of what came with the checkpoint: a version says little of a clone."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    for kind in (type(model), type(model.config)):
        if kind.__module__.startswith("transformers_modules"):
            files += imported_files(Path(inspect.getfile(kind)))  # others in its folder came when someone used them
    return fingerprint_files(sorted(set(files)))


def settings_of(selector: Any) -> dict[str, Any]:
    """A selector's class and public attributes, as JSON: what it was made with, and not what it keeps for itself."""
    kind = type(selector)
    names = [*getattr(selector, "__dict__", ()), *getattr(kind, "_fields", ())]
    for parent in reversed(kind.__mro__[:-1]):
        slots = vars(parent).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
        names += [key for key, item in vars(parent).items() if _is_data(item)]
    settings = {
        key: _plain(getattr(selector, key, None))
        for key in dict.fromkeys(names)
        # What is computed is no setting.
        if not key.startswith("_") and not isinstance(getattr(kind, key, None), property | cached_property)
    }
    return {"class": _plain(kind), **settings}


def _is_data(item: Any) -> bool:
    """Whether an attribute of a class is a setting: what cannot change, for a run may fill what can."""
    return isinstance(item, bool | int | float | str | tuple | frozenset | PurePath | torch.dtype)


def _foreign(selector: Selector) -> dict[str, Any]:
    """What is known of a selector that is not the package's own; the file of its class too, if it has one."""
    try:
        file = Path(inspect.getsourcefile(type(selector)) or "")
    except (TypeError, OSError):  # made where there is no file, as in a console
        file = Path()
    code = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return settings_of(selector) | {"code": code}


def _plain(value: Any) -> Any:
    """Data as it is, tensors by their bytes; of other objects (a logger, a model) the class."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath | torch.dtype):
        return str(value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(bytes_of(value).numpy().data).hexdigest()}"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_plain(item) for item in value]
        return items if isinstance(value, list | tuple) else sorted(items, key=str)
    if is_dataclass(value) and not isinstance(value, type):
        return settings_of(value)
    named = value if hasattr(value, "__qualname__") else type(value)  # a class or a function has a name of its own
    return f"{getattr(named, '__module__', '')}:{named.__qualname__}"


def _implementations(model: nn.Module, kind: str) -> list[str]:
    found = {str(getattr(getattr(module, "config", None), kind, None)) for module in model.modules()}
    return sorted(found - {"None"})


def contents(recipe: Recipe, network: PreTrainedModel, weights: str | None) -> dict[str, str | None]:
    """What is known when weights have been read: their hash, and that of masks from elsewhere.

    Args:
        recipe: says where masks are from.
        network: the model with its weights.
        weights: the fingerprint of the files that ``network`` was read from; None if it was given in memory.
    """
    masks = None if recipe.mask_from is None else {file for file, _ in MaskFiles(recipe.mask_from).files.values()}
    return {
        "weights": weights or _fingerprint(network),
        "dtype": str(network.dtype),
        "masks": None if masks is None else fingerprint_files(sorted(masks)),
    }


def check_alike(run: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise ``ModelError`` in all processes if they are not in the same run."""
    first, *others = ranks.gather(json.dumps(run))
    for rank, other in enumerate(others, 1):
        found = differences(json.loads(first), json.loads(other)) if other != first else ()
        for key, theirs, own in found:
            raise ModelError(
                f"process {rank} has another {key} than process 0 ({shown(own)}, and {shown(theirs)}): give all the "
                "same model, options, versions and kind of device"
            )


def _fingerprint(network: PreTrainedModel) -> str:
    """Of a model in memory: every tensor whole."""
    return f"sha256-of-tensors:{hash_tensors(network.state_dict().items())}"


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return ", ".join([describe_device(device), torch.backends.cpu.get_cpu_capability(), *units_of_cpu()])
