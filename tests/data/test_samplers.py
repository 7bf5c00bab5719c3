"""What every sampler must do: valid draws, resume within an epoch, and the same ids however its state is laid out."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.data import NWS, ExactLoss, SelectiveBackprop, SeTa, Spec, StaleLoss, Subset, Uniform, of_host
from effjax.errors import ConfigError

N, BATCH = 96, 8
FEATURES = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
SCORES = np.random.default_rng(1).exponential(size=N).astype(np.float32)
SAMPLERS = {
    "uniform": Uniform(),
    "nws": NWS(rows=8, hashes=3, warmup=2, groups=4, weighted=True),
    "stale": StaleLoss(warmup=2),
    "stale, all": StaleLoss(warmup=2, pool=None, weighted=True),
    "exact": ExactLoss(),
    "subset": Subset(keep=0.5),
    "seta": SeTa(keep=0.75, groups=6, window=2, epochs=8, annealing=1),
    "selective": SelectiveBackprop(history=32),
}
every_sampler = pytest.mark.parametrize("name", SAMPLERS)


def started(name, seed=0):
    return SAMPLERS[name].init(N, Spec(features=FEATURES, scores=SCORES, seed=seed))


def stepper(sampler):
    """A step whose losses depend on the examples alone, and grow with their number."""

    @jax.jit
    def step(state, number):
        ids, weights = sampler.draw(state, jax.random.fold_in(jax.random.key(9), number), BATCH)
        return ids, weights, sampler.update(state, ids, ids / N + 0.1)

    return step


STEPS = {name: stepper(sampler) for name, sampler in SAMPLERS.items()}


def run(name, state, first, last):
    drawn = []
    for number in range(first, last):
        ids, weights, state = STEPS[name](state, number)
        drawn.append((np.asarray(ids), np.asarray(weights)))
    return drawn, state


def equal(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@every_sampler
def test_draws_are_valid_and_resume_in_the_middle_of_an_epoch(name):
    """Saved as plain arrays after 5 steps and read back, 15 more steps are those of a run that was never stopped."""
    whole, end = run(name, started(name), 0, 20)
    for ids, weights in whole:
        assert ids.dtype == np.int32 and len(set(ids.tolist())) == BATCH
        assert ids.min() >= 0 and ids.max() < N and (weights > 0).all()
    _, middle = run(name, started(name), 0, 5)
    leaves, structure = jax.tree.flatten(middle)
    assert all(isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        back = jax.tree.unflatten(structure, [jnp.asarray(saved[key]) for key in saved.files])
    rest, resumed = run(name, back, 5, 20)
    equal(rest, whole[5:])
    equal(resumed, end)
    if name in ("stale, all", "exact"):  # the key of the step decides
        return
    assert not np.array_equal(run(name, started(name, seed=1), 0, 1)[0][0][0], whole[0][0])


@every_sampler
def test_the_number_of_hosts_and_devices_changes_nothing(name):
    """Tables on one device and split over 8; the ids of 1, 2 and 4 hosts put together."""
    whole, _ = run(name, started(name), 0, 6)
    mesh = Mesh(np.array(jax.devices()[:8]), "data")

    def laid_out(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] == N
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec()))

    if any(leaf.ndim and leaf.shape[0] == N for leaf in jax.tree.leaves(started(name))):
        spread, _ = run(name, jax.tree.map(laid_out, started(name)), 0, 6)
        equal([ids for ids, _ in spread], [ids for ids, _ in whole])
    for hosts in (1, 2, 4):
        parts = [of_host(whole[0], host, hosts) for host in range(hosts)]
        equal(jax.tree.map(lambda *part: np.concatenate(part), *parts), whole[0])


def test_stale_losses_decide_and_unseen_ones_count_as_the_mean():
    sampler = StaleLoss(pool=None, warmup=0, uniform=0.0)
    state = sampler.init(5, Spec())
    state = sampler.update(state, jnp.array([0, 1]), jnp.array([0.0, 6.0]))
    draws = jax.jit(jax.vmap(lambda key: sampler.draw(state, key, 1)[0]))(jax.random.split(jax.random.key(0), 1500))
    share = np.bincount(np.asarray(draws).ravel(), minlength=5) / 1500
    np.testing.assert_allclose(share, np.array([0, 6, 3, 3, 3]) / 15, atol=4.5 * 0.5 / np.sqrt(1500))
    assert share[0] == 0


def test_exact_losses_are_refreshed_when_due():
    sampler, due = ExactLoss(every=3, uniform=0.0), []
    state = sampler.init(6, Spec())
    update = jax.jit(sampler.update)
    for _ in range(7):
        due.append(bool(sampler.due(state)))
        state = update(state, jnp.arange(2), jnp.zeros(2))
    assert due == [True, False, False, True, False, False, True]
    state = sampler.refresh(state, jnp.array([0, 1, 0, 0, 2, 0.0]))
    assert set(jax.jit(sampler.draw, static_argnums=2)(state, jax.random.key(0), 2)[0].tolist()) == {1, 4}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: StaleLoss(pool=0), "pool at least 1 or None"),
        (lambda: ExactLoss(every=0), "every=0, uniform=0.3: at least 1"),
        (lambda: StaleLoss().init(4, Spec(scores=jnp.ones(3))), r"scores \[3\] for n=4: give one an example"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
