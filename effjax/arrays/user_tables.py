"""One set of codes under the tables of several users: every row of a batch is multiplied by the weight of its user."""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from effjax.arrays.base import CompressedArray, Spec, register
from effjax.arrays.codebook import Codebook
from effjax.arrays.prepared import Prepared
from effjax.arrays.wrapping import Wrapping


@register
class UserTables(Wrapping):
    """`W[b] = array with tables[users[b]]` for row `b` of a batch; where no users are named, `array` itself.

    The weight of nobody in particular is `array`: that is what `materialize`, reports and files of other formats see.
    Made by `effjax.sketch.stack_tables`, given its rows by `effjax.sketch.for_users`.

    Attributes:
        array: the `Codebook` whose codes all users share, or a `Prepared` one; its own tables are those of the base.
        tables: `float[*L, users, in_groups, out_groups, entries]`.
        users: `int32[*L, batch]`, the user of each entry of the leading axis of whatever is multiplied; or None.

    Example:
        >>> import jax.numpy as jnp
        >>> base = Codebook.from_codes(jnp.array([[0], [1]]), jnp.array([1.0, 2.0]).reshape(1, 1, 2), dtype=jnp.float32)
        >>> both = UserTables(array=base, tables=jnp.stack([base.tables, -base.tables]))
        >>> both.shape, both.of(1).materialize().ravel().tolist()
        ((2, 1), [-1.0, -2.0])
    """

    array: CompressedArray
    tables: Float[Array, "*L users in_groups out_groups entries"]
    users: Int[Array, "*L batch"] | None = None

    def materialize(self) -> jax.Array:
        return self.array.materialize()

    def of(self, user: int | jax.Array) -> CompressedArray:
        """The weight of one user."""
        tables = jax.lax.dynamic_index_in_dim(self.tables, user, self.tables.ndim - 4, keepdims=False)
        inner = self.array.array if isinstance(self.array, Prepared) else self.array
        assert isinstance(inner, Codebook)
        inner = inner.replace(tables=tables)
        return self.array.replace(array=inner) if isinstance(self.array, Prepared) else inner

    def columns(self, ids: jax.Array) -> CompressedArray | None:  # type: ignore[override]
        return self.array.columns(ids) if self.users is None else None

    def field_specs(self, spec: Spec) -> dict[str, Any]:
        array = self.array.replace(**self.array.field_specs(spec))
        *lead, _, _ = spec
        own = (array.array if isinstance(array, Prepared) else array).tables  # type: ignore[attr-defined]
        users = None if self.users is None else P(*lead, None)
        return {"array": array, "tables": P(*own[: len(lead)], None, *own[len(lead) :]), "users": users}
