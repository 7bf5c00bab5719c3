"""One table for a model: the maps against an oracle in numpy, fits, gradients of the table, and even, exact folding."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import effjax as ej
from effjax.arrays.shared import fold_slots, shared_array
from effjax.errors import ConfigError, LeafError
from effjax.io import load_checkpoint, save_checkpoint, verify_checkpoint
from effjax.recipe import parse_method
from effjax.sketch import (
    ROAST,
    SharedParams,
    StableRPS,
    expand,
    scale_gradients,
    scale_updates,
    share_params,
    slot_scales,
)
from tests.common.cases import assert_same_bytes
from tests.sketch.oracles import mix

KEY = jax.random.key(1)
METHODS = (StableRPS(ratio=3.3), StableRPS(ratio=3.3, start="fit"), ROAST(ratio=3.3, block=4))
methods = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}-{m.ratio:g}-{m.start}")
few = pytest.mark.parametrize("method", [METHODS[0], METHODS[2]], ids=["StableRPS", "ROAST"])


def model(seed=0):
    """A chain of two matrices of different scales, and what is not shared."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "up": {"kernel": jax.random.normal(keys[0], (12, 10)), "bias": jnp.arange(10.0)},
        "down": {"kernel": 0.1 * jax.random.normal(keys[1], (10, 7))},
        "norm": {"scale": jnp.ones(7)},
    }


def forward(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return hidden @ params["down"]["kernel"] * params["norm"]["scale"]


folded = jax.jit(fold_slots)
materialized = jax.jit(lambda shared: ej.materialize(expand(shared)))
INPUTS = jax.random.normal(jax.random.key(2), (6, 12))


def design(shared):
    """Row p holds the factor with which weight p of the model reads its slot; weights in the order of the leaves."""
    slots = shared.table.size
    rows = []
    for leaf in jax.tree.leaves(shared.params, is_leaf=ej.is_compressed):
        array = shared_array(leaf)
        if array is None:
            continue
        for seed, start, exponent in zip(
            *(np.ravel(x) for x in (array.seed, array.start, array.exponent)), strict=True
        ):
            for entry in range(array.in_features * array.out_features):
                place = int(start) + entry
                if array.block is None:
                    slot = (mix(mix(seed) ^ (place // slots)) % slots + place % slots) % slots
                else:
                    tile = mix(mix(int(seed) + int(start) * 0x9E3779B1) ^ ((entry // array.block * 0x85157AF5) % 2**32))
                    slot = tile % (slots - array.block + 1) + entry % array.block
                sign = 1 - 2 * (mix(mix(int(seed) + 0x27D4EB2F) ^ (place * 0xC2B2AE3D % 2**32)) >> 31)
                rows.append((slot, sign * 2.0 ** int(exponent)))
    matrix = np.zeros((len(rows), slots))
    for p, (slot, factor) in enumerate(rows):
        matrix[p, slot] = factor
    return matrix


def row(params):
    """The shared weights of `model`, in the order of the leaves."""
    return np.concatenate([np.ravel(params[name]["kernel"]) for name in ("down", "up")])


@methods
def test_weights_are_the_table_through_the_map(method):
    shared = share_params(model(), method, key=KEY)
    assert shared.table.size == -(-190 // method.ratio) and ej.nbytes(shared) == 4 * (shared.table.size + 2 * 3 + 17)
    dense = materialized(shared)
    np.testing.assert_allclose(row(dense), design(shared) @ np.asarray(shared.table), rtol=1e-6, atol=1e-6)
    assert expand(shared)["up"]["bias"] is shared.params["up"]["bias"]


@methods
def test_start(method):
    """The fit leaves a residual orthogonal to the map; an initialisation keeps the spread that a mean would shrink."""
    params = model()
    shared = share_params(params, method, key=KEY)
    matrix = design(shared)
    used = np.abs(matrix).sum(0) > 0
    if method.start == "fit":
        best, *_ = np.linalg.lstsq(matrix, row(params), rcond=None)
    else:
        signs, scales = np.sign(matrix), np.abs(matrix).sum(1)
        best = signs.T @ (row(params) / scales) / np.sqrt(np.maximum(np.abs(signs).sum(0), 1))
    np.testing.assert_allclose(np.asarray(shared.table)[used], best[used], atol=1e-5)
    np.testing.assert_array_equal(np.asarray(shared.table)[~used], 0)


@pytest.mark.parametrize("make", [StableRPS, ROAST])
def test_an_initialisation_keeps_its_spread(make):
    keys = jax.random.split(KEY, 2)
    params = {
        name: {"kernel": s * jax.random.normal(k, (64, 48))} for name, s, k in zip("ab", (2.0, 0.01), keys, strict=True)
    }
    dense = materialized(share_params(params, make(ratio=10), key=KEY))
    for name, scale in (("a", 2.0), ("b", 0.01)):
        assert 0.7 < np.std(dense[name]["kernel"]) / scale < 1.45


@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.integers(0, 2**20))
@settings(max_examples=20)
def test_folding_is_even(seed, slots, start):
    """Over any run of places that starts a fold, slots are read equally often up to one; over one fold exactly once."""
    place = (start * slots + np.arange(300)) % 2**32 if start * slots < 2**31 else np.arange(300)
    read = np.asarray(folded(np.uint32(seed), place.astype(np.uint32), slots))
    loads = np.bincount(read, minlength=slots)
    assert loads.size == slots and loads.max() - loads.min() <= 1


@pytest.mark.parametrize(("start", "table_std"), [("init", 123.0), ("fit", 1e-3)])
def test_ratio_one_is_the_dense_model(start, table_std):
    """The same bits, and the same bits after steps of gradient descent with momentum: Pareto-continuity."""
    params = model()
    shared = share_params(params, StableRPS(ratio=1, start=start, table_std=table_std), key=KEY)
    assert_same_bytes(materialized(shared), params)
    scales = slot_scales(shared)
    trained, frozen = ej.partition(shared)

    def loss(params):
        return jnp.square(forward(params, INPUTS) - 1).mean()

    def descend(velocity, p, g, scaled=lambda x: x):
        velocity = jax.tree.map(lambda v, g: 0.5 * v - 0.25 * g, velocity, g)
        return velocity, jax.tree.map(jnp.add, p, scaled(velocity))

    @jax.jit
    def both(dense, dense_velocity, trained, velocity):
        gradient = jax.grad(lambda t: loss(ej.materialize(expand(ej.combine(t, frozen)))))(trained)
        velocity, trained = descend(
            velocity, trained, scale_gradients(gradient, scales), lambda v: scale_updates(v, scales)
        )
        return *descend(dense_velocity, dense, jax.grad(loss)(dense))[::-1], trained, velocity

    dense, dense_velocity = params, jax.tree.map(jnp.zeros_like, params)
    velocity = jax.tree.map(jnp.zeros_like, trained)
    for _ in range(5):
        dense, dense_velocity, trained, velocity = both(dense, dense_velocity, trained, velocity)
    after = materialized(ej.combine(trained, frozen))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), after, dense)
    assert np.abs(row(after) - row(params)).max() > 1e-2


def test_roast_does_not_give_the_dense_model_back():
    """The defect that STABLE-RPS mends: tiles collide, some slots are never read."""
    shared = share_params(model(), ROAST(ratio=1, block=4), key=KEY)
    loads = (design(shared) != 0).sum(0)
    assert loads.max() >= 3 and loads.min() == 0


@pytest.mark.parametrize("how", ["lift", "materialize"])
@few
def test_gradient_of_the_table(method, how):
    """Summed over all leaves and all readers of a slot, by autodiff as by the oracle's map."""
    shared = share_params(model(), method, key=KEY)
    apply = ej.lift(forward) if how == "lift" else lambda params, x: forward(ej.materialize(params), x)

    def loss(table):
        return jnp.square(apply(expand(shared.replace(table=table)), INPUTS)).sum()

    got = jax.jit(jax.grad(loss))(shared.table)
    dense = jax.grad(lambda p: jnp.square(forward(p, INPUTS)).sum())(materialized(shared))
    np.testing.assert_allclose(got, design(shared).T @ row(dense), rtol=1e-4, atol=1e-4)


@few
def test_scales(method):
    """A scaled gradient step is the orthogonal projection of the dense one onto what the table can hold."""
    shared = share_params(model(), method, key=KEY)
    matrix = design(shared)
    scales = slot_scales(shared)
    g = np.random.default_rng(0).normal(size=190)
    table = scale_updates(scale_gradients(shared.replace(table=jnp.float32(matrix.T @ g)), scales), scales).table
    np.testing.assert_allclose(matrix @ np.asarray(table), matrix @ np.linalg.pinv(matrix) @ g, atol=1e-5)
    rms = np.sqrt((matrix**2).sum(0) / np.maximum((matrix != 0).sum(0), 1))
    used = rms > 0
    np.testing.assert_allclose(scales.update[used], 1 / rms[used], rtol=1e-6)
    assert np.isfinite(scales.gradient).all() and np.isfinite(scales.update).all()


def test_steps_do_not_know_the_spread_of_the_table():
    """The instability that the scales mend: a step of plain ROAST grows with the square of a leaf's scale."""
    summed_gradient = jax.jit(jax.grad(lambda t, s: forward(ej.materialize(expand(s.replace(table=t))), INPUTS).sum()))
    moved = {}
    for std in (1.0, 2.0**6):
        for make in (ROAST, StableRPS):
            shared = share_params(model(), make(ratio=4, table_std=std), key=KEY)
            step = shared.replace(table=summed_gradient(shared.table, shared))
            if make is StableRPS:
                scales = slot_scales(shared)
                step = scale_updates(scale_gradients(step, scales), scales)
            moved[make, std] = design(shared) @ np.asarray(step.table)
    np.testing.assert_allclose(moved[StableRPS, 2.0**6], moved[StableRPS, 1.0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moved[ROAST, 2.0**6], moved[ROAST, 1.0] / 2.0**12, rtol=1e-3, atol=1e-8)


def test_no_dense_weight_is_kept_for_the_gradient():
    """What `vjp` holds is the table, seeds and activations: a dense copy of a weight would be 128 KB."""
    shapes = {"a": (128, 256), "b": (256, 128), "c": (128, 256)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    shared = share_params(params, StableRPS(ratio=64), key=KEY)

    def chain(params, x):
        for name in "abc":
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    def kept(apply):
        closure = jax.eval_shape(
            lambda table, x: jax.vjp(lambda t: apply(expand(shared.replace(table=t)), x), table)[1],
            shared.table,
            jnp.ones((2, 128)),
        )
        return ej.nbytes(closure)

    assert kept(ej.lift(chain)) < 128 * 256 * 4 / 4
    assert kept(lambda params, x: chain(ej.materialize(params), x)) > 3 * 128 * 256 * 4


def test_other_shapes():
    """Attention kernels, windows of convolutions and stacks come back in their shapes; all read one table."""
    params = {
        "attention": {"query": {"kernel": jax.random.normal(KEY, (6, 2, 4))}},
        "conv": {"kernel": jax.random.normal(KEY, (3, 3, 2, 4))},
        "layers": {"mlp": {"kernel": jax.random.normal(KEY, (3, 5, 4))}},
    }
    shared = share_params(params, StableRPS(ratio=1), key=KEY)
    assert shared.table.shape == (180,)
    expanded = expand(shared)
    assert_same_bytes(materialized(shared), params)
    assert expanded["layers"]["mlp"]["kernel"].table.shape == (3, 180)
    assert expanded["conv"]["kernel"].array.table.shape == (180,)


@few
def test_pure_and_traceable(method):
    params = model()
    shared = share_params(params, method, key=KEY)
    assert_same_bytes(shared, share_params(params, method, key=KEY))
    assert_same_bytes(shared, jax.jit(lambda p, k: share_params(p, method, key=k))(params, KEY))
    shapes = jax.eval_shape(lambda p, k: share_params(p, method, key=k), params, KEY)
    assert ej.nbytes(shapes) == ej.nbytes(shared)
    other = share_params(params, method, key=jax.random.key(9))
    assert not np.array_equal(other.table, shared.table)
    ensemble = jax.vmap(lambda k: share_params(params, method, key=k))(jax.random.split(KEY, 2))
    both = jax.vmap(lambda s: ej.lift(forward)(expand(s), INPUTS))(ensemble)
    one = ej.lift(forward)(expand(jax.tree.map(lambda x: x[1], ensemble)), INPUTS)
    np.testing.assert_allclose(both[1], one, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(tmp_path):
    shared = share_params(model(), StableRPS(ratio=3), key=KEY)
    save_checkpoint(tmp_path / "model", {"table": shared.table, "params": shared.params}, config={})
    assert verify_checkpoint(tmp_path / "model") == []
    loaded = SharedParams(**load_checkpoint(tmp_path / "model").params)
    assert_same_bytes(loaded, shared)


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (StableRPS, {"ratio": 0.5}, "ratio=0.5: at least 1 weight a slot"),
        (StableRPS, {"table_std": 0.0}, "table_std=0.0: choose a positive spread, such as 1.0"),
        (StableRPS, {"start": "zero"}, "start='zero': 'init' for freshly drawn weights, 'fit' for trained ones"),
        (ROAST, {"block": 0}, "block=0: at least 1"),
    ],
)
def test_wrong_options(make, options, text):
    with pytest.raises(ValueError, match=f"^{text}$"):
        make(**options)


def test_what_cannot_be_shared():
    def fails(error, text, params, method, **options):
        with pytest.raises(error) as found:
            share_params(params, method, key=KEY, **options)
        assert str(found.value) == text

    params = model()
    fails(
        LeafError,
        "190 weights at ratio=100 leave 2 slots, fewer than a block of 8: choose a smaller ratio or block",
        params,
        ROAST(ratio=100),
    )
    fails(
        LeafError,
        "w [3, 4] is all zeros, so it has no scale: leave it out with where=",
        {"w": jnp.zeros((3, 4))},
        StableRPS(),
    )
    fails(
        TypeError,
        "Hashed(ratio=8.0, block=1) does not share a table among leaves: use ROAST or StableRPS, or sketch_params",
        params,
        ej.sketch.Hashed(),
    )
    for method in (StableRPS(), [("*/kernel", StableRPS())]):
        with pytest.raises(ConfigError, match=r"shares one table among all leaves: use effjax.sketch.share_params$"):
            ej.sketch_params(params, method, key=KEY)
    waiting = share_params(params, StableRPS(), key=KEY)
    with pytest.raises(LeafError, match=r"waits for its table: read it through effjax.sketch.expand\(shared\)$"):
        ej.materialize(waiting.params)
    with pytest.raises(LeafError, match="no leaf reads the table"):
        slot_scales(SharedParams(jnp.ones(3), params))


@pytest.mark.parametrize("name", ["roast", "stable_rps", "STABLE-RPS"])
def test_recipes_say_how_whole_models_are_shared(name):
    with pytest.raises(ConfigError, match="shares one table among all leaves and is no method of single ones"):
        parse_method(name)
