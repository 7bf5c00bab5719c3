"""Adapters on every kind of compressed leaf: unchanged function, training, gradients, shardings, storage."""

from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import effjax as ej
from effjax.arrays import Adapter, LowRank, Permuted, RowScaled, Sum, View
from effjax.errors import LeafError, RuleError
from effjax.evaluate import windows_from_text
from effjax.io import load_checkpoint, save_checkpoint
from effjax.models.decoder import Decoder
from effjax.models.embedded import load_default
from tests.common.cases import assert_same_bytes, mesh_of, place
from tests.lift.kinds import assert_close, assert_lifts, strict

RTN2 = ej.quantize.RTN(bits=2, group_size=16)
KEY = jax.random.key(3)


def weight(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def quantized(w):
    return RTN2.quantize(w)


def row_scaled(w):
    scales = jnp.exp(weight(*w.shape[:-1], seed=8) / 2)
    return RowScaled(array=RTN2.quantize(w / scales[..., None]), row_scales=scales)


def permuted(w):
    order = jnp.broadcast_to(jax.random.permutation(jax.random.key(9), w.shape[-2]), w.shape[:-1])
    return Permuted(array=RTN2.quantize(jnp.take_along_axis(w, order[..., None], axis=-2)), order=order)


def quantized_plus_low_rank(w):
    return Sum(parts=(RTN2.quantize(w), LowRank(a=w[..., :2] / 4, b=w[..., :2, :] / 4)))


BASES = {
    "quantized": quantized,
    "codebook": ej.quantize.NF4(block_size=16).quantize,
    "row scaled": row_scaled,
    "permuted": permuted,
    "sum": quantized_plus_low_rank,
}


def trained(params, seed=5, size=0.1):
    """The tree with adapters that training has moved."""
    adapters, frozen = ej.partition_adapters(params)
    leaves, treedef = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + size * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return ej.combine(treedef.unflatten(moved), frozen)


@pytest.mark.parametrize("lead", [(), (3,)], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_an_adapter_starts_at_zero_and_adds_a_times_b(kind, lead):
    base = jax.jit(BASES[kind])(weight(*lead, 32, 24))
    params = {"kernel": base, "bias": jnp.zeros(24)}
    adapted = ej.add_lora(params, 4, key=KEY)
    leaf = adapted["kernel"]
    assert isinstance(leaf, Sum) and isinstance(leaf.parts[-1], Adapter) and leaf.shape == base.shape
    assert leaf.parts[-1].a.shape == (*lead, 32, 4) and leaf.parts[-1].b.shape == (*lead, 4, 24)
    np.testing.assert_array_equal(leaf.materialize(), base.materialize())
    assert_same_bytes(ej.drop_adapters(adapted), params)
    moved = trained(adapted)["kernel"]
    adapter = moved.parts[-1]
    expected = np.asarray(base.materialize()) + np.asarray(adapter.a) @ np.asarray(adapter.b)
    np.testing.assert_allclose(moved.materialize(), expected, atol=1e-5)
    x = weight(5, *lead, 32, seed=2)
    assert_lifts(lambda p, x: jnp.einsum("b...i,...io->b...o", x, p["kernel"]), {"kernel": moved}, x)


def test_scale_and_draws():
    base = {"a": {"kernel": quantized(weight(64, 64))}, "b": {"kernel": quantized(weight(64, 64, seed=1))}}
    one, two = ej.add_lora(base, 16, key=KEY), ej.add_lora(base, 16, key=KEY, alpha=32)
    np.testing.assert_allclose(2 * one["a"]["kernel"].parts[-1].a, two["a"]["kernel"].parts[-1].a, rtol=1e-6)
    assert np.std(one["a"]["kernel"].parts[-1].a) == pytest.approx(1 / 8, rel=0.1)
    assert not np.array_equal(one["a"]["kernel"].parts[-1].a, one["b"]["kernel"].parts[-1].a)
    alone = ej.add_lora(base, 16, key=KEY, where="b/*")  # a leaf's draw does not depend on the others
    assert_same_bytes(alone["b"], one["b"])
    assert_same_bytes(alone["a"], base["a"])
    half = ej.add_lora(base, 16, key=KEY, dtype=jnp.bfloat16)["a"]["kernel"].parts[-1]
    assert half.a.dtype == half.b.dtype == jnp.bfloat16 and half.dtype == jnp.float32
    shapes = jax.eval_shape(lambda p: ej.add_lora(p, 16, key=KEY), base)
    assert ej.nbytes(shapes) == ej.nbytes(one) == ej.nbytes(base) + 2 * 2 * 16 * 64 * 4


def test_a_view_holds_the_sum():
    """Attention's query kernel [model, heads, head_dim]."""
    dense = {"attention": {"query": {"kernel": weight(32, 4, 8)}}}
    adapted = trained(ej.add_lora(ej.quantize_params(dense, RTN2), 4, key=KEY))
    leaf = adapted["attention"]["query"]["kernel"]
    assert isinstance(leaf, View) and isinstance(leaf.array, Sum) and leaf.shape == (32, 4, 8)
    assert_lifts(
        lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["attention"]["query"]["kernel"]), adapted, weight(5, 32, seed=2)
    )


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda p: ej.add_lora(p, 0, key=KEY), ValueError, "rank=0: choose at least 1"),
        (lambda p: ej.add_lora(p, 2, key=KEY, dtype=jnp.int8), ValueError, "choose a floating one"),
        (
            lambda p: ej.add_lora(p, 2, key=KEY, where="*"),
            LeafError,
            r"bias is dense \(float32\[24\]\): an adapter is a part of a sum of compressed parts; quantize the leaf",
        ),
        (lambda p: ej.add_lora(p, 25, key=KEY), LeafError, r"kernel \[32, 24\]: rank=25 is more than its 24 inputs or"),
        (lambda p: ej.add_lora(p, 2, key=KEY, where="*/up"), RuleError, r"where='\*/up' matches no leaf"),
        (lambda p: ej.add_lora({"bias": p["bias"]}, 2, key=KEY), RuleError, "no leaf is compressed: quantize first"),
        (
            lambda p: ej.add_lora(ej.add_lora(p, 2, key=KEY), 2, key=KEY),
            LeafError,
            "kernel has an adapter already: merge it",
        ),
        (lambda p: ej.partition_adapters(p), LeafError, "no leaf carries an adapter: add them with add_lora"),
    ],
)
def test_bad_arguments(call, error, message):
    params = {"bias": jnp.zeros(24), "kernel": quantized(weight(32, 24))}
    with pytest.raises(error, match=message):
        call(params)


def test_a_low_rank_part_of_the_base_is_no_adapter():
    params = {"kernel": quantized_plus_low_rank(weight(32, 24))}
    with pytest.raises(LeafError, match="no leaf carries an adapter"):
        ej.partition_adapters(params)
    adapters, frozen = ej.partition_adapters(ej.add_lora(params, 3, key=KEY))
    assert [x.shape for x in jax.tree.leaves(adapters)] == [(32, 3), (3, 24)]
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(params))


def test_partition_and_combine():
    adapted = trained(ej.add_lora({"kernel": quantized(weight(2, 32, 24)), "bias": jnp.ones(24)}, 4, key=KEY))
    adapters, frozen = ej.partition_adapters(adapted)
    assert_same_bytes(ej.combine(adapters, frozen), adapted)
    assert adapters["bias"] is None and frozen["bias"] is not None


def test_gradients_are_those_of_the_dense_weight():
    """d/da = dW b', d/db = a' dW with the dense gradient dW, under scan as well; the base gets none."""
    params = trained(ej.add_lora({"kernel": quantized(weight(3, 32, 32) / 5)}, 4, key=KEY))
    x = weight(6, 32, seed=2)

    def model(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]

    adapters, frozen = ej.partition_adapters(params)
    found = jax.jit(jax.grad(lambda a: jnp.sum(strict(model)(ej.combine(a, frozen), x) ** 2)))(adapters)
    dense = jax.grad(lambda p: jnp.sum(model(p, x) ** 2))(ej.materialize(params))["kernel"]
    part, got = params["kernel"].parts[-1], found["kernel"].parts[-1]
    assert_close((got.a, got.b), (dense @ part.b.mT, part.a.mT @ dense), tolerance=1e-4)
    assert len(jax.tree.leaves(found)) == 2


def test_the_gradient_under_scan_keeps_no_dense_base():
    layers, width, rank = 4, 64, 4
    params = ej.add_lora({"kernel": quantized(weight(layers, width, width))}, rank, key=KEY)
    adapters, frozen = ej.partition_adapters(params)
    x = jnp.ones((2, width))

    def model(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["kernel"])[0]

    _, vjp = jax.vjp(lambda a: strict(model)(ej.combine(a, frozen), x), adapters)
    kept = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "shape")]
    floating = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert max(leaf.size for leaf in floating) < layers * width * width / 4
    assert sum(leaf.nbytes for leaf in kept) <= 1.5 * ej.nbytes(params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_shardings_follow_the_dense_ones(kind):
    params = trained(
        ej.add_lora({"kernel": ej.quantize.RTN(bits=8, group_size=None).quantize(weight(64, 32))}, 4, key=KEY)
    )
    x, mesh = weight(4, 64, seed=2), mesh_of(kind)
    model = strict(lambda p, x: x @ p["kernel"])
    want = jax.jit(model)(params, x)
    specs = ej.partition_specs(params, {"kernel": P(None, "tensor")}, mesh)
    assert specs["kernel"].parts[-1].a == P(None, None) and specs["kernel"].parts[-1].b == P(None, "tensor")
    with jax.set_mesh(mesh):
        sharded = place(params, specs, mesh)
        assert sharded["kernel"].parts[-1].b.addressable_shards[0].data.shape == (4, 8)
        assert_close(jax.jit(model)(sharded, x), want)


def test_saved_and_loaded(tmp_path):
    params = {"mlp": {"kernel": quantized(weight(32, 24)), "bias": jnp.ones(24)}}
    adapted = trained(ej.add_lora(params, 4, key=KEY))
    save_checkpoint(tmp_path / "adapted", adapted, config={})
    loaded = load_checkpoint(tmp_path / "adapted").params
    assert_same_bytes(loaded, adapted)
    assert isinstance(loaded["mlp"]["kernel"].parts[-1], Adapter)


@pytest.fixture(scope="module")
def embedded():
    """The trained decoder at two bits, with adapters, and windows of its own kind of text."""
    model = load_default(scan_layers=True)
    texts = list(topics.values())[:8]  # documentation of Python, which the model was trained on
    windows = windows_from_text(model.tokenizer, texts, length=64, max_windows=16)
    qparams = ej.quantize_params(model.params, ej.quantize.RTN(bits=2, group_size=32, clip="mse", steps=8))
    return model, qparams, jnp.asarray(windows)


def test_training_adapters_of_a_two_bit_model_lowers_its_loss(embedded):
    model, qparams, windows = embedded
    params = ej.add_lora(qparams, 4, key=KEY)
    apply = strict(Decoder(model.config).apply)
    logits = jax.jit(lambda p, t: apply({"params": p}, t))
    np.testing.assert_array_equal(logits(params, windows[:2]), logits(qparams, windows[:2]))

    def loss(adapters, frozen, tokens):
        logits = apply({"params": ej.combine(adapters, frozen)}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    optimizer = optax.adam(3e-3)
    adapters, frozen = ej.partition_adapters(params)

    @jax.jit
    def step(adapters, state, frozen, tokens):
        value, gradient = jax.value_and_grad(loss)(adapters, frozen, tokens)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(adapters, updates), state, value

    state, losses = optimizer.init(adapters), []
    for i in range(10):
        tokens = windows[8 * (i % 2) : 8 * (i % 2) + 8]
        adapters, state, value = step(adapters, state, frozen, tokens)
        losses.append(float(value))
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.3, losses
    after = ej.combine(adapters, frozen)
    assert_same_bytes(ej.drop_adapters(after), qparams)
