"""What the libraries raise where the input, or the hub, is at fault."""

from __future__ import annotations

import struct

from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError

# Whatever the hub's client raises when it is refused, offline or cut off, with any of its HTTP libraries.
HUB_FAILURES: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
# What transformers and its readers raise for bad input. Anything else is a bug, and shows as one.
BAD_INPUT: tuple[type[Exception], ...] = (
    *(OSError, ValueError, ImportError),  # unreadable or no JSON; contradictions; a package that is missing
    *(KeyError, TypeError, AttributeError),  # JSON of another form: missing fields, a list where an object belongs
    *(ZeroDivisionError, StrictDataclassError),  # no heads; fields that the configuration's class refuses
    *(RuntimeError, SafetensorError),  # JSON nested too deeply; negative sizes; tensors of other shapes; cut-off files
    struct.error,  # a GGUF file that is cut off
    *HUB_FAILURES,  # a connection that breaks off
)
