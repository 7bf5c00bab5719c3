"""AWQ against the released search in plain float64 numpy; folding its factors into the model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import effjax as ej
from effjax.arrays import Codebook, Permuted, Quantized, RowScaled
from effjax.errors import CalibrationError, LeafError, RuleError
from effjax.io.formats.exactness import exactness
from effjax.lift.calibrate import InputStats
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.models.folds import decoder_folds
from effjax.quantize import AWQ, NVFP4, RTN, fold_scales


def pseudo_quantize(w, bits, group_size):
    """AutoAWQ's, group by group, with zero in the range; scales are stored in float16."""
    n, out = w.shape
    size = n if group_size is None else group_size
    result = np.zeros_like(w)
    for start in range(0, n, size):
        group = w[start : start + size]
        low, high = np.minimum(group.min(0), 0), np.maximum(group.max(0), 0)
        scale = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float64)
        scale[scale == 0] = 1
        zero = np.round(-low / scale).clip(0, 2**bits - 1)
        result[start : start + size] = (np.round(group / scale + zero).clip(0, 2**bits - 1) - zero) * scale
    return result


def oracle(weights, x, bits, group_size, *, scale=True, clip=True, duo=True):
    """Factors and dequantised weights; errors are of outputs on the inputs themselves, not through second moments."""
    w, x = np.concatenate(weights, 1).astype(np.float64), np.asarray(x, np.float64)
    n = len(w)
    size = n if group_size is None else group_size
    best, factors = np.inf, np.ones(n)
    if scale:
        largest = np.abs(w).reshape(n // size, size, -1).max(1).repeat(size, 0)
        w_mean = np.mean(np.abs(w) / np.where(largest > 0, largest, 1), 1)
        x_mean = np.abs(x).mean(0)
        for step in range(20):
            ratio = step / 20
            s = (x_mean**ratio / (w_mean ** (1 - ratio) + 1e-4 if duo else 1)).clip(1e-4)
            s = s / np.sqrt(s.max() * s.min())
            loss = np.square(x @ (pseudo_quantize(w * s[:, None], bits, group_size) / s[:, None] - w)).sum()
            if loss < best:
                best, factors = loss, s
    scaled, inputs = w * factors[:, None], x / factors
    if clip:
        for start in range(0, n, size):
            rows = slice(start, start + size)
            group, largest = scaled[rows].copy(), np.abs(scaled[rows]).max(0)
            least, limit = np.full(w.shape[1], np.inf), largest.copy()
            for step in range(10):
                threshold = largest * (1 - step / 20)
                error = pseudo_quantize(group.clip(-threshold, threshold), bits, None) - group
                loss = np.square(inputs[:, rows] @ error).sum(0)
                limit, least = np.where(loss < least, threshold, limit), np.minimum(loss, least)
            scaled[rows] = group.clip(-limit, limit)
    dense = pseudo_quantize(scaled, bits, group_size) / factors[:, None]
    return factors, np.split(dense, np.cumsum([v.shape[1] for v in weights])[:-1], 1)


def layer(n, outs, seed, rows=512):
    """Weights, and inputs of which some channels are far larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, n)) * np.exp(rng.standard_normal(n))
    x[:, : n // 8] *= 10
    weights = [(rng.standard_normal((n, out)) / np.sqrt(n)).astype(np.float32) for out in outs]
    return weights, (x + 0.3 * x.mean(1, keepdims=True)).astype(np.float32)


def stats_of(x):
    x = jnp.asarray(x)
    return InputStats(count=jnp.float32(len(x)), outer_sum=x.T @ x, abs_sum=jnp.abs(x).sum(0))


@jax.jit
def dense_of(arrays):
    return [a.materialize() for a in arrays]


def compressed(method, weights, x):
    stats = stats_of(x)
    return jax.jit(lambda ws: method.compress_jointly(ws, stats=[stats] * len(ws), keys=[None] * len(ws)))(weights)


CASES = [
    ((64, (24,), 32), {"bits": 4}),
    ((64, (24,), 32), {"bits": 3, "clip": False}),
    ((64, (24, 8, 8), 16), {"bits": 4}),
    ((48, (12,), None), {"bits": 4, "duo_scaling": False}),
    ((60, (7, 5), 20), {"bits": 3}),
    ((64, (24,), 32), {"bits": 2, "scale": False}),
]


@pytest.mark.parametrize(("shape", "options"), CASES, ids=[f"{s} {o}" for s, o in CASES])
def test_oracle(shape, options):
    """The same factors, and an output error within 1 % of the oracle's, for all weights of one input together."""
    n, outs, group_size = shape
    weights, x = layer(n, outs, 1)
    got = compressed(AWQ(group_size=group_size, **options), weights, x)
    search = {{"duo_scaling": "duo"}.get(name, name): value for name, value in options.items() if name != "bits"}
    factors, want = oracle(weights, x, options["bits"], group_size, **search)
    for array in got:
        assert isinstance(array, RowScaled) == options.get("scale", True)
        if isinstance(array, RowScaled):
            np.testing.assert_allclose(array.row_scales, 1 / factors, rtol=1e-4)

    def error(dense):
        return sum(np.square(x @ (np.asarray(d) - w)).sum() for d, w in zip(dense, weights, strict=True))

    ours, theirs = error(dense_of(got)), error(want)
    assert abs(ours / theirs - 1) < 0.01
    rtn = error([pseudo_quantize(w.astype(np.float64), options["bits"], group_size) for w in weights])
    assert ours < 0.9 * rtn  # the searches must pay on such inputs


def test_edges():
    """Inputs that were never active, columns of zeros and constant ones: finite, and zeros stay zero."""
    (w,), x = layer(32, (6,), 0)
    w[:, 0], w[:, 1], x[:, 5] = 0, -0.75, 0
    w[9] = 0
    for method in (AWQ(group_size=16), AWQ(bits=2, group_size=None, duo_scaling=False)):
        (array,) = compressed(method, [w], x)
        dense = np.asarray(array.materialize())
        assert np.isfinite(dense).all() and np.isfinite(np.asarray(array.row_scales)).all()
        np.testing.assert_array_equal(dense[:, 0], 0)
        assert np.square(x @ (dense - w)).sum() < (0.1 if method.bits > 2 else 1) * np.square(x @ w).sum()
    dead = compressed(AWQ(group_size=16), [w], np.zeros_like(x))[0]
    assert np.isfinite(np.asarray(dead.materialize())).all()


def test_one_column_and_one_input():
    (w,), x = layer(8, (1,), 0)
    assert compressed(AWQ(group_size=None), [w], x)[0].shape == (8, 1)
    (w,), x = layer(16, (3,), 0)
    assert compressed(AWQ(group_size=1), [w], x)[0].array.group_size == 1


def test_weights_of_one_input_share_factors():
    """In a tree: those that `calibrate` saw with the same input; others have their own."""
    q = quantized_model("float32", model_type="qwen2")[1]["layers_0"]
    factors = {name: np.asarray(q["attention"][f"{name}_proj"]["kernel"].row_scales) for name in "qkvo"}
    np.testing.assert_array_equal(factors["q"], factors["k"])
    np.testing.assert_array_equal(factors["q"], factors["v"])
    assert not np.array_equal(factors["q"], factors["o"])
    up, gate, down = (q["mlp"][f"{name}_proj"]["kernel"].row_scales for name in ("up", "gate", "down"))
    np.testing.assert_array_equal(up, gate)
    assert up.shape != down.shape


@functools.cache
def tiny(kv_heads=4, scan_layers=False, model_type="llama"):
    """A decoder whose norms have gains of different sizes, so that inputs have too."""
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        model_type=model_type,
        scan_layers=scan_layers,
    )
    model = Decoder(config)
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, 64)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    def spread(path, x):
        noise = jax.random.normal(jax.random.key(len(path)), x.shape)
        return x * jnp.exp(noise) if path.endswith("scale") else x + 0.3 * noise if path.endswith("bias") else x

    return model, ej.paths.map_with_paths(spread, params), tokens


@functools.cache
def quantized_model(scale_dtype, **options):
    model, params, tokens = tiny(**options)
    method = AWQ(group_size=8, scale_dtype=scale_dtype)
    rules = [("*_proj/kernel", method)]
    if model.config.num_key_value_heads != 4:
        rules = [("*/o_proj/kernel", dataclasses.replace(method, scale=False)), *rules]
    stats = ej.calibrate(model.apply, {"params": params}, [tokens], needs={"second_moment", "abs_mean"})["params"]
    return model, ej.quantize_params(params, rules, stats=stats), tokens


@pytest.mark.parametrize(
    "options",
    [{"model_type": "qwen2"}, {"scan_layers": True, "kv_heads": 2}],
    ids=["with biases", "scanned and grouped"],
)
def test_folding_keeps_the_function(options):
    """Logits before and after agree to 1e-5 of the largest, and every weight is plain afterwards."""
    model, q, tokens = quantized_model("float32", **options)
    folded = fold_scales(q, decoder_folds(model.config))
    kinds = {path: type(leaf) for path, leaf in ej.paths.leaves_with_paths(folded) if path.endswith("_proj/kernel")}
    assert set(kinds.values()) == {Quantized} and len(kinds) == (7 if options.get("scan_layers") else 14)
    apply = jax.jit(ej.lift(model.apply))
    before, after = (np.asarray(apply({"params": tree}, tokens)) for tree in (q, folded))
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()
    assert folded["final_norm"]["scale"] is q["final_norm"]["scale"]


def test_folding_into_float16_scales_rounds_them_once():
    model, q, _ = quantized_model("float32", model_type="qwen2")

    def half(leaf):
        array = leaf.array
        return leaf.replace(array=array.replace(scales=array.scales.astype(jnp.float16)))

    q = jax.tree.map(lambda x: half(x) if isinstance(x, RowScaled) else x, q, is_leaf=ej.arrays.is_compressed)
    folded = fold_scales(q, decoder_folds(model.config))
    up, before = folded["layers_0"]["mlp"]["up_proj"]["kernel"], q["layers_0"]["mlp"]["up_proj"]["kernel"]
    factors = q["layers_0"]["mlp"]["down_proj"]["kernel"].row_scales
    assert up.scales.dtype == jnp.float16
    assert exactness(up, "awq").exact and not exactness(before, "awq").exact  # what folding is for
    np.testing.assert_array_equal(up.codes, before.array.codes)
    np.testing.assert_allclose(up.scales, before.array.scales * factors, rtol=2**-11)


def test_folding_under_jit_gives_the_same_values():
    model, q, _ = quantized_model("float32", model_type="qwen2")
    folds = decoder_folds(model.config)
    eager, jitted = fold_scales(q, folds), jax.jit(lambda tree: fold_scales(tree, folds))(q)
    assert jax.tree.structure(eager) == jax.tree.structure(jitted)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-6)


def scaled(w, factors):
    return RowScaled(array=RTN(bits=4, group_size=None).quantize(w), row_scales=factors)


PRODUCERS = {
    "dense": lambda w: w,
    "quantized": RTN(bits=8, group_size=4, scale_dtype="float32").quantize,
    "table a column": lambda w: Codebook.from_codes(
        (w > 0).astype(jnp.uint8), jnp.abs(w).mean(0)[None, :, None] * jnp.array([-1.0, 1.0]), dtype=w.dtype
    ),
    "scaled": lambda w: scaled(w, jnp.arange(1.0, 9.0)),
    "permuted": lambda w: Permuted(
        array=RTN(bits=8, group_size=4, scale_dtype="float32").quantize(w), order=jnp.arange(8)[::-1]
    ),
}


@pytest.mark.parametrize("producer", PRODUCERS)
def test_producers(producer):
    """Whatever holds the kernel before: `x @ W1 @ W2` stays."""
    w1, w2, x = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(3))
    factors = jnp.exp(jax.random.normal(jax.random.key(3), (8,)))
    params = {
        "up": {"kernel": PRODUCERS[producer](w1), "bias": jnp.arange(8.0)},
        "down": {"kernel": scaled(w2, factors)},
    }
    folded = fold_scales(params, [("up/kernel", ["down/kernel"])])
    assert type(folded["down"]["kernel"]) is Quantized
    before, after = (
        (x @ jnp.asarray(p["up"]["kernel"]) + p["up"]["bias"]) @ p["down"]["kernel"]
        for p in (jax.tree.map(jnp.asarray, ej.materialize(tree)) for tree in (params, folded))
    )
    share = 1e-3 if producer == "scaled" else 1e-5  # float16 scales
    np.testing.assert_allclose(after, before, atol=share * float(jnp.abs(before).max()))


def test_attention_kernels_with_head_axes():
    """Consumers seen as `[model, heads, head_dim]`, as Flax' own attention has them."""
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8)) * jnp.arange(1.0, 9.0)
    params = module.init(jax.random.key(1), x)["params"]
    method = AWQ(group_size=4, scale_dtype="float32")
    stats = ej.calibrate(module.apply, {"params": params}, [x], needs=method.needs)["params"]
    names = ("query", "key", "value")
    q = ej.quantize_params(
        {"norm": jnp.ones(8), **params},
        method,
        where=lambda p, _: p.split("/")[0] in names and "kernel" in p,
        stats=stats,
    )
    folded = fold_scales(q, [("norm", [f"{name}/kernel" for name in names])])
    for name in names:
        np.testing.assert_allclose(
            folded[name]["kernel"].materialize() * folded["norm"][:, None, None],
            q[name]["kernel"].materialize(),
            rtol=1e-5,
        )


def fails(error, text, params, folds):
    with pytest.raises(error) as found:
        fold_scales(params, folds)
    assert str(found.value) == text


def test_folds_that_do_not_fit():
    w, ones = jax.random.normal(jax.random.key(0), (8, 8)), jnp.ones(8)
    params = {"norm": {"scale": ones}, "a": {"kernel": scaled(w, 2 * ones)}, "b": {"kernel": scaled(w, ones)}}
    plain = {**params, "b": {"kernel": w}}
    assert fold_scales({"norm": ones, "b": w}, [("norm", ["b"])])["norm"] is ones  # no factors: nothing to do
    fails(
        RuleError,
        "'norm/scale' is given no consumers: name the weights that take its outputs",
        params,
        [("norm/scale", [])],
    )
    fails(
        RuleError,
        "'nrom/scale' matches none of the 3 leaves (a/kernel, b/kernel, norm/scale): write it as a path, or "
        "with one '*'",
        params,
        [("nrom/scale", ["a/kernel"])],
    )
    fails(
        RuleError,
        "'norm/scale' is said to feed 'c/kernel', which does not exist",
        params,
        [("norm/scale", ["c/kernel"])],
    )
    fails(
        LeafError,
        "b/kernel has no factors of its inputs, but others that norm/scale feeds have: compress all of them with one "
        "AWQ method, so that they share factors",
        plain,
        [("norm/scale", ["a/kernel", "b/kernel"])],
    )
    fails(
        LeafError,
        "b/kernel and a/kernel have different factors of the same inputs: compress them in one call, with one AWQ "
        "method and statistics that were gathered together",
        params,
        [("norm/scale", ["a/kernel", "b/kernel"])],
    )
    fails(
        LeafError,
        "norm/scale [4] does not make the inputs of a/kernel, whose factors are [8]: leave this pair out and compress "
        "the consumer with AWQ(scale=False)",
        {**params, "norm": {"scale": jnp.ones(4)}},
        [("norm/scale", ["a/kernel"])],
    )
    with pytest.raises(
        LeafError, match=r"^up \(Codebook.*\) has no scales of its outputs that the factors of a/kernel"
    ):
        fold_scales({"up": NVFP4(block_size=8).quantize(w), **params}, [("up", ["a/kernel"])])


def test_wrong_options():
    for options, text in [
        ({"bits": 9}, "bits=9: choose 1 to 8"),
        ({"group_size": 0}, "group_size=0: a positive number, or None for one group a column"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8' is no floating dtype"),
        ({"scale": False, "clip": False}, "scale=False, clip=False: without both searches this is RTN; use that"),
    ]:
        with pytest.raises(ValueError) as found:
            AWQ(**options)
        assert str(found.value) == text
    with pytest.raises(LeafError, match=r"^kernel \[40, 8\]: group_size=32 does not divide its 40 inputs"):
        ej.quantize_params(
            {"kernel": jnp.ones((40, 8))}, AWQ(group_size=32), stats={"kernel": stats_of(np.ones((4, 40)))}
        )


def test_statistics_that_are_missing():
    params = {"kernel": jnp.ones((8, 4))}
    with pytest.raises(CalibrationError, match=r"^kernel: AWQ needs \['abs_mean', 'second_moment'\] of its inputs"):
        ej.quantize_params(params, AWQ(group_size=8))
    partial = {"kernel": InputStats(count=jnp.float32(4), outer_sum=jnp.eye(8))}
    with pytest.raises(CalibrationError, match="these statistics lack 'abs_mean': calibrate with needs={'abs_mean'}"):
        ej.quantize_params(params, AWQ(group_size=8), stats=partial)
    clipped = ej.quantize_params(params, AWQ(group_size=8, scale=False), stats=partial)["kernel"]
    np.testing.assert_allclose(clipped.materialize(), 1, rtol=1e-3)
