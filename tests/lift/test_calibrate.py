"""`calibrate` against plain numpy on explicit activations, through every kind of control flow, and its errors."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import effjax as ej
from effjax.errors import CalibrationError
from effjax.lift import InputStats
from tests.lift.kinds import compress

ALL = ("second_moment", "abs_mean", "norm")


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def check(stats, inputs, *, count=None):
    """Statistics of one weight against its inputs `[*L, rows, in]`."""
    x = np.asarray(inputs, np.float64)
    n = x.shape[-2]
    np.testing.assert_array_equal(stats.count, np.full(x.shape[:-2], n if count is None else count, np.float32))
    moment = np.swapaxes(x, -1, -2) @ x / n
    scale = np.abs(moment).max()
    np.testing.assert_allclose(stats.second_moment / scale, moment / scale, atol=1e-5)
    np.testing.assert_allclose(stats.abs_mean, np.abs(x).mean(-2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.norm, np.sqrt(np.square(x).mean(-2)), rtol=1e-4, atol=1e-5)


def mlp(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"]["kernel"]


@pytest.fixture(scope="module")
def params():
    return {"up": {"kernel": normal(16, 24), "bias": normal(24, seed=1)}, "down": {"kernel": normal(24, 8, seed=2)}}


def hidden(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])


def test_mlp_over_several_batches(params):
    batches = [normal(2, 5, 16, seed=i) for i in range(3)]
    stats = ej.calibrate(mlp, params, batches, needs=ALL)
    assert stats["up"]["bias"] is None
    x = jnp.concatenate(batches).reshape(-1, 16)
    check(stats["up"]["kernel"], x)
    check(stats["down"]["kernel"], hidden(params, x))
    assert (stats["up"]["kernel"].in_axes, stats["up"]["kernel"].out_axes) == ((-2,), (-1,))


def test_only_what_is_needed_is_gathered(params):
    stats = ej.calibrate(mlp, params, [normal(4, 16)], needs=("abs_mean",))["up"]["kernel"]
    assert stats.outer_sum is None and stats.square_sum is None
    with pytest.raises(CalibrationError, match=r"these statistics lack 'second_moment': calibrate with needs="):
        stats.second_moment  # noqa: B018


def test_several_batches_compile_once(params):
    @chex.assert_max_traces(n=1)
    def counted(params, x):
        return mlp(params, x)

    ej.calibrate(counted, params, [normal(4, 16, seed=i) for i in range(4)])


def test_batches_as_tuples_and_trees(params):
    x = normal(4, 16)
    pair = ej.calibrate(lambda p, x, scale: mlp(p, x * scale), params, [(x, 2.0)], needs=ALL)
    named = ej.calibrate(
        lambda p, batch: mlp(p, batch["x"] * batch["scale"]), params, [{"x": x, "scale": 2.0}], needs=ALL
    )
    chex.assert_trees_all_equal(pair, named)
    check(pair["up"]["kernel"], 2 * x)


def test_adds_over_batches_hosts_and_sessions(params):
    first, second = [normal(4, 16, seed=1)], [normal(4, 16, seed=2), normal(4, 16, seed=3)]
    whole = ej.calibrate(mlp, params, first + second, needs=ALL)
    parts = [ej.calibrate(mlp, params, part, needs=ALL) for part in (first, second)]
    chex.assert_trees_all_close(ej.add_stats(*parts), whole, rtol=1e-4, atol=1e-5)
    continued = ej.calibrate(mlp, params, second, needs=ALL, initial=parts[0])
    chex.assert_trees_all_close(continued, whole, rtol=1e-4, atol=1e-5)


def test_batches_of_different_lengths_are_weighted_by_rows(params):
    batches = [normal(4, 16, seed=1), normal(9, 16, seed=2)]
    stats = ej.calibrate(mlp, params, batches, needs=ALL)
    check(stats["up"]["kernel"], jnp.concatenate(batches))


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_have_stacked_statistics(remat):
    params = {"kernel": normal(3, 16, 16) / 4}
    x = normal(5, 16, seed=1)

    def model(params, x):
        step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(step) if remat else step, x, params["kernel"])[0]

    inputs = [x]
    for w in params["kernel"][:-1]:
        inputs.append(jnp.tanh(inputs[-1] @ w))
    check(ej.calibrate(model, params, [x], needs=ALL)["kernel"], jnp.stack(inputs))


def test_linen_scan_of_one_layer_and_of_several():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(16, use_bias=False)(x)), None

    for length in (1, 3):
        stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=length)()
        x = normal(5, 16)
        params = stack.init(jax.random.key(0), x, None)
        stats = ej.calibrate(lambda p, x, stack=stack: stack.apply(p, x, None), params, [x], needs=ALL)
        w = params["params"]["Dense_0"]["kernel"]
        inputs = [x]
        for i in range(length - 1):
            inputs.append(jnp.tanh(inputs[-1] @ w[i]))
        check(stats["params"]["Dense_0"]["kernel"], jnp.stack(inputs))


def test_shared_weight_used_twice_and_as_a_constant_of_a_scan():
    params = {"kernel": normal(16, 16) / 4}
    x = normal(5, 16, seed=1)

    def twice(params, x):
        return jnp.tanh(x @ params["kernel"]) @ params["kernel"]

    def repeated(params, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["kernel"]), None), x, None, length=3)[0]

    inputs = [x, jnp.tanh(x @ params["kernel"])]
    check(ej.calibrate(twice, params, [x], needs=ALL)["kernel"], jnp.concatenate(inputs))
    inputs.append(jnp.tanh(inputs[-1] @ params["kernel"]))
    check(ej.calibrate(repeated, params, [x], needs=ALL)["kernel"], jnp.concatenate(inputs))


def test_experts_with_inputs_of_their_own_and_shared():
    params = {"kernel": normal(3, 16, 8)}
    own, shared = normal(3, 5, 16, seed=1), normal(5, 16, seed=2)
    routed = ej.calibrate(lambda p, x: jnp.einsum("ebd,edf->ebf", x, p["kernel"]), params, [own], needs=ALL)
    check(routed["kernel"], own)
    common = ej.calibrate(lambda p, x: jnp.einsum("bd,edf->bef", x, p["kernel"]), params, [shared], needs=ALL)
    np.testing.assert_allclose(common["kernel"].second_moment, shared.T @ shared / 5, rtol=1e-4, atol=1e-5)
    mapped = ej.calibrate(lambda p, x: jax.vmap(lambda w: x @ w)(p["kernel"]), params, [shared], needs=ALL)
    np.testing.assert_allclose(mapped["kernel"].abs_mean, jnp.abs(shared).mean(0), rtol=1e-4)


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_branches_that_do_not_run_count_nothing(branch):
    params = {"a": normal(16, 8), "b": normal(16, 8, seed=1), "always": normal(8, 8, seed=2)}
    x = normal(5, 16, seed=3)

    def model(params, x, i):
        branches = [lambda x: x @ params["a"], lambda x: (2 * x) @ params["b"], lambda x: x[:, :8]]
        return jax.lax.switch(i, branches, x) @ params["always"]

    stats = ej.calibrate(model, params, [(x, jnp.int32(branch))], needs=ALL, where="*")
    assert [float(stats[name].count) for name in "ab"] == [5.0 * (branch == i) for i in range(2)]
    if branch < 2:
        check(stats["ab"[branch]], (1 + branch) * x)
    assert float(stats["always"].count) == 5


def test_while_loop_counts_every_turn():
    params = {"kernel": normal(16, 16) / 4}
    x = normal(5, 16, seed=1)

    def model(params, x, times):
        return jax.lax.fori_loop(0, times, lambda _, x: jnp.tanh(x @ params["kernel"]), x)

    inputs = [x]
    for _ in range(3):
        inputs.append(jnp.tanh(inputs[-1] @ params["kernel"]))
    stats = ej.calibrate(model, params, [(x, jnp.int32(4))], needs=ALL)
    check(stats["kernel"], jnp.concatenate(inputs))


def test_tied_embedding_counts_its_product_and_not_its_lookup():
    params = {"embedding": normal(24, 16), "kernel": normal(16, 16, seed=1)}
    tokens = jnp.arange(6).reshape(2, 3)

    def model(params, tokens):
        return jnp.tanh(params["embedding"][tokens] @ params["kernel"]) @ params["embedding"].T

    stats = ej.calibrate(model, params, [tokens], needs=ALL, where="*")
    looked_up = params["embedding"][tokens].reshape(-1, 16)
    check(stats["kernel"], looked_up)
    check(stats["embedding"], jnp.tanh(looked_up @ params["kernel"]))
    assert (stats["embedding"].in_axes, stats["embedding"].out_axes) == ((-1,), (-2,))


def test_attention_kernels_with_head_axes():
    attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=24, out_features=16, use_bias=False)
    x = normal(2, 5, 16)
    params = attention.init(jax.random.key(0), x)

    def apply(params, x):
        return attention.apply(params, x, mutable=["intermediates"])

    stats = ej.calibrate(apply, params, [x], needs=ALL)["params"]
    for name in ("query", "key", "value"):
        kernel = stats[name]["kernel"]
        assert (kernel.in_axes, kernel.out_axes) == ((-3,), (-2, -1))
        check(kernel, x.reshape(-1, 16))
    out = stats["out"]["kernel"]
    assert (out.in_axes, out.out_axes) == ((-3, -2), (-1,)) and out.second_moment.shape == (24, 24)
    p = params["params"]
    q, k, v = (jnp.einsum("bsd,dhk->bshk", x, p[n]["kernel"]) for n in ("query", "key", "value"))
    heads = nn.dot_product_attention(q, k, v)
    check(out, heads.reshape(-1, 24))


def test_user_functions_with_their_own_derivatives_are_looked_into(params):
    linear = jax.custom_vjp(lambda x, w: x @ w)
    linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))

    @jax.custom_jvp
    def forward(x, w):
        return x @ w

    forward.defjvp(lambda primals, tangents: (forward(*primals), forward(tangents[0], primals[1])))
    helper = jax.jit(lambda p, x: forward(jnp.tanh(linear(x, p["up"]["kernel"])), p["down"]["kernel"]))
    x = normal(5, 16)
    stats = ej.calibrate(helper, params, [x], needs=ALL)
    check(stats["up"]["kernel"], x)
    check(stats["down"]["kernel"], jnp.tanh(x @ params["up"]["kernel"]))


def test_compressed_parameters_can_be_calibrated_again(params):
    quantized = compress(params, "quantized")
    x = normal(5, 16)
    stats = ej.calibrate(mlp, quantized, [x], needs=ALL)
    check(stats["down"]["kernel"], hidden(ej.materialize(quantized), x))


def test_low_precision_activations_are_summed_in_float32(params):
    x = normal(512, 16)
    cast = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    stats = ej.calibrate(mlp, cast(params), [x.astype(jnp.bfloat16)], needs=ALL)["up"]["kernel"]
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype("float32")}
    check(stats, x.astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_over_eight_devices(params, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2)
    specs = {"up": {"kernel": P(None, "tensor"), "bias": P("tensor")}, "down": {"kernel": P("tensor", None)}}
    x = normal(8, 16)

    def model(params, x):
        h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
        return jnp.matmul(h, params["down"]["kernel"], out_sharding=P("data", None) if explicit else None)

    explicit = axis_type == AxisType.Explicit
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), params, specs)
        stats = ej.calibrate(model, sharded, [jax.device_put(x, NamedSharding(mesh, P("data")))] * 2, needs=ALL)
    stats = jax.device_get(stats)
    check(stats["up"]["kernel"], x, count=16)
    check(stats["down"]["kernel"], hidden(params, x), count=16)


def test_statistics_feed_a_method_that_needs_them(params):
    stats = ej.calibrate(mlp, params, [normal(64, 16)], needs=ej.sketch.LowRank(rank=4, weighted=True).needs)
    sketched = ej.sketch_params(params, ej.sketch.LowRank(rank=4, weighted=True), stats=stats)
    assert sketched["up"]["kernel"].shape == (16, 24)


def test_empty_set(params):
    with pytest.raises(CalibrationError, match="the calibration set is empty: at least one batch is needed"):
        ej.calibrate(mlp, params, [])


def test_unknown_need(params):
    with pytest.raises(CalibrationError, match=r"needs=\['hessian'\] is unknown: choose of \('second_moment', "):
        ej.calibrate(mlp, params, [normal(4, 16)], needs=("hessian", "norm"))


def test_where_that_selects_nothing(params):
    with pytest.raises(CalibrationError, match="where='nowhere' selects no weight to watch"):
        ej.calibrate(mlp, params, [normal(4, 16)], where="nowhere")


def test_unused_leaf(params):
    with pytest.raises(
        CalibrationError, match="nothing was multiplied with 'extra/kernel': .* leave it out with where="
    ):
        ej.calibrate(mlp, {**params, "extra": {"kernel": normal(4, 4)}}, [normal(4, 16)])
    stats = ej.calibrate(mlp, {**params, "extra": {"kernel": normal(4, 4)}}, [normal(4, 16)], where="*[pn]/kernel")
    assert stats["extra"]["kernel"] is None and isinstance(stats["up"]["kernel"], InputStats)


def test_two_ways_of_contracting_one_weight():
    params = {"kernel": normal(16, 16)}
    with pytest.raises(CalibrationError, match=r"contracted over axes \(-2,\) and over \(-1,\)"):
        ej.calibrate(lambda p, x: x @ p["kernel"] @ p["kernel"].T, params, [normal(4, 16)])


def test_statistics_of_other_needs_do_not_add(params):
    one, other = (ej.calibrate(mlp, params, [normal(4, 16)], needs=(need,)) for need in ("norm", "abs_mean"))
    with pytest.raises(CalibrationError, match="gathered with other needs="):
        ej.add_stats(one, other)


def test_statistics_of_other_parameters_do_not_add(params):
    one = ej.calibrate(mlp, params, [normal(4, 16)])
    other = ej.calibrate(mlp, params, [normal(4, 16)], where="up/*")
    with pytest.raises(CalibrationError, match="down/kernel"):
        ej.add_stats(one, other)


def test_inside_shard_map(params):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def model(params, x):
        return jax.shard_map(mlp, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(params, x)

    with pytest.raises(CalibrationError, match="calibrate cannot look inside shard_map"):
        ej.calibrate(model, params, [normal(8, 16)])


def qkv(params, x):
    heads = [x @ params[name]["kernel"] for name in ("q", "k", "v")]
    return jnp.tanh(sum(heads)) @ params["out"]["kernel"]


def qkv_params():
    return {name: {"kernel": normal(16, 16, seed=i)} for i, name in enumerate(("q", "k", "v", "out"))}


def test_weights_of_one_input_share_their_sums():
    params, batches = qkv_params(), [normal(4, 16, seed=i) for i in range(2)]
    stats = ej.calibrate(qkv, params, batches, needs=ALL)
    first = stats["q"]["kernel"]
    for name in ("k", "v"):
        other = stats[name]["kernel"]
        assert other.source == first.source == "k/kernel"  # the first by name
        assert other.outer_sum is first.outer_sum and other.abs_sum is first.abs_sum and other.count is first.count
    assert stats["out"]["kernel"].source == "out/kernel"
    assert stats["out"]["kernel"].outer_sum is not first.outer_sum
    total = ej.add_stats(stats, ej.calibrate(qkv, params, [normal(4, 16, seed=2)], needs=ALL))
    assert total["v"]["kernel"].outer_sum is total["q"]["kernel"].outer_sum
    check(total["k"]["kernel"], jnp.concatenate([*batches, normal(4, 16, seed=2)]))


def test_sums_of_other_sources_are_not_shared():
    """Statistics that met in one case and not in the other: nothing is said of their source."""
    params = {"a": {"kernel": normal(16, 4)}, "b": {"kernel": normal(16, 4, seed=1)}}

    def same(p, x, y):
        return x @ p["a"]["kernel"] + x @ p["b"]["kernel"]

    def apart(p, x, y):
        return x @ p["a"]["kernel"] + y @ p["b"]["kernel"]

    x, y = normal(8, 16, seed=2), normal(8, 16, seed=3)
    total = ej.add_stats(ej.calibrate(same, params, [(x, y)]), ej.calibrate(apart, params, [(x, y)]))
    assert total["b"]["kernel"].source == ""
    moment = (x.T @ x + y.T @ y) / 16
    np.testing.assert_allclose(total["b"]["kernel"].second_moment, moment, rtol=1e-4, atol=1e-5)


def test_fisher_is_the_mean_of_squared_gradients(params):
    def loss(p, x, y):
        return jnp.square(mlp(p, x) - y).sum()

    x, y = normal(6, 16), normal(6, 8, seed=1)
    stats = ej.calibrate(
        lambda p, x, y: mlp(p, x), params, [(x[:4], y[:4]), (x[4:], y[4:])], needs=("fisher", "norm"), loss=loss
    )
    gradients = [jax.grad(loss)(params, x[i : i + 1], y[i : i + 1]) for i in range(6)]
    for name in ("up", "down"):
        wanted = np.mean([np.square(g[name]["kernel"]) for g in gradients], axis=0)
        np.testing.assert_allclose(stats[name]["kernel"].fisher, wanted, rtol=1e-4, atol=1e-6)
        assert float(stats[name]["kernel"].examples) == 6


def test_fisher_of_a_layout_that_is_not_a_matrix():
    """Axes as they are contracted: `[out, in]` here."""
    params = {"kernel": normal(4, 16)}

    def loss(p, x):
        return jnp.sin(x @ p["kernel"].T).sum()

    stats = ej.calibrate(lambda p, x: x @ p["kernel"].T, params, [normal(3, 16)], needs=("fisher",), loss=loss)
    assert stats["kernel"].fisher.shape == (16, 4)
    wanted = np.mean([np.square(jax.grad(loss)(params, row[None])["kernel"]) for row in normal(3, 16)], axis=0)
    np.testing.assert_allclose(stats["kernel"].fisher, wanted.T, rtol=1e-4, atol=1e-6)


def test_fisher_needs_a_loss_and_dense_weights(params):
    with pytest.raises(CalibrationError, match=r'needs "fisher" are gradients of a loss: pass loss='):
        ej.calibrate(mlp, params, [normal(4, 16)], needs=("fisher",))
    packed = ej.quantize_params(params, ej.quantize.RTN(bits=8, group_size=None), where="down/*")
    with pytest.raises(CalibrationError, match="down/kernel is compressed: gather fisher before compressing"):
        ej.calibrate(mlp, packed, [normal(4, 16)], needs=("fisher",), loss=lambda p, x: mlp(p, x).sum())
