"""What every reader asks of a tensor before it is used: that it is there, of this dtype and shape, and finite."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from effjax.errors import CheckpointError

Tensors = Mapping[str, np.ndarray]
FLOATS = ("float16", "bfloat16", "float32")
AGAIN = "copy the checkpoint again, or check that its configuration is its own"


def take(
    tensors: Tensors, name: str, field: str, *, dtypes: Sequence[str], shape: tuple[int, ...], why: str = ""
) -> np.ndarray:
    """`tensors[field]` of the module `name`, finite where it is floating.

    Args:
        tensors: the module's tensors by their names behind the module's.
        name: the module, for messages.
        field: which of them.
        dtypes: names of the dtypes it may have.
        shape: which it must have.
        why: where the shape comes from, such as "4 bits, 64 inputs".

    Raises:
        CheckpointError: naming tensor, what was found, what was expected and the remedy.
    """
    full = f"{name}.{field}"
    if field not in tensors:
        raise CheckpointError(f"{full} is missing; {AGAIN}")
    x = tensors[field]
    if x.dtype.name not in dtypes:
        raise CheckpointError(f"{full} is {x.dtype.name}, expected {' or '.join(dtypes)}; {AGAIN}")
    if x.shape != shape:
        because = f" ({why})" if why else ""
        raise CheckpointError(f"{full} has shape {list(x.shape)}, expected {list(shape)}{because}; {AGAIN}")
    return finite(full, x)


def finite(full: str, x: np.ndarray) -> np.ndarray:
    """`x`, when it holds neither NaN nor infinity.

    Raises:
        CheckpointError: with the number of such values and the place of the first.
    """
    if x.dtype.kind in "iu" or x.dtype == np.bool_:
        return x
    bad = ~np.isfinite(x.astype(np.float32))
    if bad.any():
        at = [int(index) for index in np.argwhere(bad)[0]]
        raise CheckpointError(
            f"{full} has {int(bad.sum())} values that are NaN or infinite, the first at {at}; copy the file again or "
            "ask its author"
        )
    return x


def only(tensors: Tensors, name: str, fields: Sequence[str]) -> None:
    """Refuses tensors of a module that its format does not know.

    Raises:
        CheckpointError: naming them.
    """
    extra = sorted(set(tensors) - set(fields))
    if extra:
        raise CheckpointError(f"{name}.{extra[0]} is not known: this weight is stored as {', '.join(fields)}; {AGAIN}")


def exact_cast(x: np.ndarray, dtype: Any) -> np.ndarray | None:
    """`x` in another floating dtype when no value changes, else None."""
    with np.errstate(over="ignore"):
        cast = x.astype(dtype)
    same = np.array_equal(cast.astype(np.float64), x.astype(np.float64))
    return cast if same else None


def float_dtype(name: str) -> np.dtype:
    """The numpy dtype of a floating dtype's name, bfloat16 and the eight-bit ones included."""
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)
