"""What the numbers of cache methods must be: one check, one text."""

from typing import Any

from effjax.errors import ConfigError


def is_whole(value: Any, least: int) -> bool:
    """Whether this is a whole number of at least `least`; a truth value is none.

    Example:
        >>> is_whole(3, 1), is_whole(True, 1), is_whole(0, 1)
        (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(where: str, name: str, value: Any, least: int) -> None:
    """Raises ConfigError for an argument that is no whole number of at least `least`."""
    if not is_whole(value, least):
        raise ConfigError(f"{where}: {name} must be a whole number of at least {least}, found {value!r}")
