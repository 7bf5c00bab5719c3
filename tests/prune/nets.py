"""Small networks for structured pruning, and the oracle: set units to zero by hand, compare with the smaller model."""

import jax
import jax.numpy as jnp
import numpy as np

import effjax as ej


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]) or 1), jnp.float32)


def mask_by_hand(params, groups, gone):
    """Masks that drop the units `gone[name]` with loops over members; the other way round than the library."""
    masks = {path: np.ones(shape, bool) for path, shape in groups.shapes.items()}
    for name, units in gone.items():
        for (path, axis), entries in groups.groups[name].members.items():
            for unit in units:
                for entry in entries[unit]:
                    masks[path][(slice(None),) * axis + (int(entry),)] = False
    flat, tree = jax.tree_util.tree_flatten_with_path(params)
    return tree.unflatten([jnp.asarray(masks[ej.paths.path_str(path)]) for path, _ in flat])


def some_units(groups, seed=0, share=0.4):
    rng = np.random.default_rng(seed)
    return {
        g.name: rng.choice(g.units, size=max(1, min(g.units - 1, round(share * g.units))), replace=False)
        for g in groups
    }


def assert_shrunk_as_masked(apply, params, *inputs, small_apply=None, seed=0, tolerance=1e-5):
    """The function of parameters with zeros, and of smaller parameters; also back to the groups found."""
    groups = ej.prune.coupled_groups(apply, params, *inputs)
    assert groups.groups, groups
    mask = mask_by_hand(params, groups, some_units(groups, seed))
    masked = jax.tree.map(lambda w, m: w * m, params, mask)
    small = ej.prune.shrink(params, mask, groups)
    assert sum(x.size for x in jax.tree.leaves(small)) < sum(x.size for x in jax.tree.leaves(params))
    assert jax.tree.structure(small) == jax.tree.structure(params)
    assert [x.dtype for x in jax.tree.leaves(small)] == [x.dtype for x in jax.tree.leaves(params)]
    expected, found = apply(masked, *inputs), (small_apply or apply)(small, *inputs)
    assert not np.allclose(expected, apply(params, *inputs), atol=1e-3)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    return groups, mask, small


def mlp_params(sizes, seed=0):
    return {
        f"layer_{i}": {"kernel": normal(2 * i + seed, a, b), "bias": normal(2 * i + seed + 1, b)}
        for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
    }


def mlp(params, x):
    for i, layer in enumerate(params.values()):
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.sigmoid(x) if i + 1 < len(params) else x  # not 0 at 0
    return x


def conv(x, kernel, stride=1, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def batch_norm(p, x):
    return (x - p["mean"]) * jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"] + p["bias"]


def norm_params(seed, n):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.uniform(0.5, 1.5, n), jnp.float32) for name in ("mean", "var", "scale", "bias")}
