"""Bare jax code on compressed arrays: contractions on either side, slices, lookups, stacks, user-made calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl

import effjax as ej
from effjax.arrays import Quantized
from effjax.errors import MaterializeError
from tests.lift.kinds import KINDS, assert_close, assert_lifts, compress, strict


def weight(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def everywhere(path, leaf):
    return True


def compressed(*shape, kind="quantized", seed=0):
    """A compressed `[*L, in, out]`, which stands for a whole parameter tree."""
    return compress(weight(*shape, seed=seed), kind, everywhere)


def lifts(fn, w, *args, op="dot_general", tolerance=1e-5):
    return assert_lifts(fn, {"w": w}, *args, ops={("w", name) for name in op.split()}, tolerance=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_products_on_both_sides_and_transposed(kind):
    x, y, w = weight(3, 16, seed=1), weight(3, 24, seed=2), compressed(16, 24, kind=kind)

    def products(p, x, y):
        w = p["w"]
        return x @ w, w @ y.T, y @ w.T, w.T @ x.T, jnp.einsum("bi,io->ob", x, w), jnp.einsum("io,bo->ib", w, y)

    lifts(products, w, x, y)


@pytest.mark.parametrize(
    ("spec", "x_shape", "w_shape", "view"),
    [
        ("bd,edf->bef", (3, 16), (2, 16, 8), None),
        ("bed,edf->bef", (3, 2, 16), (2, 16, 8), None),
        ("edf,ebd->fbe", (2, 16, 8), (2, 3, 16), None),
        ("ebf,edf->ebd", (2, 3, 8), (2, 16, 8), None),
        ("bsd,dhk->bshk", (2, 3, 16), (16, 24), (16, 3, 8)),
        ("bsd,dhk->bhsk", (2, 3, 16), (16, 24), (16, 3, 8)),
        ("bshk,hkd->bsd", (2, 3, 4, 8), (32, 16), (4, 8, 16)),
        ("bskh,hkd->bsd", (2, 3, 8, 4), (32, 16), (4, 8, 16)),
        ("bshk,dhk->bsd", (2, 3, 3, 8), (16, 24), (16, 3, 8)),
        ("bd,bdf->bf", (2, 16), (2, 16, 8), None),
        ("ij,jk->", (3, 16), (16, 8), None),
        ("d,df->f", (16,), (16, 8), None),
    ],
)
def test_einsum(spec, x_shape, w_shape, view):
    w_first = spec.startswith("edf,e")
    shape = x_shape if w_first else w_shape
    x = weight(*(w_shape if w_first else x_shape), seed=1)
    if spec.endswith("->"):  # a full contraction reduces the weight's outputs too, after the product
        spec = "ij,jk->ik"

    def fn(p, x):
        w = p["w"] if view is None else p["w"].reshape(view)
        return jnp.einsum(spec, w, x) if w_first else jnp.einsum(spec, x, w)

    lifts(fn, compressed(*shape), x)


def test_a_contraction_of_half_an_axis_is_refused():
    def fn(p, x):
        return jnp.einsum("bh,hkd->bkd", x, p["w"].reshape(2, 8, 24))

    with pytest.raises(MaterializeError, match="w: `dot_general` has no rule for Quantized"):
        strict(fn)({"w": compressed(16, 24)}, weight(3, 2))


def test_two_compressed_operands_keep_the_larger_one():
    def fn(p):
        return p["a"] @ p["b"]

    params = {"a": compressed(8, 16), "b": compressed(16, 24, seed=1)}
    actual, expected = jax.jit(lambda p: (ej.lift(fn)(p), fn(ej.materialize(p))))(params)
    assert_close(actual, expected)
    uses = ej.lift(fn).coverage(params).uses
    assert {(use.path, use.kept) for use in uses} == {("a", False), ("b", True)}


@pytest.mark.parametrize("kind", ["quantized", "nm_sparse", "hashed", "sum"])
@pytest.mark.parametrize("index", [0, -1, 2])
def test_index_of_a_stack(kind, index):
    lifts(
        lambda p, x: x @ p["w"][index], compressed(3, 16, 8, kind=kind), weight(2, 16, seed=1), op="slice dot_general"
    )


def test_traced_index_of_a_stack_wraps_and_clips_as_dense():
    x, w = weight(2, 16, seed=1), compressed(3, 16, 8)

    def fn(p, x, i):
        return x @ p["w"][i]

    for i in (0, 2, -1, -3, 7, -9):
        lifts(fn, w, x, jnp.int32(i), op="dynamic_slice dot_general")


def test_slices_of_stacks_and_of_outputs():
    def fn(p, x):
        w = p["w"]
        return (
            jnp.einsum("bd,ldf->lbf", x, w[1:3]),
            jnp.einsum("bd,ldf->lbf", x, w[::2]),
            x @ w[0, :, 2:6],
            (w[1, :, 3] @ x.T),
        )

    lifts(fn, compressed(4, 16, 8), weight(2, 16, seed=1), op="slice dot_general")


def test_dynamic_slice_of_outputs_clamps():
    def fn(p, x, start):
        return x @ jax.lax.dynamic_slice_in_dim(p["w"], start, 4, axis=1)

    for start in (0, 3, 30):
        lifts(fn, compressed(16, 8), weight(2, 16), jnp.int32(start), op="dynamic_slice dot_general")


def test_rows_of_a_matrix_are_made_dense():
    params = {"w": compressed(16, 8)}

    def fn(p, x):
        return x @ p["w"][4:8]

    with pytest.raises(MaterializeError, match="w: `slice`"):
        strict(fn)(params, weight(2, 4))
    assert_close(jax.jit(ej.lift(fn))(params, weight(2, 4)), fn(ej.materialize(params), weight(2, 4)))


def test_split_of_a_fused_kernel():
    def fn(p, x):
        q, k, v = jnp.split(p["w"], [8, 16], axis=1)
        return x @ q, x @ k, x @ v

    lifts(fn, compressed(16, 24), weight(2, 16), op="split dot_general")


def test_unstack():
    def fn(p, x):
        return [x @ w for w in jnp.unstack(p["w"])]

    lifts(fn, compressed(3, 16, 8), weight(2, 16), op="unstack dot_general")


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stack_of_leaves_then_index(axis):
    params = {name: compressed(16, 8, seed=i) for i, name in enumerate("abc")}

    def fn(p, x, i):
        stacked = jnp.stack([p["a"], p["b"], p["c"]], axis=axis)
        return x @ jnp.take(stacked, 1, axis=axis), x @ jax.lax.dynamic_index_in_dim(stacked, i, axis, keepdims=False)

    assert_lifts(fn, params, weight(2, 16), jnp.int32(2))


def test_concatenated_stack_scanned():
    params = {name: compressed(16, 16, seed=i) for i, name in enumerate("ab")}

    def fn(p, x):
        stacked = jnp.concatenate([p["a"][None], p["b"][None]])
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, stacked)

    assert_lifts(fn, params, weight(2, 16))


def test_leaves_of_two_kinds_do_not_stack():
    params = {"a": compressed(16, 8), "b": compressed(16, 8, kind="nf4")}
    with pytest.raises(MaterializeError, match="`stack` has no rule"):
        strict(lambda p, x: x @ jnp.stack([p["a"], p["b"]])[0])(params, weight(2, 16))


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_take_beyond_the_ends_is_as_dense(mode):
    embedding = compress({"embedding": weight(12, 8)}, "quantized", everywhere)
    ids = jnp.array([[0, 11, 5], [-1, -12, -13], [12, 40, 3]])
    ops = {("embedding", "gather")}
    assert_lifts(lambda p, ids: jnp.take(p["embedding"], ids, axis=0, mode=mode), embedding, ids, ops=ops)


def test_fancy_index_beyond_the_ends_is_as_dense():
    embedding = compress({"embedding": weight(12, 8)}, "nf4", everywhere)
    ids = jnp.array([[0, 11, 5], [-1, -12, -13], [12, 40, 3]])

    def fn(p, ids):
        e = p["embedding"]
        return e[ids], e.at[ids].get(mode="fill", fill_value=3.0), e.at[ids].get(mode="promise_in_bounds"), e.T[:, ids]

    inside = jnp.clip(ids, 0, 11)
    assert_lifts(fn, embedding, inside, ops={("embedding", "gather")})
    assert_lifts(lambda p, ids: fn(p, ids)[:2], embedding, ids, ops={("embedding", "gather")})


def test_experts_chosen_by_index():
    w = compressed(4, 16, 8)

    def fn(p, x, ids):
        return jnp.einsum("bd,bdf->bf", x, p["w"][ids]), jnp.einsum("bd,dbf->bf", x, jnp.take(p["w"], ids, axis=0).mT.mT
                                                                    .transpose(1, 0, 2))  # fmt: skip

    lifts(fn, w, weight(3, 16), jnp.array([3, 0, 3]), op="gather")


def test_reshapes_and_new_axes():
    def fn(p, x):
        w = p["w"]
        return (
            jnp.einsum("bd,dhk->bhk", x, w.reshape(16, 2, 4)),
            x @ w.reshape(4, 4, 8).reshape(16, 8),
            x @ w[None][0],
            jnp.einsum("bd,dxo->bxo", x, w[:, None, :]),
            jnp.einsum("bxd,xdo->bxo", x[:, None], jnp.expand_dims(w, 0)),
            x @ jnp.squeeze(w[:, :, None], 2),
        )

    lifts(fn, compressed(16, 8), weight(2, 16))


def test_casts_keep_codes_and_change_dtype():
    out = lifts(lambda p, x: x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16), compressed(16, 8), weight(2, 16),
                tolerance=2e-2)  # fmt: skip
    assert out.dtype == jnp.bfloat16


def test_preferred_element_type_and_precision():
    def fn(p, x):
        x, w = x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16)
        return jnp.matmul(x, w, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)

    # A kernel that never makes the bfloat16 weights does not round them either: equal to their rounding.
    assert lifts(fn, compressed(16, 8), weight(2, 16), tolerance=2**-8).dtype == jnp.float32


def test_operations_that_change_no_value():
    def fn(p, x):
        w = jax.lax.optimization_barrier(p["w"])
        w = checkpoint_name(jax.lax.stop_gradient(jnp.copy(w)), "weight")
        return x @ jax.device_put(w, jax.devices()[0])

    lifts(fn, compressed(16, 8), weight(2, 16))


def test_user_jit_helper_and_composite():
    helper = jax.jit(lambda x, w: jnp.tanh(x @ w))
    composite = jax.lax.composite(lambda x, w: x @ w, "example.linear")
    lifts(lambda p, x: (helper(x, p["w"]), composite(x, p["w"])), compressed(16, 8), weight(2, 16))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, ()), lambda _, g: (7 * g,))


@jax.custom_jvp
def tripled(x):
    return 3 * x


tripled.defjvp(lambda primals, tangents: (3 * primals[0], 5 * tangents[0]))


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (11 * g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def forward_product(x, w):
    return x @ w


@forward_product.defjvp
def _(primals, tangents):
    return forward_product(*primals), 13 * tangents[0] @ primals[1]


def test_custom_derivatives_of_activations_are_kept():
    w, x = compressed(16, 8), weight(2, 16)

    def fn(p, x):
        return jax.grad(lambda x: tripled(doubled(x @ p["w"])).sum())(x)

    def outer(p, x):
        return jax.grad(lambda x: strict(lambda p, x: tripled(doubled(x @ p["w"])).sum())(p, x))(x)

    expected = 35 * jnp.ones((2, 8)) @ w.materialize().T
    assert_close(jax.jit(strict(fn))({"w": w}, x), expected)
    assert_close(jax.jit(outer)({"w": w}, x), expected)


@pytest.mark.parametrize(("call", "factor"), [(product, 11), (forward_product, 13)])
def test_custom_derivatives_get_the_weight_dense(call, factor):
    params, x = {"w": compressed(16, 8)}, weight(2, 16)

    def fn(p, x):
        return call(x, p["w"])

    (use,) = ej.lift(fn).coverage(params, x).uses
    assert not use.kept and use.op.startswith("custom_") and use.nbytes == 16 * 8 * 4
    gradient = jax.jit(jax.grad(lambda x: ej.lift(fn)(params, x).sum()))(x)
    assert_close(gradient, factor * jnp.ones((2, 8)) @ params["w"].materialize().T)


def test_pallas_call_on_activations_is_left_alone():
    def kernel(x_ref, out_ref):
        out_ref[...] = jnp.maximum(x_ref[...], 0)

    def fn(p, x):
        h = x @ p["w"]
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(h.shape, h.dtype), interpret=True)(h)

    lifts(fn, compressed(16, 8), weight(2, 16))


def test_pallas_call_on_the_weight_gets_it_dense():
    def kernel(w_ref, out_ref):
        out_ref[...] = 2 * w_ref[...]

    def fn(p, x):
        shape = jax.ShapeDtypeStruct((16, 8), jnp.float32)
        return x @ pl.pallas_call(kernel, out_shape=shape, interpret=True)(p["w"])

    params, x = {"w": compressed(16, 8)}, weight(2, 16)
    assert_close(jax.jit(ej.lift(fn))(params, x), 2 * x @ params["w"].materialize())
    assert [use.op for use in ej.lift(fn).coverage(params, x).materialized] == ["pallas_call"]


def test_name_scopes_survive():
    def fn(p, x):
        with jax.named_scope("attention"):
            return x @ p["w"]

    text = jax.jit(ej.lift(fn)).lower({"w": compressed(16, 8)}, weight(2, 16)).as_text(debug_info=True)
    assert "attention" in text


def test_arguments_of_every_sort():
    """Flags and names among the arguments stay Python values; compressed leaves may be in any argument."""
    assert isinstance(compressed(16, 8), Quantized)

    def fn(x, *, params, flag, name=None):
        assert isinstance(flag, bool) and name == "fast"
        return (x @ params["w"]) * (2 if flag else 1)

    params = {"w": compressed(16, 8)}
    x = np.ones((2, 16), np.float32)
    actual = strict(fn)(x, params=params, flag=True, name="fast")
    assert_close(actual, 2 * x @ params["w"].materialize())


def test_without_compressed_arguments_the_function_itself_is_called():
    marker = object()
    assert ej.lift(lambda x: marker)(jnp.ones(3)) is marker
