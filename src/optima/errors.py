"""Every error a user can cause. The message names the input at fault and what to do about it."""

# Where activations are NaN or Inf.
OTHER_DTYPE = "load the model in another dtype (--dtype bfloat16 or float32), or check its weights"


class OptimaError(Exception):
    """Base of all errors that OPTIMA raises on purpose."""


class RecipeError(OptimaError, ValueError):
    """A recipe, option or pattern that cannot be carried out."""


class ModelError(OptimaError):
    """A model or checkpoint that cannot be read, understood or written."""


class NotDifferentiableError(ModelError):
    """A model that has no gradients: it can be pruned, but not by its loss."""


class CalibrationError(OptimaError):
    """Text or activations that cannot be used for calibration."""


class NumericalError(OptimaError):
    """A matrix or weight that no method can work with (NaN, Inf, indefinite)."""


class RankError(OptimaError):
    """Another rank has exited."""


class DeviceMemoryError(OptimaError):
    """A device whose memory does not hold what must be there together."""
