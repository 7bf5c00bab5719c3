"""Groups found in jaxprs: what is cut together in hand-made networks, what is pinned, and why."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import effjax as ej
from effjax.errors import LeafError
from effjax.prune import coupled_groups
from tests.prune.nets import assert_shrunk_as_masked, batch_norm, conv, mlp, mlp_params, norm_params, normal


def members(groups):
    return {frozenset(group.members) for group in groups}


def widths(group):
    return {axis: entries.shape[1] for axis, entries in group.members.items()}


def test_mlp():
    params, x = mlp_params((5, 8, 7, 3)), normal(9, 4, 5)
    groups, _, small = assert_shrunk_as_masked(mlp, params, x)
    assert members(groups) == {
        frozenset({("layer_0/kernel", 1), ("layer_0/bias", 0), ("layer_1/kernel", 0)}),
        frozenset({("layer_1/kernel", 1), ("layer_1/bias", 0), ("layer_2/kernel", 0)}),
    }
    assert small["layer_0"]["kernel"].shape == (5, 5)
    assert "layer_2/kernel[1]" in str(groups) and "outputs of the function" in str(groups)


def test_parameters_may_be_shapes():
    params, x = mlp_params((5, 8, 3)), normal(9, 4, 5)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    assert str(coupled_groups(mlp, shapes, x)) == str(coupled_groups(mlp, params, x))


def test_flops_and_weights_are_those_of_the_smaller_model():
    params, x = mlp_params((5, 8, 7, 3)), normal(9, 4, 5)
    groups, mask, small = assert_shrunk_as_masked(mlp, params, x)
    keep = ej.prune.kept_units(params, mask, groups)
    again = coupled_groups(mlp, small, x)
    assert groups.flops() == 2 * 4 * (5 * 8 + 8 * 7 + 7 * 3)
    assert groups.flops(keep) == again.flops()
    assert groups.weights(keep) == again.weights() == sum(w.size for w in jax.tree.leaves(small))


def residual_net(params, x):
    """A stem, two blocks with batch norms on one residual stream, a pool and a head."""
    x = conv(x, params["stem"])
    for name in ("a", "b"):
        p = params[name]
        y = jax.nn.relu(batch_norm(p["norm_1"], conv(x, p["conv_1"])))
        x = jax.nn.relu(x + batch_norm(p["norm_2"], conv(y, p["conv_2"])))
    return x.mean((1, 2)) @ params["head"]


def residual_params(width=6, inner=8):
    block = {
        "conv_1": normal(1, 3, 3, width, inner),
        "norm_1": norm_params(2, inner),
        "conv_2": normal(3, 3, 3, inner, width),
        "norm_2": norm_params(4, width),
    }
    other = jax.tree.map(lambda w: w[..., ::-1], block)
    return {"stem": normal(0, 3, 3, 3, width), "a": block, "b": other, "head": normal(5, width, 4)}


def test_a_residual_stream_is_one_group_through_all_blocks():
    groups, _, _ = assert_shrunk_as_masked(residual_net, residual_params(), normal(8, 2, 8, 8, 3))
    stream = next(g for g in groups if ("stem", 3) in g.members)
    assert {("a/conv_1", 2), ("a/conv_2", 3), ("b/conv_1", 2), ("b/norm_2/mean", 0), ("head", 0)} <= set(stream.members)
    inner = next(g for g in groups if ("a/conv_1", 3) in g.members)
    norms = {("a/norm_1/" + name, 0) for name in ("mean", "var", "scale", "bias")}
    assert set(inner.members) == {("a/conv_1", 3), ("a/conv_2", 2)} | norms
    assert len(groups.groups) == 3


def test_padded_shortcuts_pin_the_padding_alone():
    """Option A of He et al. 2016: the stream is padded with channels of zeros on either side."""

    def net(params, x):
        x = conv(x, params["stem"])
        y = conv(jax.nn.relu(conv(x, params["conv_1"], 2)), params["conv_2"])
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2))) + y
        return x.mean((1, 2)) @ params["head"]

    params = {
        "stem": normal(0, 3, 3, 3, 4),
        "conv_1": normal(1, 3, 3, 4, 8),
        "conv_2": normal(2, 3, 3, 8, 8),
        "head": normal(3, 8, 4),
    }
    groups, _, _ = assert_shrunk_as_masked(net, params, normal(4, 2, 8, 8, 3))
    stream = next(g for g in groups if ("stem", 3) in g.members)
    assert stream.units == 4
    assert stream.members["conv_2", 3].ravel().tolist() == [2, 3, 4, 5]
    assert ("conv_2", 3) in groups.pinned


def test_flattening_repeats_a_channel_at_every_place():
    def net(params, x):
        x = jax.nn.relu(conv(x, params["conv"], 2))
        return x.reshape(x.shape[0], -1) @ params["head"]

    params = {"conv": normal(0, 3, 3, 3, 4), "head": normal(1, 64, 5)}
    groups, _, _ = assert_shrunk_as_masked(net, params, normal(2, 2, 8, 8, 3))
    (group,) = groups
    assert widths(group) == {("conv", 3): 1, ("head", 0): 16}


def test_depthwise_convolutions_follow_their_channels():
    def net(params, x):
        x = jax.nn.relu(conv(x, params["in"]))
        x = jax.nn.relu(conv(x, params["depthwise"], groups=x.shape[-1]))
        return conv(x, params["out"]).mean((1, 2))

    params = {"in": normal(0, 1, 1, 3, 6), "depthwise": normal(1, 3, 3, 1, 12), "out": normal(2, 1, 1, 12, 4)}
    groups, _, _ = assert_shrunk_as_masked(net, params, normal(3, 2, 5, 5, 3))
    (group,) = groups
    assert widths(group) == {("in", 3): 1, ("depthwise", 3): 2, ("out", 2): 2}


def test_a_fused_gate_is_cut_in_both_halves():
    def net(params, x):
        gate, up = jnp.split(x @ params["gate_up"], 2, axis=-1)
        return (jax.nn.silu(gate) * up) @ params["down"]

    params = {"gate_up": normal(0, 5, 16), "down": normal(1, 8, 3)}
    groups, _, _ = assert_shrunk_as_masked(net, params, normal(2, 4, 5))
    (group,) = groups
    assert group.members["gate_up", 1].tolist() == [[i, i + 8] for i in range(8)]


def test_uneven_pieces_stay():
    def net(params, x):
        y = jax.nn.relu(x @ params["in"])
        return y[:, :3] @ params["a"] + y[:, 3:] @ params["b"]

    params = {"in": normal(0, 5, 8), "a": normal(1, 3, 2), "b": normal(2, 5, 2)}
    groups = coupled_groups(net, params, normal(3, 4, 5))
    assert not groups.groups
    assert "takes a piece at a fixed place" in groups.pinned["a", 0]


def test_concatenated_parts_are_cut_each_on_its_own():
    def net(params, x):
        y = jnp.concatenate([jax.nn.relu(x @ params["a"]), x, x @ params["b"]], axis=-1)
        return y @ params["out"]

    params = {"a": normal(0, 5, 6), "b": normal(1, 5, 4), "out": normal(2, 15, 3)}
    groups, _, _ = assert_shrunk_as_masked(net, params, normal(3, 4, 5))
    assert members(groups) == {frozenset({("a", 1), ("out", 0)}), frozenset({("b", 1), ("out", 0)})}
    assert [g.members["out", 0].ravel().tolist() for g in groups] == [[0, 1, 2, 3, 4, 5], [11, 12, 13, 14]]


def attention(heads, kv_heads, head_dim, fused=False):
    def net(params, x):
        b, t, _ = x.shape
        if fused:
            q, k, v = jnp.moveaxis((x @ params["qkv"]).reshape(b, t, 3, -1, head_dim), 2, 0)
        else:
            q = (x @ params["q"]).reshape(b, t, -1, head_dim)
            k, v = ((x @ params[name]).reshape(b, t, -1, head_dim) for name in "kv")
            k, v = (jnp.repeat(y, heads // kv_heads, axis=2) for y in (k, v))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) * head_dim**-0.5, axis=-1)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return y.reshape(b, t, -1) @ params["o"]

    return net


def attention_params(heads, kv_heads, head_dim, width=6):
    return {
        "q": normal(0, width, heads * head_dim) * 3,
        "k": normal(1, width, kv_heads * head_dim) * 3,
        "v": normal(2, width, kv_heads * head_dim),
        "o": normal(3, heads * head_dim, width),
    }


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 3), (8, 2)])
def test_heads_go_whole_and_with_the_queries_that_share_them(heads, kv_heads):
    net = attention(heads, kv_heads, 4)
    groups, _, small = assert_shrunk_as_masked(net, attention_params(heads, kv_heads, 4), normal(4, 2, 5, 6))
    (group,) = groups
    share = heads // kv_heads
    assert group.units == kv_heads
    assert widths(group) == {("q", 1): 4 * share, ("k", 1): 4, ("v", 1): 4, ("o", 0): 4 * share}
    assert group.members["q", 1][1].tolist() == list(range(4 * share, 8 * share))
    assert small["q"].shape[1] == share * small["k"].shape[1]


def test_fused_queries_keys_and_values():
    params = {"qkv": normal(0, 6, 3 * 4 * 2) * 2, "o": normal(1, 8, 6)}
    groups, _, _ = assert_shrunk_as_masked(attention(4, 4, 2, fused=True), params, normal(2, 2, 5, 6))
    (group,) = groups
    assert group.members["qkv", 1][1].tolist() == [2, 3, 10, 11, 18, 19]


def test_layers_under_scan_are_cut_alike():
    def net(params, x):
        def layer(x, p):
            return x + jax.nn.relu(x @ p["up"]) @ p["down"], None

        return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]

    params = {"layers": {"up": normal(0, 3, 4, 8), "down": normal(1, 3, 8, 4)}, "head": normal(2, 4, 2)}
    groups = coupled_groups(net, params, normal(3, 5, 4))
    assert members(groups) == {frozenset({("layers/up", 2), ("layers/down", 1)})}
    assert_shrunk_as_masked(net, params, normal(3, 5, 4))
    assert groups.flops() == 2 * 5 * (3 * 2 * 4 * 8 + 4 * 2)


def test_carried_stream_from_a_parameter_is_followed_around_the_loop():
    def net(params, x):
        def body(i, h):
            return jax.nn.relu(h + x @ params["in"])

        h = jax.lax.fori_loop(0, 3, body, jnp.zeros((x.shape[0], params["in"].shape[1])))
        return jax.lax.cond(x.sum() > 0, lambda h: h, lambda h: 2 * h, h) @ params["out"]

    assert_shrunk_as_masked(net, {"in": normal(0, 4, 6), "out": normal(1, 6, 2)}, normal(2, 5, 4))


def test_stacked_flipped_and_sliced_activations_keep_their_channels():
    def net(params, x):
        y = jnp.stack([x @ params["a"], jnp.tanh(x @ params["b"])])
        y = jax.lax.dynamic_slice_in_dim(y, x.shape[0] // 4, 2, axis=1)
        a, b = y[::-1]
        return jax.nn.relu(a * b)[..., ::-1] @ params["out"]

    groups, _, _ = assert_shrunk_as_masked(
        net, {"a": normal(0, 5, 6), "b": normal(1, 5, 6), "out": normal(2, 6, 3)}, normal(3, 4, 5)
    )
    (group,) = groups
    assert group.members["a", 1].ravel().tolist() == group.members["out", 0].ravel().tolist()[::-1]


def test_pooling_and_look_ups_keep_channels():
    def net(params, tokens):
        x = params["table"][tokens]
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 1), (1, 2, 1), "VALID")
        return x.sum(1) @ params["out"]

    groups, _, _ = assert_shrunk_as_masked(
        net, {"table": normal(0, 9, 6), "out": normal(1, 6, 3)}, jnp.arange(8).reshape(2, 4)
    )
    assert members(groups) == {frozenset({("table", 1), ("out", 0)})}


def test_low_rank_factors_lose_ranks():
    def net(params, x):
        return x @ (params["a"] @ params["b"])

    groups, _, _ = assert_shrunk_as_masked(net, {"a": normal(0, 5, 4), "b": normal(1, 4, 3)}, normal(2, 2, 5))
    assert members(groups) == {frozenset({("a", 1), ("b", 0)})}


WHOLE_AXIS = {
    "layer norm": lambda y: (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5),
    "softmax": lambda y: jax.nn.softmax(y, axis=-1),
    "cumsum": lambda y: jnp.cumsum(y, axis=-1),
    "sort": lambda y: jnp.sort(y, axis=-1),
    "constant": lambda y: y * np.arange(8, dtype=np.float32),
    "every other": lambda y: jnp.repeat(y[:, ::2], 2, axis=-1),
    "gram": lambda y: (y @ y.T) @ y,
    "fft": lambda y: jnp.fft.fft(y).real,
}


@pytest.mark.parametrize(
    "name, why",
    [
        ("layer norm", "reduce_sum .* runs along them"),
        ("softmax", "reduce_max .* runs along them"),
        ("cumsum", "cumsum.* runs along them"),
        ("sort", "sort.* has no rule"),
        ("constant", "mul .* meets an axis of fixed size"),
        ("every other", "takes every 2th entry"),
        ("gram", "multiplies activations along them"),
        ("fft", "fft.* has no rule"),
    ],
)
def test_what_depends_on_all_channels_is_pinned_with_its_reason(name, why):
    def net(params, x):
        return WHOLE_AXIS[name](x @ params["in"]) @ params["out"]

    groups = coupled_groups(net, {"in": normal(0, 4, 8), "out": normal(1, 8, 2)}, normal(2, 6, 4))
    assert not groups.groups
    assert re.search(why, groups.pinned["in", 1]), groups.pinned["in", 1]
    assert ("out", 0) in groups.pinned


@pytest.mark.parametrize("made", ["softplus", "outer", "plus one"])
def test_weights_that_are_not_zero_when_masked_are_pinned(made):
    weights = {
        "softplus": lambda p: jax.nn.softplus(p["out"]),
        "outer": lambda p: jax.nn.softplus(p["scale"])[:, None] * p["row"][None, :],
        "plus one": lambda p: p["out"] + 1,
    }

    def net(params, x):
        return jax.nn.sigmoid(x @ params["in"]) @ weights[made](params)

    params = {"in": normal(0, 4, 8), "out": normal(1, 8, 2), "scale": normal(2, 8), "row": normal(3, 2)}
    groups = coupled_groups(net, params, normal(4, 6, 4))
    assert "masked weights do not make 0" in groups.pinned["in", 1]


def test_unused_parameters_are_no_group():
    groups = coupled_groups(lambda p, x: x @ p["a"], {"a": normal(0, 4, 2), "b": normal(1, 5, 6)}, normal(2, 3, 4))
    assert not groups.groups and groups.pinned["b", 0] == "nothing goes with them"


def test_compressed_parameters_are_refused():
    params = ej.quantize_params(mlp_params((32, 64, 32)), ej.quantize.RTN(bits=4, group_size=32))
    with pytest.raises(LeafError, match="layer_0/kernel is compressed already .* shrink first"):
        coupled_groups(mlp, params, normal(0, 2, 32))


@settings(max_examples=10)
@given(st.data())
def test_any_small_network(data):
    """Random chains of products, gates, residual sums, concatenations and blocks of features."""
    draw, params, x = data.draw, {}, normal(0, 3, 4)
    steps = draw(st.lists(st.sampled_from(["dense", "residual", "gate", "concat", "blocks"]), min_size=1, max_size=4))
    width = 4

    def add(name, *shape):
        params[name] = normal(len(params) + 10, *shape)

    add("in", 4, width)
    for i, step in enumerate(steps):
        if step in ("dense", "residual", "gate"):
            inner = draw(st.integers(2, 6))
            add(f"{i}/up", width, inner)
            if step == "gate":
                add(f"{i}/gate", width, inner)
            out = width if step == "residual" else draw(st.integers(2, 6))
            add(f"{i}/down", inner, out)
            width = out
        elif step == "concat":
            add(f"{i}/more", width, 3)
            width += 3
        else:
            add(f"{i}/blocks", width, 6)
            add(f"{i}/mix", 2, 2)
            width = 6
    add("out", width, 3)

    def net(params, x):
        x = x @ params["in"]
        for i, step in enumerate(steps):
            if step in ("dense", "residual", "gate"):
                y = jnp.tanh(x @ params[f"{i}/up"])
                y = y * (x @ params[f"{i}/gate"]) if step == "gate" else y
                y = y @ params[f"{i}/down"]
                x = x + y if step == "residual" else jax.nn.sigmoid(y)
            elif step == "concat":
                x = jnp.concatenate([x, x @ params[f"{i}/more"]], axis=-1)
            else:
                x = (x @ params[f"{i}/blocks"]).reshape(x.shape[0], -1, 2) @ params[f"{i}/mix"]
                x = x.reshape(x.shape[0], -1)
        return x @ params["out"]

    groups = coupled_groups(net, params, x)
    assert groups.groups
    mask_seed = draw(st.integers(0, 99))
    assert_shrunk_as_masked(net, params, x, seed=mask_seed, tolerance=2e-5)
