"""Lifted functions under jax's transformations and loops: grad, vmap, remat, while, cond, export, ahead of time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import effjax as ej
from tests.lift.kinds import KINDS, assert_close, assert_lifts, compress, strict


def mlp(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


@functools.cache
def dense_params():
    k = jax.random.split(jax.random.key(0), 3)
    return {
        "up": {"kernel": jax.random.normal(k[0], (16, 24)), "bias": jax.random.normal(k[1], (24,))},
        "down": {"kernel": jax.random.normal(k[2], (24, 8))},
    }


@functools.cache
def params(kind="quantized"):
    return compress(dense_params(), kind)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(9), (4, 16))


def both(fn, *args):
    """`fn(apply, *args)` with the lifted and with the materialised model, in one compiled program."""

    def materialized(params, *args):
        return mlp(ej.materialize(params), *args)

    actual, expected = jax.jit(lambda *args: (fn(strict(mlp), *args), fn(materialized, *args)))(*args)
    assert_close(actual, expected)
    return actual


@pytest.mark.parametrize("kind", ["quantized", "low_rank", "hashed"])
def test_gradient_of_inputs_and_of_dense_leaves(kind, x):
    def loss(apply, params, x):
        def of(bias, x):
            return jnp.square(apply({**params, "up": {**params["up"], "bias": bias}}, x)).sum()

        return jax.grad(of, argnums=(0, 1))(params["up"]["bias"], x)

    both(loss, params(kind), x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_floating_fields_with_auxiliary_output(kind, x):
    def loss(apply, params, x):
        trainable, frozen = ej.partition(params)

        def of(trainable):
            out = apply(ej.combine(trainable, frozen), x)
            return jnp.square(out).mean(), {"out": out}

        return jax.value_and_grad(of, has_aux=True)(trainable)

    (_, aux), gradients = both(loss, params(kind), x)
    assert aux["out"].shape == (4, 8)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradients))


def test_gradient_of_a_stack_under_scan_and_remat(x):
    stacked = compress({"kernel": jax.random.normal(jax.random.key(0), (3, 16, 16))}, "quantized")

    def model(params, x):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, params["kernel"])[0].sum()

    def gradients(model):
        def of(params, x):
            trainable, frozen = ej.partition(params)
            return jax.grad(lambda t, x: model(ej.combine(t, frozen), x), argnums=(0, 1))(trainable, x)

        return of

    actual, expected = jax.jit(
        lambda p, x: (gradients(strict(model))(p, x), gradients(lambda p, x: model(ej.materialize(p), x))(p, x))
    )(stacked, x)
    assert_close(actual, expected)


def test_gradient_taken_inside_the_lifted_function(x):
    """`lift` of a whole loss-and-gradient function: the weight is met again on the way back, transposed."""

    def gradient(params, x):
        return jax.grad(lambda x: jnp.square(mlp(params, x)).sum())(x)

    assert_lifts(gradient, params(), x)


def test_hessian_vector_product_raises_no_dense_copy(x):
    def hvp(apply, params, x):
        def loss(x):
            return jnp.square(apply(params, x)).sum()

        return jax.vjp(jax.grad(loss), x)[1](x)[0]

    both(hvp, params(), x)


def test_numerical_gradient(x):
    lifted = strict(mlp)
    check_grads(lambda x: lifted(params(), x), (x,), order=1, modes=("rev",), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", ["quantized", "hashed", "sum"])
def test_vmap_over_inputs_and_over_parameters(kind, x):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), params(kind), params(kind), params(kind))

    def mapped(apply, params, stacked, x):
        return (
            jax.vmap(apply, in_axes=(None, 0))(params, x[:, None]),
            jax.vmap(apply, in_axes=(0, None))(stacked, x),
            jax.vmap(apply)(stacked, jnp.stack([x, 2 * x, 3 * x])),
        )

    both(mapped, params(kind), stacked, x)


def test_gradient_under_vmap_over_parameters(x):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), params(), params())

    def per_model(apply, stacked, x):
        return jax.vmap(jax.grad(lambda x, p: apply(p, x).sum()), in_axes=(None, 0))(x, stacked)

    both(per_model, stacked, x)


def test_checkpoint_outside(x):
    def loss(apply, params, x):
        return jax.grad(lambda x: jax.checkpoint(apply)(params, x).sum())(x)

    both(loss, params(), x)


def test_forward_mode_is_refused_with_jaxs_own_error(x):
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: strict(mlp)(params(), x), (x,), (x,))


def test_associative_scan_over_activations(x):
    def model(params, x):
        return jax.lax.associative_scan(jnp.add, mlp(params, x))

    assert_lifts(model, params(), x)


def test_while_loop_decoding_with_weights_as_constants():
    embedding = compress({"embedding": jax.random.normal(jax.random.key(0), (24, 16))}, "quantized", "*")
    weights = {**embedding, **compress({"kernel": jax.random.normal(jax.random.key(1), (16, 16))}, "nf4")}

    def decode(params, first):
        def unfinished(state):
            step, tokens = state
            return (step < 7) & (tokens[0, step] != 23)

        def step(state):
            step, tokens = state
            hidden = jnp.tanh(params["embedding"][tokens[:, step]] @ params["kernel"])
            return step + 1, tokens.at[:, step + 1].set(jnp.argmax(hidden @ params["embedding"].T, -1))

        return jax.lax.while_loop(unfinished, step, (0, jnp.zeros((2, 8), jnp.int32).at[:, 0].set(first)))

    ops = {("embedding", "gather"), ("embedding", "dot_general"), ("kernel", "dot_general")}
    assert_lifts(decode, weights, jnp.array([3, 5]), ops=ops)


def test_while_condition_may_use_a_weight(x):
    square = compress({"kernel": jnp.eye(16) * 0.5}, "quantized")

    def shrink(params, x):
        return jax.lax.while_loop(lambda x: jnp.sum(jnp.abs(x @ params["kernel"])) > 1, lambda x: x / 2, x)

    assert_lifts(shrink, square, x, ops={("kernel", "dot_general")})


def test_fori_loops_static_and_dynamic(x):
    square = compress({"kernel": jax.random.normal(jax.random.key(1), (16, 16))}, "quantized")

    def power(params, x, times):
        body = lambda _, x: jnp.tanh(x @ params["kernel"])  # noqa: E731
        return jax.lax.fori_loop(0, 3, body, x), jax.lax.fori_loop(0, times, body, x)

    assert_lifts(power, square, x, jnp.int32(4), ops={("kernel", "dot_general")})


@pytest.mark.parametrize("index", [0, 1, 2])
def test_switch_and_cond_with_compressed_branches(index, x):
    weights = {name: compress(jax.random.normal(jax.random.key(i), (16, 8)), "quantized", "*")
               for i, name in enumerate("ab")}  # fmt: skip

    def routed(params, x, i):
        one = lambda x: x @ params["a"]  # noqa: E731
        two = lambda x: x @ params["b"]  # noqa: E731
        none = lambda x: x[:, :8]  # noqa: E731
        return jax.lax.switch(i, [one, two, none], x), jax.lax.cond(i > 0, one, two, x)

    ops = {("a", "dot_general"), ("b", "dot_general")}
    assert_lifts(routed, weights, x, jnp.int32(index), ops=ops)


def test_weight_as_a_branch_output_is_made_dense(x):
    weights = {name: compress(jax.random.normal(jax.random.key(i), (16, 8)), "quantized", "*")
               for i, name in enumerate("ab")}  # fmt: skip

    def chosen(params, x, flag):
        return x @ jax.lax.cond(flag, lambda: params["a"], lambda: params["b"])

    with pytest.raises(ej.errors.MaterializeError, match="cond output"):
        strict(chosen)(weights, x, True)
    actual = jax.jit(ej.lift(chosen))(weights, x, True)
    assert_close(actual, x @ weights["a"].materialize())


def test_scan_keeps_length_direction_and_outputs(x):
    stacked = compress({"kernel": jax.random.normal(jax.random.key(0), (5, 16, 16))}, "nm_sparse")

    def model(params, x):
        step = lambda x, w: (jnp.tanh(x @ w), x.sum())  # noqa: E731
        return (
            jax.lax.scan(step, x, params["kernel"], reverse=True),
            jax.lax.scan(step, x, params["kernel"], unroll=2),
            jax.lax.scan(lambda x, _: (x @ params["kernel"][1], None), x, None, length=2),
            jax.lax.scan(step, x, params["kernel"][1:4]),
        )

    assert_lifts(model, stacked, x)


def test_jit_of_jit_compiles_once(x):
    traces = []

    def counted(params, x):
        traces.append(None)
        return mlp(params, x)

    lifted = jax.jit(strict(counted))
    for scale in (1.0, 2.0):
        lifted(params(), scale * x).block_until_ready()
    assert len(traces) == 1 and lifted._cache_size() == 1


def test_donated_parameters(x):
    own = jax.tree.map(jnp.copy, params())
    out = jax.jit(lambda p, x: (p, strict(mlp)(p, x)), donate_argnums=0)(own, x)
    assert_close(out[1], mlp(ej.materialize(params()), x))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(own))


@pytest.mark.parametrize("kind", ["quantized", "low_rank"])
def test_export_and_call(kind, x):
    exported = jax.export.export(jax.jit(strict(mlp)))(params(kind), x)
    assert_close(exported.call(params(kind), x), mlp(ej.materialize(params(kind)), x))


def test_ahead_of_time_with_abstract_shapes(x):
    abstract = jax.eval_shape(
        lambda p: ej.quantize_params(p, ej.quantize.RTN(bits=4, group_size=8)),
        jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), dense_params()),
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    compiled = jax.jit(strict(mlp)).lower(abstract, jax.ShapeDtypeStruct(x.shape, x.dtype)).compile()
    real = ej.quantize_params(dense_params(), ej.quantize.RTN(bits=4, group_size=8))
    assert_close(compiled(real, x), mlp(ej.materialize(real), x))
    coverage = strict(mlp).coverage(abstract, jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert {use.path for use in coverage.uses if use.kept} == {"up/kernel", "down/kernel"}


def test_eval_shape_computes_nothing():
    abstract = jax.eval_shape(strict(mlp), params(), jax.ShapeDtypeStruct((4, 16), jnp.float32))
    assert abstract.shape == (4, 8) and abstract.dtype == np.float32
