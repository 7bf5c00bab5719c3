"""RigL and GraNet against a loop in NumPy; their state under jit, on a mesh, and through a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax as ej
from effjax.errors import ConfigError, LeafError
from effjax.prune import GraNet, Random, RigL, cubic_sparsity, sparse_training
from effjax.prune.sparse_training import moved

SHAPES = {"a": (6, 8), "b": (8, 5)}


def problem(seed=0, sparsity=0.5):
    draws = np.random.default_rng(seed)
    params = {name: {"kernel": jnp.asarray(draws.normal(size=s), jnp.float32)} for name, s in SHAPES.items()}
    params["b"]["bias"] = jnp.asarray(draws.normal(size=5), jnp.float32)
    mask = ej.prune_mask(params, Random(sparsity=sparsity), key=jax.random.key(seed))
    return ej.apply_mask(params, mask), mask


def gradients(seed, params):
    draws = np.random.default_rng(100 + seed)
    return jax.tree.map(lambda w: jnp.asarray(draws.normal(size=w.shape), jnp.float32), params)


def oracle_change(mask, w, g, total, grown):
    """Sets of flat positions, one after the other."""
    mask, w, g = (np.asarray(x).ravel() for x in (mask, w, g))
    active = sorted(np.flatnonzero(mask), key=lambda i: -abs(w[i]))
    stays = set(active[: total - grown])
    others = sorted((i for i in range(w.size) if i not in stays), key=lambda i: -abs(g[i]))
    return stays | set(others[:grown])


@pytest.mark.parametrize("step", [2, 4, 6])
def test_rigl_moves_the_smallest_to_the_largest_gradients(step):
    params, mask = problem()
    grads = gradients(step, params)
    new = moved(RigL(until=6, fraction=0.37), jnp.int32(step), mask, params, grads)
    for name in SHAPES:
        active = int(mask[name]["kernel"].sum())
        grown = int(np.floor(0.37 / 2 * (1 + np.cos(np.pi * step / 6)) * active))
        args = mask[name]["kernel"], params[name]["kernel"], grads[name]["kernel"]
        expected = oracle_change(*args, active, grown)
        assert set(np.flatnonzero(new[name]["kernel"])) == expected
    assert new["b"]["bias"] is None


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_granet_prunes_on_its_schedule_and_grows_back(scope):
    params, mask = problem(1, sparsity=0.0)
    method = GraNet(sparsity=0.8, until=10, every=2, regrow=0.5, scope=scope)
    grads = gradients(1, params)
    new = moved(method, jnp.int32(4), mask, params, grads)
    left = 1 - float(cubic_sparsity(4, 0, 10, 0.8))
    share = 0.5 / 2 * (1 + np.cos(np.pi * 0.4))
    groups = [[name] for name in SHAPES] if scope == "leaf" else [list(SHAPES)]
    for names in groups:
        m, w, g, found = (
            np.concatenate([np.asarray(tree[name]["kernel"]).ravel() for name in names])
            for tree in (mask, params, grads, new)
        )
        total = int(np.round(left * m.size))
        assert set(np.flatnonzero(found)) == oracle_change(m, w, g, total, int(np.floor(share * total)))


def test_steps_between_changes_are_the_optimizers_under_the_mask():
    params, mask = problem(2)
    optimizer = sparse_training(optax.adam(0.1), mask, RigL(every=3, until=9))
    plain, plain_state = optax.adam(0.1), optax.adam(0.1).init(params)
    state = optimizer.init(params)
    for seed in range(2):
        grads = gradients(seed, params)
        updates, state = optimizer.update(grads, state, params)
        expected, plain_state = plain.update(ej.apply_mask(grads, mask), plain_state, params)
        for name in SHAPES:
            wanted = jnp.where(mask[name]["kernel"], expected[name]["kernel"], 0)
            np.testing.assert_allclose(updates[name]["kernel"], wanted, rtol=1e-6)
        np.testing.assert_allclose(updates["b"]["bias"], expected["b"]["bias"], rtol=1e-6)
        params = optax.apply_updates(params, updates)


def test_a_change_drops_to_zero_and_grows_from_zero_with_fresh_moments():
    params, mask = problem(3)
    optimizer = sparse_training(optax.adam(0.1), mask, RigL(every=2, until=8, fraction=0.5))
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for seed in range(2):
        before, old = params, state
        updates, state = step(gradients(seed, params), state, params)
        params = optax.apply_updates(params, updates)
    for name in SHAPES:
        was, now = (np.asarray(s.mask[name]["kernel"]) for s in (old, state))
        w, mu = (np.asarray(tree[name]["kernel"]) for tree in (params, state.inner[0].mu))
        assert now.sum() == was.sum() and (now != was).any()
        np.testing.assert_array_equal(w[was & now], np.asarray(before[name]["kernel"])[was & now])
        assert not w[~(was & now)].any() and not mu[~(was & now)].any()
        assert mu[was & now].any()
    np.testing.assert_array_equal(params["b"]["bias"], before["b"]["bias"])


def test_a_run_keeps_its_density_and_the_weights_stay_under_the_mask():
    params, mask = problem(4, sparsity=0.75)
    target = jax.tree.map(lambda w: jnp.sign(gradients(9, {"w": w})["w"]), params)
    optimizer = sparse_training(optax.sgd(0.05, momentum=0.9), mask, RigL(every=4, until=30))

    def distance(params):
        return sum(jnp.sum((params[n]["kernel"] - target[n]["kernel"]) ** 2) for n in SHAPES)

    @jax.jit
    def step(params, state):
        grads = jax.grad(distance)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, changes, last = optimizer.init(params), 0, mask
    for count in range(1, 41):
        params, state = step(params, state)
        for name in SHAPES:
            now = np.asarray(state.mask[name]["kernel"])
            assert now.sum() == mask[name]["kernel"].sum()
            assert not np.asarray(params[name]["kernel"])[~now].any()
        moved_now = any((state.mask[n]["kernel"] != last[n]["kernel"]).any() for n in SHAPES)
        assert not moved_now or (count % 4 == 0 and count <= 30)
        changes, last = changes + moved_now, state.mask
    assert changes > 2


def test_the_state_is_sharded_with_the_parameters():
    params, mask = problem(5)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
    params, mask = (
        {n: tree[n] | {"kernel": jax.device_put(tree[n]["kernel"], spec)} for n in SHAPES} for tree in (params, mask)
    )
    optimizer = sparse_training(optax.adam(0.1), mask, RigL(every=1, until=8))
    updates, state = jax.jit(optimizer.update)(gradients(0, params), optimizer.init(params), params)
    single, single_mask = problem(5)
    alone = sparse_training(optax.adam(0.1), single_mask, RigL(every=1, until=8))
    expected, expected_state = alone.update(gradients(0, single), alone.init(single), single)
    for name in SHAPES:
        np.testing.assert_array_equal(state.mask[name]["kernel"], expected_state.mask[name]["kernel"])
        np.testing.assert_allclose(updates[name]["kernel"], expected[name]["kernel"], rtol=1e-6)


def test_bad_input_is_said():
    params, mask = problem()
    optimizer = sparse_training(optax.sgd(0.1), mask, RigL(until=5))
    with pytest.raises(ValueError, match=r"update needs the parameters: optimizer.update\(grads, state, params\)"):
        optimizer.update(params, optimizer.init(params))
    wrong = {"a": {"kernel": mask["a"]["kernel"][:2]}}
    with pytest.raises(LeafError, match=r"a/kernel: the mask is \[2, 8\], the weight \[6, 8\]"):
        sparse_training(optax.sgd(0.1), wrong, RigL(until=5)).init(params)
    with pytest.raises(ConfigError, match="every=0, until=5: steps, at least 1"):
        RigL(until=5, every=0)
    with pytest.raises(ConfigError, match=r"sparsity=1.0: a share in \[0, 1\)"):
        GraNet(sparsity=1.0, until=5)
    with pytest.raises(ConfigError, match="scope='layer': choose 'leaf' or 'global'"):
        RigL(until=5, scope="layer")
