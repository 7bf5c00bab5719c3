"""Scores, budgets and shrinking, against loops over single units; Flax modules; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import LeafError
from effjax.prune import Structured, kept_units, magnitude_scores, random_scores, shrink, structured_mask, taylor_scores
from tests.prune.nets import assert_shrunk_as_masked, mask_by_hand, mlp, mlp_params, normal

PARAMS, X = mlp_params((5, 8, 12, 3)), normal(9, 6, 5)
GROUPS = ej.prune.coupled_groups(mlp, PARAMS, X)
FIRST, SECOND = GROUPS.groups


def loss(params, x, y):
    return jnp.mean((mlp(params, x) - y) ** 2)


@pytest.mark.parametrize("norm", [1, 2])
def test_magnitudes_are_norms_of_all_that_goes_with_a_unit(norm):
    scores = magnitude_scores(PARAMS, GROUPS, norm=norm)
    for i in range(8):
        column, row = np.asarray(PARAMS["layer_0"]["kernel"])[:, i], np.asarray(PARAMS["layer_1"]["kernel"])[i]
        expected = np.linalg.norm(np.concatenate([column, row]), ord=norm)
        np.testing.assert_allclose(scores[FIRST][i], expected, rtol=1e-5)


def test_taylor_is_the_first_order_change_by_finite_differences():
    batches = [(X[:3], normal(1, 3, 3)), (X[3:], normal(2, 3, 3))]
    with jax.enable_x64():
        params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), PARAMS)
        scores = taylor_scores(loss, params, GROUPS, batches)

        def change(path, index, batch, step=1e-6):
            layer, name = path.split("/")
            w = params[layer][name]

            def at(factor):
                return loss(params | {layer: params[layer] | {name: w.at[index].multiply(factor)}}, *batch)

            return (at(1 + step) - at(1 - step)) / (2 * step)

        for unit in (0, 7):
            changes = [
                change("layer_0/kernel", (slice(None), unit), b) ** 2 + change("layer_1/kernel", unit, b) ** 2
                for b in batches
            ]
            np.testing.assert_allclose(scores[FIRST][unit], np.mean(changes), rtol=1e-4)


def test_taylor_needs_batches_and_leaves_integers_out():
    with pytest.raises(LeafError, match="no batches"):
        taylor_scores(loss, PARAMS, GROUPS, [])
    counted = PARAMS | {"step": jnp.int32(3)}
    groups = ej.prune.coupled_groups(lambda p, x: mlp({k: p[k] for k in PARAMS}, x), counted, X)
    scores = taylor_scores(
        lambda p, x, y: loss({k: p[k] for k in PARAMS}, x, y), counted, groups, [(X, normal(1, 6, 3))]
    )
    assert set(scores) == set(groups.groups)


def test_random_scores_follow_the_key():
    one, same, other = (random_scores(GROUPS, jax.random.key(seed)) for seed in (0, 0, 1))
    assert (one[FIRST] == same[FIRST]).all() and (one[FIRST] != other[FIRST]).all()


@pytest.mark.parametrize("of", ["units", "weights", "flops"])
@pytest.mark.parametrize("scope", ["group", "global"])
def test_budgets_are_met_and_not_by_more_than_a_step(of, scope):
    scores = magnitude_scores(PARAMS, GROUPS)
    method = Structured(sparsity=0.4, of=of, scope=scope)
    mask = structured_mask(PARAMS, GROUPS, scores, method)
    small = shrink(PARAMS, mask, GROUPS)
    keep = kept_units(PARAMS, mask, GROUPS)

    def size(params):
        kernels = [layer["kernel"] for layer in params.values()]
        if of == "units":
            return sum(w.shape[1] for w in kernels[:-1])
        return sum(w.size for w in (kernels if of == "flops" else jax.tree.leaves(params)))

    if (of, scope) == ("units", "group"):
        assert {name: int(k.sum()) for name, k in keep.items()} == {FIRST: 8 - 3, SECOND: 12 - 4}
        return
    assert size(small) <= 0.6 * size(PARAMS)
    for name, kept in keep.items():  # the worst of what stays is no worse than the best of what goes
        assert scores[name][kept].min() >= scores[name][~kept].max()
    lost = {name: int((~kept).sum()) for name, kept in keep.items()}
    if scope == "group":
        assert lost[SECOND] / 12 == pytest.approx(lost[FIRST] / 8, abs=1 / 8)
    else:
        relative = {name: s / s.mean() for name, s in scores.items()}
        gone = np.concatenate([relative[name][~kept] for name, kept in keep.items()])
        assert gone.max() <= min(relative[name][kept].min() for name, kept in keep.items())
        name = max(keep, key=lambda n: relative[n][~keep[n]].max(initial=-1))
        back = dict(keep) | {name: keep[name].copy()}
        back[name][np.flatnonzero(~keep[name])[relative[name][~keep[name]].argmax()]] = True
        restored = shrink(
            PARAMS, mask_by_hand(PARAMS, GROUPS, {n: np.flatnonzero(~k) for n, k in back.items()}), GROUPS
        )
        assert size(restored) > 0.6 * size(PARAMS)


def test_equal_groups_lose_equally_many():
    params = mlp_params((5, 7, 7, 7, 3))
    groups = ej.prune.coupled_groups(mlp, params, X)
    for sparsity in (0.1, 0.5, 0.8):
        for of in ("units", "weights", "flops"):
            method = Structured(sparsity=sparsity, of=of)
            keep = kept_units(params, structured_mask(params, groups, magnitude_scores(params, groups), method), groups)
            assert len({int(k.sum()) for k in keep.values()}) == 1


@settings(max_examples=10)
@given(st.floats(0, 0.7), st.sampled_from(["group", "global"]), st.integers(1, 4), st.integers(1, 3))
def test_what_stays_is_a_multiple_and_at_least(sparsity, scope, multiple, least):
    method = Structured(sparsity=sparsity, scope=scope, multiple=multiple, least=least)
    scores = random_scores(GROUPS, jax.random.key(0))
    try:
        mask = structured_mask(PARAMS, GROUPS, scores, method)
    except LeafError as error:
        assert "cannot be had" in str(error)
        return
    for kept in kept_units(PARAMS, mask, GROUPS).values():
        assert kept.sum() >= least and (kept.sum() % multiple == 0 or kept.all())


def test_selected_groups_alone_are_cut():
    chosen = GROUPS.select("layer_2/*")
    assert list(chosen.groups) == [SECOND] and chosen.flops() == GROUPS.flops()
    mask = structured_mask(PARAMS, chosen, magnitude_scores(PARAMS, chosen), Structured(sparsity=0.5))
    small = shrink(PARAMS, mask, chosen)
    assert small["layer_0"]["kernel"].shape == (5, 8) and small["layer_2"]["kernel"].shape == (6, 3)
    keep = kept_units(PARAMS, mask, chosen)
    assert chosen.flops(keep) == 2 * 6 * (5 * 8 + 8 * 6 + 6 * 3)
    with pytest.raises(LeafError, match="where='nothing' takes no group"):
        GROUPS.select("nothing")


def test_masks_serve_apply_mask_too():
    mask = structured_mask(PARAMS, GROUPS, magnitude_scores(PARAMS, GROUPS), Structured(sparsity=0.5))
    small = shrink(PARAMS, mask, GROUPS)
    np.testing.assert_allclose(mlp(small, X), mlp(ej.apply_mask(PARAMS, mask), X), atol=1e-5)


def test_shrink_first_then_quantize():
    params = mlp_params((32, 128, 32))
    groups = ej.prune.coupled_groups(mlp, params, normal(1, 2, 32))
    mask = structured_mask(params, groups, magnitude_scores(params, groups), Structured(sparsity=0.5))
    small = shrink(params, mask, groups)
    quantized = ej.quantize_params(small, ej.quantize.RTN(bits=8, group_size=32))
    x = normal(2, 4, 32)
    assert ej.nbytes(quantized) < 0.15 * ej.nbytes(params)
    np.testing.assert_allclose(ej.lift(mlp)(quantized, x), mlp(small, x), atol=0.05)


class Net(nn.Module):
    """A convolution, a block with a residual connection and batch norms, a pool and two dense layers."""

    width: int
    inner: int
    hidden: int

    @nn.compact
    def __call__(self, x):
        norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)  # noqa: E731
        x = nn.relu(nn.Conv(self.width, (3, 3), name="stem")(x))
        y = nn.relu(norm("norm_1")(nn.Conv(self.inner, (3, 3), use_bias=False, name="conv_1")(x)))
        x = nn.relu(x + norm("norm_2")(nn.Conv(self.width, (3, 3), use_bias=False, name="conv_2")(y)))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(nn.gelu(nn.Dense(self.hidden, name="dense")(x)))


def test_a_linen_model_with_its_running_statistics():
    x, net = normal(0, 2, 6, 6, 3), Net(4, 6, 10)
    variables = net.init(jax.random.key(0), x)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda w: w + jnp.asarray(rng.uniform(0.1, 0.5, w.shape), w.dtype), variables)

    def small_apply(variables, x):
        p = variables["params"]
        sizes = p["stem"]["kernel"].shape[-1], p["conv_1"]["kernel"].shape[-1], p["dense"]["kernel"].shape[-1]
        return Net(*sizes).apply(variables, x)

    groups, _, small = assert_shrunk_as_masked(net.apply, variables, x, small_apply=small_apply)
    assert len(groups.groups) == 3
    assert small["batch_stats"]["norm_1"]["mean"].shape == small["params"]["conv_1"]["kernel"].shape[-1:]


def test_a_norm_over_channels_keeps_its_linen_model_whole():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.LayerNorm()(nn.Dense(8)(x)))

    variables = Normed().init(jax.random.key(0), X)
    groups = ej.prune.coupled_groups(Normed().apply, variables, X)
    assert not groups.groups
    with pytest.raises(LeafError, match="there is no group to cut(.|\n)*runs along them"):
        structured_mask(variables, groups, {}, Structured(sparsity=0.5))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sparsity": 1.0}, "sparsity=1.0: a share"),
        ({"of": "bytes"}, "of='bytes': choose"),
        ({"scope": "leaf"}, "scope='leaf': choose"),
        ({"least": 0}, "least=0, multiple=1: at least 1"),
    ],
)
def test_methods_are_checked_when_made(change, message):
    with pytest.raises(ValueError, match=message):
        Structured(**{"sparsity": 0.5} | change)


def test_scores_and_budgets_are_checked():
    scores = magnitude_scores(PARAMS, GROUPS)
    half = Structured(sparsity=0.5)
    with pytest.raises(LeafError, match=r"layer_0/kernel\[1\] has no scores"):
        structured_mask(PARAMS, GROUPS, {SECOND: scores[SECOND]}, half)
    with pytest.raises(LeafError, match=r"scores \[7\] must be 8 finite numbers"):
        structured_mask(PARAMS, GROUPS, dict(scores) | {FIRST: scores[FIRST][:7]}, half)
    with pytest.raises(LeafError, match=r"sparsity=0.97 of the units cannot be had: with 1 units left .* 0.9000"):
        structured_mask(PARAMS, GROUPS, scores, Structured(sparsity=0.97, scope="global"))
    with pytest.raises(LeafError, match=r"layer_0/bias: the groups are of a parameter \[8\], this one is \[9\]"):
        structured_mask(mlp_params((5, 9, 12, 3)), GROUPS, scores, half)


def ones_but(path, index):
    masks = {layer: {name: np.ones(w.shape, bool) for name, w in leaves.items()} for layer, leaves in PARAMS.items()}
    layer, name = path.split("/")
    masks[layer][name][index] = False
    return masks


@pytest.mark.parametrize(
    "mask, message",
    [
        (ones_but("layer_0/kernel", (1, 2)), r"layer_0/kernel \[5, 8\]: the mask drops single weights, not whole chan"),
        (ones_but("layer_0/bias", 2), r"layer_0/kernel \[5, 8\]: unit 2 of layer_0/kernel\[1\] is dropped in part"),
        (ones_but("layer_2/bias", 2), r"layer_2/bias \[3\]: the mask drops entries of axis 0 .*\(they are outputs"),
        (mask_by_hand(PARAMS, GROUPS, {FIRST: range(8)}), r"layer_0/kernel\[1\]: the mask drops all 8 units"),
        ({"layer_0": {"kernel": np.ones((5, 7), bool)}}, r"layer_0/kernel: the mask is \[5, 7\], the weight \[5, 8\]"),
    ],
    ids=["weights", "in part", "output", "all", "shape"],
)
def test_masks_of_anything_but_whole_units_are_refused(mask, message):
    with pytest.raises(LeafError, match=message):
        shrink(PARAMS, mask, GROUPS)


def test_masks_must_be_concrete():
    mask = structured_mask(PARAMS, GROUPS, magnitude_scores(PARAMS, GROUPS), Structured(sparsity=0.5))
    with pytest.raises(LeafError, match="call shrink outside of jit"):
        jax.jit(lambda m: shrink(PARAMS, m, GROUPS))(mask)


def test_other_parameters_are_refused():
    mask = structured_mask(PARAMS, GROUPS, magnitude_scores(PARAMS, GROUPS), Structured(sparsity=0.5))
    other = dict(PARAMS) | {"layer_2": {"kernel": normal(0, 13, 3), "bias": normal(1, 3)}}
    with pytest.raises(LeafError, match=r"layer_2/kernel"):
        shrink(other, {"layer_0": mask["layer_0"], "layer_1": mask["layer_1"]}, GROUPS)
