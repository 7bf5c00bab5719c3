"""The errors effjax raises: one class a kind of mistake, every message names the place, the shape and the remedy."""


class EffjaxError(Exception):
    """Base of every error that effjax raises on purpose; the command line prints its message without a traceback."""


class RuleError(EffjaxError, ValueError):
    """A rule list that cannot be applied: a rule matches nothing, is shadowed, or has a malformed pattern."""


class LeafError(EffjaxError, ValueError):
    """A parameter that a method cannot take: wrong rank or dtype, a group that does not divide, non-finite values."""


class CheckpointError(EffjaxError, ValueError):
    """A file or directory that is damaged, incomplete, or not what its configuration promises."""


class ConfigError(EffjaxError, ValueError):
    """A model configuration or a recipe with a missing, unknown or contradictory entry."""


class CalibrationError(EffjaxError, ValueError):
    """Statistics that cannot be gathered or do not fit the parameters they are used with."""


class MaterializeError(EffjaxError, RuntimeError):
    """An operation would have made a dense copy of a compressed leaf above the size that the caller allowed."""
