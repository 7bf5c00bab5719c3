"""Clustered training over trees: which leaves, the state, and the export."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import effjax as ej
from effjax.arrays import Codebook, View
from effjax.errors import LeafError, RuleError
from effjax.quantize import DKM, EDKM, Clusters, harden, init_clusters, palettize


def tree(lead=()):
    keys = jax.random.split(jax.random.key(0), 4)
    return {
        "embed": {"embedding": jax.random.normal(keys[0], (16, 32))},
        "attention": {"query": {"kernel": 0.1 * jax.random.normal(keys[1], (*lead, 32, 4, 8))}},
        "mlp": {"kernel": 0.1 * jax.random.normal(keys[2], (*lead, 32, 48)), "bias": jnp.ones((*lead, 48))},
        "norm": {"scale": jnp.ones((*lead, 32))},
        "lm_head": {"kernel": jax.random.normal(keys[3], (32, 16))},
    }


UNTOUCHED = (("embed", "embedding"), ("mlp", "bias"), ("norm", "scale"), ("lm_head", "kernel"))
soften = jax.jit(palettize, static_argnums=1)


@pytest.mark.parametrize("method", [DKM(bits=2), EDKM(bits=2, group_columns=8)], ids=["dense", "unique"])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["matrix", "stacked"])
def test_leaves_and_shapes(method, lead):
    """Embeddings, norms, biases and the head stay; soft weights have the shapes of the weights, attention heads too."""
    params = tree(lead)
    state = init_clusters(params, method)
    soft, moved = soften(params, method, state)
    hard = harden(params, moved)
    groups = 1 if method.group_columns is None else 6
    assert state["mlp"]["kernel"].centroids.shape == (*lead, groups, 4)
    assert jax.tree.map(jnp.shape, soft) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    for outer, inner in UNTOUCHED:
        np.testing.assert_array_equal(soft[outer][inner], params[outer][inner])
        assert hard[outer][inner] is params[outer][inner]
        assert state[outer][inner] is None and moved[outer][inner] is None
    assert isinstance(hard["mlp"]["kernel"], Codebook)
    assert isinstance(hard["attention"]["query"]["kernel"], View)
    assert jax.tree.map(jnp.shape, ej.materialize(hard)) == jax.tree.map(jnp.shape, params)


def test_each_table_sees_its_own_weights():
    """A group of columns of a stacked weight is what the function gives for it alone."""
    w = 0.1 * jax.random.normal(jax.random.key(0), (2, 32, 12))
    method = DKM(bits=2, group_columns=4)
    state = init_clusters({"kernel": w}, method)
    soft, moved = soften({"kernel": w}, method, state)
    for layer in range(2):
        for g in range(3):
            part = w[layer, :, 4 * g : 4 * g + 4]
            tau = method.tau * np.asarray(part).var()
            np.testing.assert_allclose(state["kernel"].tau[layer, g], tau, rtol=1e-5)
            want, centroids = ej.quantize.dkm_soft(part, state["kernel"].centroids[layer, g], tau, 3)
            np.testing.assert_allclose(soft["kernel"][layer, :, 4 * g : 4 * g + 4], want, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(moved["kernel"].centroids[layer, g], centroids, rtol=1e-4, atol=1e-6)


def test_heads_are_where_they_were():
    """With as many centroids as values and a cold temperature nothing changes, axes included."""
    values = jnp.array([-1.0, -0.5, 0.25, 1.0])
    params = {"attention": {"query": {"kernel": values[jax.random.randint(jax.random.key(0), (8, 4, 6), 0, 4)]}}}
    method = EDKM(bits=2, tau=1e-6)
    state = init_clusters(params, method)
    soft, moved = soften(params, method, state)
    for result in (soft, ej.materialize(harden(params, moved))):
        np.testing.assert_allclose(result["attention"]["query"]["kernel"], params["attention"]["query"]["kernel"])


def test_rules():
    """The first match decides; another method for another leaf, also one that the default leaves out."""
    params = tree()
    rules = (("embed/*", DKM(bits=4)), ("mlp/kernel", EDKM(bits=1)), ("*", None))
    state = init_clusters(params, rules)
    soft, moved = soften(params, rules, state)
    hard = harden(params, moved)
    assert len(np.unique(ej.materialize(hard)["mlp"]["kernel"])) == 2
    assert len(np.unique(ej.materialize(hard)["embed"]["embedding"])) == 16
    np.testing.assert_array_equal(soft["attention"]["query"]["kernel"], params["attention"]["query"]["kernel"])


def test_gradients_reach_the_weights_and_not_the_state():
    params, method = tree(), EDKM(bits=2)
    state = init_clusters(params, method)

    def loss(params, state):
        soft, moved = palettize(params, method, state)
        buffers = sum(x.sum() for x in jax.tree.leaves(moved))
        return jnp.square(soft["mlp"]["kernel"]).sum() + buffers

    grads, to_state = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, state)
    assert float(jnp.abs(grads["mlp"]["kernel"]).max()) > 0
    assert float(jnp.abs(grads["attention"]["query"]["kernel"]).max()) == 0  # only its buffers are in the loss
    assert all(float(jnp.abs(c.centroids).max()) == 0 for c in (to_state["mlp"]["kernel"],))


def test_temperature_hardens():
    """Colder soft weights are nearer to hard ones."""
    params, method = tree(), EDKM(bits=2)
    state = init_clusters(params, method)
    gaps = []
    for temperature in (1.0, 0.1, 1e-3):
        soft, moved = soften(params, method, state, temperature=jnp.float32(temperature))
        hard = ej.materialize(harden(params, moved))
        gaps.append(float(jnp.abs(soft["mlp"]["kernel"] - hard["mlp"]["kernel"]).mean()))
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] and gaps[2] < 1e-3


def test_hardening_twice_is_hardening_once():
    """Hard weights are their own nearest centroids, whether taken as weights or softened when cold."""
    params, method = tree(), EDKM(bits=2, tau=1e-5)
    _, state = soften(params, method, init_clusters(params, method))
    once = harden(params, state)
    again = harden(ej.materialize(once), state)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    soft, _ = soften(params, method, state)
    codes = harden(soft, state)["mlp"]["kernel"].codes
    assert np.mean(np.asarray(codes) != np.asarray(once["mlp"]["kernel"].codes)) < 0.02  # but for ties


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_export(bits, tmp_path):
    """Bytes within two hundredths of bits/32; the nearest centroid; the reloaded model is the finalised one."""
    params = {"kernel": jax.random.normal(jax.random.key(bits), (64, 129))}
    state = init_clusters(params, DKM(bits=bits))
    hard = harden(params, state)
    assert hard["kernel"].nbytes <= (bits / 32 + 0.02) * params["kernel"].nbytes
    c = np.sort(np.asarray(state["kernel"].centroids[0]))
    w = np.asarray(params["kernel"])
    want = c[np.abs(w[..., None] - c).argmin(-1)]
    np.testing.assert_array_equal(hard["kernel"].materialize(), want)
    ej.io.save_orbax(tmp_path / "model", hard)
    loaded = ej.io.load_orbax(tmp_path / "model")
    np.testing.assert_array_equal(loaded["kernel"].materialize(), want)
    assert loaded["kernel"].bits == bits


def test_codes_of_columns_that_end_inside_a_byte():
    """61 codes of 1 to 4 bits: the last byte of each column is padded, and nothing is lost."""
    w = jax.random.normal(jax.random.key(0), (61, 5))
    for bits in (1, 2, 3, 4):
        clusters = Clusters(centroids=jnp.linspace(-1, 1, 2**bits)[None], tau=jnp.ones(1))
        hard = harden({"kernel": w}, {"kernel": clusters})["kernel"]
        assert hard.codes.shape == (-(-61 * bits // 8), 5) and hard.shape == (61, 5)
        assert len(np.unique(hard.materialize())) == 2**bits


def test_state_is_checkpointed(tmp_path):
    params, method = tree(), EDKM(bits=2)
    _, state = soften(params, method, init_clusters(params, method))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_stacked_layers_under_eval_shape():
    shapes = jax.eval_shape(lambda: tree((3,)))
    method = EDKM(bits=2)
    state = jax.eval_shape(lambda p: init_clusters(p, method), shapes)
    hard = jax.eval_shape(harden, shapes, state)
    assert state["mlp"]["kernel"].centroids.shape == (3, 1, 4) and hard["mlp"]["kernel"].codes.shape == (3, 8, 48)


def test_wrong_states():
    params, method = tree(), DKM(bits=2)
    state = init_clusters(params, method, where="mlp/kernel")
    with pytest.raises(
        RuleError, match="^state has no clusters for attention/query/kernel: make it with init_clusters"
    ):
        palettize(params, method, state)
    with pytest.raises(LeafError, match=r"^mlp/kernel \[32, 48\]: its clusters are \[1, 4\], .* wants \[1, 8\]: make"):
        palettize(params, DKM(bits=3), state, where="mlp/kernel")
    with pytest.raises(RuleError, match="^state has clusters for mlp/kernel, which params do not have$"):
        harden({"other": params["mlp"]}, state)
    wrong = {"kernel": Clusters(centroids=jnp.ones((2, 1, 4)), tau=jnp.ones((2, 1)))}
    with pytest.raises(LeafError, match=r"^kernel \[32, 48\]: clusters \[2, 1, 4\] are of another weight$"):
        harden({"kernel": params["mlp"]["kernel"]}, wrong)
    hard = harden(params, state)
    with pytest.raises(LeafError, match=r"^mlp/kernel is compressed already \(Codebook.*: harden the parameters that"):
        harden(hard, state)
