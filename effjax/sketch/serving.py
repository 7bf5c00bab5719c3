"""Several users' tables over one set of codes, and one batch of rows that belong to different users."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from effjax.adapters import map_matrix
from effjax.arrays.base import PyTree
from effjax.arrays.codebook import Codebook
from effjax.arrays.user_tables import UserTables
from effjax.errors import LeafError
from effjax.paths import leaves_with_paths, map_with_paths


def stack_tables(base: PyTree, tables: Sequence[PyTree], *, dtype: Any = None) -> PyTree:
    """Lays the tables of several users over the codes of a sketched model.

    Args:
        base: the sketched parameters; leaves without tables are served to all users as they are here.
        tables: for each user what `partition_tables` gave and training changed, or a whole tuned tree.
        dtype: of the stacked tables; that of the users' where None. Kernels of the CPU compute with float32, to which
            other tables are converted at every product.

    Returns:
        `base` with `UserTables` in place of its codebooks: `base` itself until `for_users` names the rows.

    Raises:
        LeafError: no users, no codebooks, or tables of another shape than the base's.

    Example:
        >>> import effjax as ej
        >>> base = ej.sketch_params({"kernel": jnp.eye(16)}, ej.sketch.SpaLLM(bits=2, calibrated=False))
        >>> users = [jax.tree.map(lambda t: k * t, ej.sketch.partition_tables(base)[0]) for k in (1, 2, 3)]
        >>> served = stack_tables(base, users)
        >>> apply = ej.lift(lambda params, x: x @ params["kernel"])
        >>> apply(for_users(served, jnp.array([2, 0])), jnp.ones((2, 16))).mean(-1).tolist()
        [3.0, 1.0]
    """
    if not tables:
        raise LeafError("stack_tables: no users; pass the tables of at least one")
    found = [{path: _tables_of(leaf) for path, leaf in leaves_with_paths(tree)} for tree in tables]
    own = {path: _tables_of(leaf) for path, leaf in leaves_with_paths(base)}
    own = {path: leaf for path, leaf in own.items() if leaf is not None}
    if not own:
        raise LeafError("stack_tables: no leaf of the base has tables; sketch it with ej.sketch.SpaLLM")
    for user, theirs in enumerate(found):
        for path, leaf in own.items():
            shape = getattr(theirs.get(path), "shape", None)
            if shape != leaf.shape:
                has = "no tables" if shape is None else f"tables {list(shape)}"
                raise LeafError(f"{path}: user {user} has {has}, the base {list(leaf.shape)}: tune the same sketch")

    def served(path: str, leaf: Any) -> Any:
        if path not in own:
            return leaf
        lead = own[path].ndim - 3
        stacked = jnp.stack([theirs[path] for theirs in found], axis=lead).astype(dtype or found[0][path].dtype)
        return map_matrix(lambda book: UserTables(array=book, tables=stacked), leaf)

    return map_with_paths(served, base)


def for_users(params: PyTree, users: ArrayLike) -> PyTree:
    """Names the user of every row of the batches to come; may be called under `jit`.

    Args:
        params: what `stack_tables` gave.
        users: numbers of users, `int32[batch]`: the model's inputs must have this leading axis up to every product.

    Raises:
        LeafError: `params` holds no tables of users, or `users` is not one-dimensional.
    """
    users = jnp.asarray(users, jnp.int32)
    if users.ndim != 1:
        raise LeafError(f"for_users: users must be [batch], found {list(users.shape)}")
    if not any(isinstance(x, UserTables) for x in jax.tree.leaves(params, is_leaf=_is_served)):
        raise LeafError("for_users: no leaf has tables of users; stack_tables comes first")

    def named(x: Any) -> Any:
        if not isinstance(x, UserTables):
            return x
        return x.replace(users=jnp.broadcast_to(users, (*x.tables.shape[:-4], *users.shape)))

    return jax.tree.map(named, params, is_leaf=_is_served)


def of_user(params: PyTree, user: int) -> PyTree:
    """The model of one user, as it was before `stack_tables` (up to the dtype of tables)."""
    return jax.tree.map(lambda x: x.of(user) if isinstance(x, UserTables) else x, params, is_leaf=_is_served)


def _is_served(x: Any) -> bool:
    return isinstance(x, UserTables)


def _tables_of(leaf: Any) -> Any:
    """The tables of a leaf, through a view; None where it has none."""
    inner = map_matrix(lambda matrix: matrix, leaf, unwrap=True)
    return inner.tables if isinstance(inner, Codebook) else None
