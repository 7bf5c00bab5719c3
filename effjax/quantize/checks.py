"""What the fields of methods and the shapes of their weights must be: one check a kind of field, one text an error."""

from typing import Any

import jax.numpy as jnp

from effjax.errors import LeafError


def check_bits(bits: int) -> None:
    """Raises ValueError for a width that no code has here."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}: choose 1 to 8")


def check_size(remedy: str, **sizes: int | None) -> None:
    """Raises ValueError for a number of inputs or columns that no matrix could have; None is all of them.

    Example:
        >>> check_size("a positive number of inputs that share a scale", block_size=0)
        Traceback (most recent call last):
        ValueError: block_size=0: a positive number of inputs that share a scale
    """
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: {remedy}")


def check_group_size(group_size: int | None) -> None:
    """Raises ValueError for a group size that no matrix could have."""
    check_size("a positive number, or None for one group a column", group_size=group_size)


def check_floating(**dtypes: str) -> None:
    """Raises ValueError for a field that names a dtype which is not of floats.

    Example:
        >>> check_floating(scale_dtype="int8")
        Traceback (most recent call last):
        ValueError: scale_dtype='int8' is no floating dtype
    """
    for name, dtype in dtypes.items():
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise ValueError(f"{name}={dtype!r} is no floating dtype")


def check_choice(choices: tuple[Any, ...], **fields: Any) -> None:
    """Raises ValueError for a field that is none of its choices.

    Example:
        >>> check_choice(("split", "even"), start="odd")
        Traceback (most recent call last):
        ValueError: start='odd': choose 'split' or 'even'
    """
    for name, value in fields.items():
        if value not in choices:
            *first, last = (repr(choice) for choice in choices)
            raise ValueError(f"{name}={value!r}: choose {', '.join(first)} or {last}")


def check_groups(shape: tuple[int, ...], group_size: int | None) -> None:
    """Raises LeafError when the inputs are not a whole number of groups."""
    n = shape[-2]
    if group_size is not None and n % group_size:
        divisors = [d for d in (256, 128, 64, 32, 16, 8, 4) if n % d == 0]
        remedy = f"choose group_size from {divisors} or None (per channel)" if divisors else "choose group_size=None"
        raise LeafError(f"group_size={group_size} does not divide its {n} inputs: {remedy} for this leaf with a rule")
