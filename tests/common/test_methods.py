"""What every method must do: pure, the same bytes under jit, vmap and sharding, sizes known without weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import effjax as ej
from effjax import transform
from effjax.kv.cache import KVCache
from effjax.kv.evict import kv_evict
from effjax.kv.sink_window import SinkWindow
from tests.common.cases import KEY, METHODS, MethodCase, assert_same_bytes, mesh_of, method_params, place

every_method = pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
drawing = pytest.mark.parametrize("case", [case for case in METHODS if case.draws], ids=lambda case: case.name)
packing = pytest.mark.parametrize("case", [case for case in METHODS if ":" in str(case.method)], ids=lambda c: c.name)


@functools.cache
def eager(case: MethodCase, lead: tuple[int, ...] = ()):
    """The result on one device, outside of any transformation."""
    params = method_params(0, lead)
    return case(params, stats=case.stats(params))


@every_method
def test_pure(case):
    """Same inputs and key, same bytes; the input is not changed, other leaves are passed through."""
    params = method_params()
    before = jax.tree.map(np.asarray, params)
    result = case(params, stats=case.stats(params))
    assert_same_bytes(result, eager(case))
    assert_same_bytes(params, before)
    for outer, inner in (("mlp", "bias"), ("embed", "embedding")):
        expected = None if case.transform is ej.prune_mask else params[outer][inner]
        assert result[outer][inner] is expected


@drawing
def test_keys(case):
    """Another key gives other bytes, in every leaf; leaves of one tree draw differently."""
    params = method_params()
    other = case(params, seed=KEY + 1)
    for name in ("mlp", "out"):
        mine, others = jax.tree.leaves(eager(case)[name]["kernel"]), jax.tree.leaves(other[name]["kernel"])
        assert any(not np.array_equal(x, y) for x, y in zip(mine, others, strict=True))
    twins = {name: {"kernel": params["mlp"]["kernel"]} for name in ("left", "right")}
    a, b = (jax.tree.leaves(case(twins)[name]) for name in ("left", "right"))
    assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@drawing
def test_a_leaf_does_not_depend_on_the_others(case):
    alone = case({"mlp": method_params()["mlp"]})
    assert_same_bytes(alone["mlp"], eager(case)["mlp"])


@every_method
@pytest.mark.parametrize("lead", [(), (2,)], ids=["matrix", "stacked"])
def test_eval_shape(case, lead):
    """Shapes, dtypes, structure and bytes are known without weights."""
    params = method_params(0, lead)
    abstract = jax.eval_shape(lambda p, s: case(p, stats=s), params, case.stats(params))
    real = eager(case, lead)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(real)
    ]
    assert ej.nbytes(abstract) == ej.nbytes(real)


@every_method
def test_jit_gives_the_same_bytes_and_compiles_once(case):
    traces = []

    @jax.jit
    def run(params, stats, seed):
        traces.append(1)
        return case(params, stats=stats, seed=seed)

    params = method_params()
    assert_same_bytes(run(params, case.stats(params), KEY), eager(case))
    others = method_params(5)
    result = run(others, case.stats(others), KEY + 1)
    assert len(traces) == 1
    assert jax.tree.structure(result) == jax.tree.structure(eager(case))


@every_method
def test_eager_calls_share_one_program(case, monkeypatch):
    """Other values of the same shapes do not trace a method again."""
    eager(case)
    name = "mask" if case.transform is ej.prune_mask else "compress"
    original, calls = getattr(type(case.method), name), []
    monkeypatch.setattr(type(case.method), name, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    others = method_params(5)
    case(others, stats=case.stats(others))
    assert calls == []


@every_method
def test_vmap_over_layers_is_stacking(case):
    """`compress` or `mask` under vmap gives the bytes of one call a layer."""
    call = case.method.mask if case.transform is ej.prune_mask else case.method.compress
    layers = method_params(0, (3,))["mlp"]["kernel"]
    stats = case.stats({"kernel": layers})
    stats = None if stats is None else stats["kernel"]
    keys = jax.random.split(jax.random.key(KEY), 3) if case.draws else None
    axes = (0, None if stats is None else 0, None if keys is None else 0)

    def run(w, stats, key):
        return call(w, stats=stats, key=key)

    together = jax.jit(jax.vmap(run, in_axes=axes))(layers, stats, keys)
    one = jax.jit(run)
    single = [one(*jax.tree.map(lambda x, i=i: x[i], (layers, stats, keys))) for i in range(3)]
    assert_same_bytes(together, jax.tree.map(lambda *x: jnp.stack(x), *single))


@every_method
def test_stacked_leaves_are_taken_layer_by_layer(case):
    """A stacked leaf compresses to the layers that its slices compress to, where nothing is drawn or compared."""
    if case.draws or getattr(case.method, "scope", "leaf") == "global":
        whole = eager(case, (2,))["mlp"]["kernel"]
        first, second = (jax.tree.map(lambda x, i=i: np.asarray(x[i]), whole) for i in range(2))
        assert any(not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (first, second)), strict=True))
        return
    params = {"mlp": method_params(0, (2,))["mlp"]}
    whole = case(params, stats=case.stats(params))["mlp"]["kernel"]
    for i in range(2):
        layer = jax.tree.map(lambda x, i=i: x[i], params)
        stats = jax.tree.map(lambda x, i=i: x[i], case.stats(params))
        single = case(layer, stats=stats)["mlp"]["kernel"]
        assert_same_bytes(jax.tree.map(lambda x, i=i: x[i], whole), single)


@every_method
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("cut", [P("tensor", None), P(None, "tensor")], ids=["in", "out"])
def test_sharded_params_give_the_same_bytes(case, mode, cut):
    """And the result is sharded as the weights are, as far as its fields can be cut."""
    mesh = mesh_of(mode)
    params = method_params()
    dense_specs = jax.tree.map(lambda x: cut if x.ndim == 2 else P(None), params)
    stats = case.stats(params)
    with jax.set_mesh(mesh):
        sharded = place(params, dense_specs, mesh)
        stats = stats if stats is None else jax.device_put(stats, jax.sharding.NamedSharding(mesh, P()))
        result = case(sharded, stats=stats)
    assert_same_bytes(result, eager(case))
    wanted = ej.partition_specs(eager(case)["mlp"]["kernel"], cut, mesh)
    for x, spec in zip(
        jax.tree.leaves(result["mlp"]["kernel"]),
        jax.tree.leaves(wanted, is_leaf=lambda s: isinstance(s, P)),
        strict=True,
    ):
        assert x.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), x.ndim)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@every_method
def test_sharded_under_jit(case, mode):
    """A compiled transform of sharded weights gives the same bytes too."""
    mesh = mesh_of(mode)
    params = method_params()
    stats = case.stats(params)
    with jax.set_mesh(mesh):
        sharded = place(params, jax.tree.map(lambda x: P("tensor", None) if x.ndim == 2 else P(None), params), mesh)
        stats = stats if stats is None else jax.device_put(stats, jax.sharding.NamedSharding(mesh, P()))
        result = jax.jit(lambda p, s: case(p, stats=s))(sharded, stats)
    assert_same_bytes(result, eager(case))


@packing
def test_packed_masks_hold_what_masked_weights_hold(case):
    params = method_params()
    mask = eager(case)
    packed, masked = ej.pack_mask(params, mask), ej.apply_mask(params, mask)
    assert ej.nbytes(packed) < ej.nbytes(params)
    assert_same_bytes(ej.materialize(packed), masked)


def cache_of(seed: int, batch: int = 2, slots: int = 12) -> KVCache:
    """A ragged cache."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (2, batch, 2, slots)
    length = jax.random.randint(keys[2], shape[:3], 3, slots + 1)
    rank = jax.lax.broadcasted_iota(jnp.int32, shape, 3)
    return KVCache(
        k=jax.random.normal(keys[0], (*shape, 4)),
        v=jax.random.normal(keys[1], (*shape, 4)),
        positions=jnp.where(rank < length[..., None], rank, -1),
        scores=jnp.where(rank < length[..., None], 1.0, 0.0),
        length=length,
        offset=length.max((0, 2)),
    )


METHOD = SinkWindow(sinks=2, window=3)


def test_eviction_jit_vmap_and_shapes():
    cache = cache_of(0)
    evicted = kv_evict(cache, METHOD)
    assert_same_bytes(kv_evict(cache, METHOD), evicted)
    abstract = jax.eval_shape(lambda c: kv_evict(c, METHOD), cache)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(evicted)
    ]
    assert evicted.nbytes == abstract.nbytes < cache.nbytes
    traces = []

    @jax.jit
    def run(cache):
        traces.append(1)
        return kv_evict(cache, METHOD)

    assert_same_bytes(run(cache), evicted)
    run(cache_of(1))
    assert len(traces) == 1
    both = jax.tree.map(lambda *x: jnp.stack(x), cache, cache_of(1))
    together = jax.vmap(lambda c: kv_evict(c, METHOD))(both)
    assert_same_bytes(jax.tree.map(lambda x: x[0], together), evicted)
    assert_same_bytes(jax.tree.map(lambda x: x[1], together), kv_evict(cache_of(1), METHOD))


def test_eviction_of_a_sharded_cache():
    """Rows over "data", heads over nothing: the same bytes, still sharded by row."""
    cache = cache_of(0)
    mesh = mesh_of(AxisType.Auto)
    specs = jax.tree.map(lambda x: P(None, "data") if x.ndim > 1 else P("data"), cache)
    with jax.set_mesh(mesh):
        result = jax.jit(lambda c: kv_evict(c, METHOD))(place(cache, specs, mesh))
    assert_same_bytes(result, kv_evict(cache, METHOD))
    assert result.k.addressable_shards[0].data.shape[1] == cache.k.shape[1] // 2


def test_methods_are_data():
    """Hashable, equal by value, printable, and checked when made."""
    for case in METHODS:
        again = type(case.method)(**{f: getattr(case.method, f) for f in case.method.__dataclass_fields__})
        assert again == case.method and hash(again) == hash(case.method)
        assert type(case.method).__name__ in repr(case.method)
        assert isinstance(case.method, transform.Method)
        with pytest.raises(TypeError):
            type(case.method)(3)  # keyword-only
