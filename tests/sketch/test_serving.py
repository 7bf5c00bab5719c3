"""Users in one batch: each row gets what its user's own model gives, over one copy of the codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import effjax as ej
from effjax.arrays import UserTables
from effjax.errors import LeafError
from effjax.sketch import SpaLLM, for_users, of_user, partition_tables, stack_tables

METHOD = SpaLLM(bits=2, groups=2, calibrated=False)
USERS = np.array([2, 0, 2, 1], np.int32)


class Model(nn.Module):
    """Sequences through a scanned stack, an attention-like kernel with heads, and a head of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()(x, None)[0]
        x = nn.DenseGeneral((2, 8), name="query", use_bias=False)(x)
        return nn.Dense(3, name="lm_head")(x.reshape(*x.shape[:-2], 16))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(16, use_bias=False)(x)), None


@pytest.fixture(scope="module")
def models():
    x = jax.random.normal(jax.random.key(0), (4, 5, 16))
    params = Model().init(jax.random.key(1), x)["params"]
    base = jax.jit(lambda p: ej.sketch_params(p, METHOD, where="*/kernel"))(params)
    tables, frozen = partition_tables(base)
    users = [jax.tree.map(lambda t, k=k: (1 + 0.3 * k) * t, tables) for k in range(3)]
    return base, frozen, users, x


apply = jax.jit(ej.lift(Model().apply))


@jax.jit
def mixed(served, users, x):
    return ej.lift(Model().apply)({"params": for_users(served, users)}, x)


def test_rows_get_what_their_users_models_give(models):
    base, frozen, users, x = models
    served = stack_tables(base, users)
    assert isinstance(served["query"]["kernel"].array, UserTables)
    got = mixed(served, USERS, x)
    for row, user in enumerate(USERS):
        wanted = apply({"params": ej.combine(users[user], frozen)}, x)[row]
        np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apply({"params": served}, x), apply({"params": base}, x), rtol=1e-6)


def test_codes_are_held_once_and_users_come_back(models):
    base, frozen, users, _ = models
    served = stack_tables(base, users)
    assert ej.nbytes(served) == ej.nbytes(base) + 3 * ej.nbytes(users[0])
    for user in range(3):
        one = ej.combine(users[user], frozen)
        back = of_user(served, user)
        assert jax.tree.structure(back) == jax.tree.structure(one)
        jax.tree.map(np.testing.assert_array_equal, back, one)
    assert stack_tables(base, users, dtype="float32")["lm_head"]["kernel"].tables.dtype == jnp.float32


def test_prepared_leaves_are_served_too(models):
    base, _, users, x = models
    served = stack_tables(base, users)
    ready = ej.prepare(served)
    np.testing.assert_allclose(mixed(ready, USERS, x), mixed(served, USERS, x), rtol=1e-5, atol=1e-5)


def test_gradients_go_to_the_tables_of_the_users_in_the_batch(models):
    base, frozen, users, x = models
    served = stack_tables(base, users)
    tables, rest = ej.partition(served)

    @jax.jit
    def grads(tables):
        return jax.grad(lambda t: (mixed(ej.combine(t, rest), jnp.array([2, 0, 2, 0]), x) ** 2).sum())(tables)

    own = jax.jit(jax.grad(lambda t: (apply({"params": ej.combine(t, frozen)}, x[1::2]) ** 2).sum()))(users[0])
    found = grads(tables)["lm_head"]["kernel"].tables
    np.testing.assert_allclose(found[0], own["lm_head"]["kernel"].tables, rtol=1e-2, atol=1e-3)
    assert not np.asarray(found[1]).any() and np.asarray(found[2]).any()


def test_errors(models):
    base, _, users, x = models
    with pytest.raises(LeafError, match="no users; pass the tables of at least one"):
        stack_tables(base, [])
    with pytest.raises(LeafError, match="no leaf of the base has tables; sketch it with"):
        stack_tables({"kernel": jnp.ones((4, 4))}, users)
    other = jax.tree.map(lambda t: t[..., :2], users[0])
    with pytest.raises(LeafError, match=r"lm_head/kernel: user 1 has tables \[2, 3, 2\], the base \[2, 3, 4\]: tune"):
        stack_tables({"lm_head": base["lm_head"]}, [users[0], other])
    with pytest.raises(LeafError, match=r"user 0 has no tables, the base"):
        stack_tables(base, [{}])
    with pytest.raises(LeafError, match="no leaf has tables of users; stack_tables comes first"):
        for_users(base, USERS)
    with pytest.raises(LeafError, match=r"users must be \[batch\], found \[1, 4\]"):
        for_users(stack_tables(base, users), USERS[None])
    with pytest.raises(LeafError, match=r"users are named for a batch of 4, but \[2, 5, 16\] is multiplied"):
        mixed(stack_tables(base, users), USERS, x[:2])
    with pytest.raises(LeafError, match="no leaf has tables: sketch first"):
        partition_tables({"kernel": jnp.ones((4, 4))})
