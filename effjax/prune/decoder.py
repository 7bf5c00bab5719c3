"""Decoders made smaller so that they still are files of their family: channels, heads, and whole layers."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from effjax.arrays.base import PyTree
from effjax.errors import ConfigError, LeafError
from effjax.models.config import DecoderConfig
from effjax.models.decoder import DecoderApply, stack_layers, unstack_layers
from effjax.paths import leaves_with_paths
from effjax.prune.api import masks_by_path
from effjax.prune.groups import CoupledGroups, Group, coupled_groups
from effjax.prune.shrink import shrink


def decoder_groups(config: DecoderConfig, params: PyTree) -> CoupledGroups:
    """What may be cut from a decoder: channels of the feed-forward layers, and key heads with all their queries.

    With stacked layers (`config.scan_layers`) a unit is the same place in all of them; unstack them to choose layer by
    layer.

    Example:
        >>> from effjax.models.embedded import load_default
        >>> model = load_default()
        >>> groups = decoder_groups(model.config, model.params)
        >>> [(group.name, group.units) for group in groups][:2]
        [('layers_0/attention/k_proj/kernel[1]', 2), ('layers_0/mlp/down_proj/kernel[0]', 640)]
    """
    run = DecoderApply(config)
    tokens = jax.ShapeDtypeStruct((2, min(8, config.max_position_embeddings)), jnp.int32)
    return coupled_groups(lambda p, t: run({"params": p}, t), params, tokens)


def query_head_groups(config: DecoderConfig, params: PyTree) -> CoupledGroups:
    """Query heads, a group for those that share a key head: `scope="group"` takes equally many of each.

    Key heads and the cache stay as they are. `work` is empty: budgets are of units or weights.

    Raises:
        LeafError: every key head has one query head alone.

    Example:
        >>> from effjax.models.embedded import load_default
        >>> model = load_default()
        >>> groups = query_head_groups(model.config, model.params)
        >>> next(iter(groups)).name, next(iter(groups)).units, len(groups.groups)
        ('layers_0/attention queries of key head 0', 2, 8)
    """
    shared = config.num_attention_heads // config.num_key_value_heads
    if shared < 2:
        raise LeafError(
            f"each of the {config.num_key_value_heads} key heads has one query head: take decoder_groups, which cut "
            "both together"
        )
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_with_paths(params)}
    groups = {}
    for path, shape in shapes.items():
        if not path.endswith("attention/q_proj/kernel"):
            continue
        place = path.removesuffix("/q_proj/kernel")
        axes = {path: len(shape) - 1, f"{place}/q_proj/bias": len(shape) - 2, f"{place}/o_proj/kernel": len(shape) - 2}
        for head in range(config.num_key_value_heads):
            first = head * shared * config.head_dim
            entries = first + np.arange(shared * config.head_dim).reshape(shared, config.head_dim)
            name = f"{place} queries of key head {head}"
            groups[name] = Group(name, shared, {(p, axis): entries for p, axis in axes.items() if p in shapes})
    return CoupledGroups(groups, shapes=shapes)


def shrink_decoder(
    config: DecoderConfig, params: PyTree, mask: PyTree, groups: CoupledGroups
) -> tuple[DecoderConfig, PyTree]:
    """The smaller decoder and its configuration, for `Decoder(config)` and `effjax.models.hf.save_hf`.

    Every layer must keep equally many heads, since the cache has one shape for all: take `Structured(scope="group")`
    for them. Layers may keep different numbers of channels, as with `Structured(scope="global")`;
    `intermediate_size` is a tuple then, and `effjax.io.save_checkpoint` keeps such a model. `save_hf` writes those
    whose layers are alike.

    Args:
        config, params: dense, stacked or not.
        mask, groups: see `ej.prune.shrink`; groups are those of `decoder_groups` or `query_head_groups`.

    Raises:
        ConfigError: layers keep different numbers of heads, key heads keep different numbers of query heads, or heads
            of OPT go, whose files have no entry for the width of a head.
        LeafError: see `ej.prune.shrink`.

    Example:
        >>> import effjax as ej
        >>> from effjax.models.embedded import load_default
        >>> model = load_default()
        >>> groups = decoder_groups(model.config, model.params).select("*/mlp/*")
        >>> scores = ej.prune.magnitude_scores(model.params, groups)
        >>> mask = ej.prune.structured_mask(model.params, groups, scores, ej.prune.Structured(sparsity=0.25))
        >>> config, params = shrink_decoder(model.config, model.params, mask, groups)
        >>> config.intermediate_size, params["layers_3"]["mlp"]["up_proj"]["kernel"].shape
        (480, (256, 480))
    """
    _check_queries(config, params, mask)
    small = shrink(params, mask, groups)
    changed = dataclasses.replace(
        config,
        intermediate_size=_channels(config, small),
        num_attention_heads=_heads(small, "attention/q_proj/kernel") // config.head_dim,
        num_key_value_heads=_heads(small, "attention/k_proj/kernel") // config.head_dim,
    )
    if config.is_opt and changed.num_attention_heads != config.num_attention_heads:
        raise ConfigError(
            f"num_attention_heads {config.num_attention_heads} would become {changed.num_attention_heads}, but an OPT "
            "config.json has no head_dim: cut channels alone, with groups.select('*/mlp/*')"
        )
    return changed, small


def _channels(config: DecoderConfig, params: PyTree) -> tuple[int, ...]:
    """The width of every feed-forward layer."""
    if "layers" in params:
        return (params["layers"]["mlp"]["up_proj"]["kernel"].shape[-1],) * config.num_hidden_layers
    layers = range(config.num_hidden_layers)
    return tuple(params[f"layers_{i}"]["mlp"]["up_proj"]["kernel"].shape[-1] for i in layers)


def _heads(params: PyTree, suffix: str) -> int:
    """The outputs of a projection, equal in all layers."""
    found = {path: leaf.shape[-1] for path, leaf in leaves_with_paths(params) if path.endswith(suffix)}
    if len(set(found.values())) > 1:
        few, many = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
        raise ConfigError(
            f"{few} would keep {found[few]} outputs and {many} {found[many]}, but the cache has one shape for all "
            "layers: cut equally many heads of each, with Structured(scope='group')"
        )
    return next(iter(found.values()))


def _check_queries(config: DecoderConfig, params: PyTree, mask: PyTree) -> None:
    for path, m in masks_by_path(params, mask).items():
        if not path.endswith("attention/q_proj/kernel"):
            continue
        kept = np.asarray(m).reshape(-1, m.shape[-1]).any(0)
        each = kept.reshape(config.num_key_value_heads, -1).sum(1) / config.head_dim
        if len(set(each[each > 0].tolist())) > 1:
            raise ConfigError(
                f"{path}: key heads would keep {each.tolist()} query heads, but every key head serves equally many: "
                "cut equally many of each, with Structured(scope='group')"
            )


def drop_layers(config: DecoderConfig, params: PyTree, layers: Collection[int]) -> tuple[DecoderConfig, PyTree]:
    """The decoder without some of its layers, those after them renumbered.

    Args:
        config, params: stacked or not; leaves may be compressed.
        layers: numbers of the layers that go, e.g. those of the least `block_influence`.

    Raises:
        ConfigError: a number that is no layer, or no layer would be left.

    Example:
        >>> from effjax.models.embedded import load_default
        >>> model = load_default()
        >>> config, params = drop_layers(model.config, model.params, [2])
        >>> config.num_hidden_layers, sorted(name for name in params if name.startswith("layers"))
        (3, ['layers_0', 'layers_1', 'layers_2'])
    """
    count, gone = config.num_hidden_layers, set(layers)
    if not gone <= set(range(count)) or len(gone) == count:
        raise ConfigError(f"layers={sorted(gone)}: numbers from 0 to {count - 1}, of which at least one stays")
    flat = unstack_layers(params) if "layers" in params else params
    left = [i for i in range(count) if i not in gone]
    rest = {name: value for name, value in flat.items() if name not in {f"layers_{i}" for i in range(count)}}
    small = rest | {f"layers_{new}": flat[f"layers_{old}"] for new, old in enumerate(left)}
    widths = tuple(config.widths[i] for i in left)
    config = dataclasses.replace(config, num_hidden_layers=len(left), intermediate_size=widths)
    return config, stack_layers(small) if "layers" in params else small
