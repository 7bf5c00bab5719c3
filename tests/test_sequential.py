"""Sequential calibration: against plain numpy, in the right order within a block, and with one program for all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax as ej
from effjax.errors import CalibrationError, LeafError
from effjax.lift.calibrate import InputStats
from effjax.models.config import DecoderConfig
from effjax.models.decoder import BlockApply, Decoder, stages
from effjax.paths import leaves_with_paths
from effjax.recipe import Recipe, apply_recipe
from effjax.sequential import Stage, compress_sequentially, compress_stage, with_fisher
from tests.common.cases import assert_same_bytes

CONFIG = DecoderConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, dtype="float32"
)
WEIGHTED = ej.sketch.LowRank(rank=4, weighted=True)
TRACES: list[str] = []


@dataclasses.dataclass(frozen=True)
class Relu:
    """One layer, which notes down that it is traced."""

    name: str = "relu"

    def __call__(self, params, x):
        TRACES.append(self.name)
        return jax.nn.relu(x @ params["kernel"])


def chain(layers: int, width: int = 12):
    key = jax.random.key(1)
    params = {f"l{i}": {"kernel": jax.random.normal(jax.random.fold_in(key, i), (width, width))} for i in range(layers)}
    return params, [Stage(name=f"l{i}", apply=Relu(), groups=(("kernel",),)) for i in range(layers)]


def low_rank(w: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The best product of rank 4 for the error of `rows @ w`, by eigenvectors in float64."""
    moment = rows.T @ rows / len(rows)
    moment += WEIGHTED.damping * np.trace(moment) / len(moment) * np.eye(len(moment))
    values, vectors = np.linalg.eigh(moment)
    root, inverse = (vectors * values**0.5) @ vectors.T, (vectors * values**-0.5) @ vectors.T
    u, s, v = np.linalg.svd(root @ w)
    return inverse @ (u[:, :4] * s[:4]) @ v[:4]


@pytest.fixture(scope="module")
def decoder():
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (6, 10)).astype(np.int32)
    return jax.jit(Decoder(CONFIG).init)(jax.random.key(0), tokens)["params"], tokens


def test_every_block_sees_what_the_compressed_ones_before_it_give():
    params, chained = chain(3)
    inputs = np.random.default_rng(0).standard_normal((10, 5, 12)).astype(np.float32)
    found = compress_sequentially(params, Recipe(rules=[(None, WEIGHTED)]), chained, inputs, micro_batch=4)
    rows = inputs.reshape(-1, 12).astype(np.float64)
    for i in range(3):
        expected = low_rank(np.asarray(params[f"l{i}"]["kernel"], np.float64), rows)
        np.testing.assert_allclose(found[f"l{i}"]["kernel"].materialize(), expected, rtol=0, atol=2e-4)
        rows = np.maximum(rows @ expected, 0)


def test_groups_of_a_block_see_the_compressed_groups_before(decoder):
    """The statistics of o_proj are those of a block whose queries, keys and values are compressed already."""
    params, _ = decoder
    block, stage = params["layers_0"], stages(CONFIG)[1]
    x = jax.random.normal(jax.random.key(3), (4, 10, 32))
    recipe = {f"layers_0/attention/{p}_proj/kernel": ej.quantize.RTN(bits=3, group_size=16) for p in "qkv"}
    recipe["layers_0/attention/o_proj/kernel"] = WEIGHTED
    flat = dict(leaves_with_paths(block))
    found, _ = compress_stage(stage, flat, np.asarray(x), recipe, micro_batch=4)
    attention = dict(block["attention"])
    for p in "qkv":
        w = attention[f"{p}_proj"]["kernel"]
        attention[f"{p}_proj"] = {"kernel": ej.quantize.RTN(bits=3, group_size=16).quantize(w).materialize()}
    moments = []
    for part in (block | {"attention": attention}, block):
        stats = ej.calibrate(BlockApply(CONFIG), part, [(x,)], where="attention/o_proj/kernel")
        moments.append(stats["attention"]["o_proj"]["kernel"])
    expected, other = (WEIGHTED.compress(block["attention"]["o_proj"]["kernel"], stats=s) for s in moments)
    np.testing.assert_allclose(
        found["attention/o_proj/kernel"].materialize(), expected.materialize(), rtol=0, atol=1e-4
    )
    assert np.abs(np.asarray(expected.materialize() - other.materialize())).max() > 1e-3


def test_blocks_of_one_shape_share_their_programs():
    inputs = np.ones((6, 2, 12), np.float32)
    counts = []
    for layers in (2, 7):
        TRACES.clear()
        jax.clear_caches()
        params, chained = chain(layers)
        compress_sequentially(params, Recipe(rules=[(None, WEIGHTED)]), chained, inputs, micro_batch=3)
        counts.append(len(TRACES))
    assert counts[0] == counts[1] and counts[0] <= 4, counts


def test_a_recipe_without_statistics_gives_the_bytes_of_apply_recipe(decoder):
    params, tokens = decoder
    recipe = Recipe(rules=[("*/mlp/*", ej.quantize.NF4(block_size=16)), (None, ej.sketch.Hashed(ratio=4))], seed=5)
    found = compress_sequentially(params, recipe, stages(CONFIG), tokens)
    assert_same_bytes(found, apply_recipe(params, recipe))


def test_other_leaves_and_methods_may_be_mixed(decoder):
    params, tokens = decoder
    rules = [("*/o_proj/kernel", WEIGHTED), ("*/q_proj/kernel", None), (None, ej.quantize.RTN(bits=8, group_size=16))]
    done: list[tuple[int, int]] = []
    found = compress_sequentially(
        params, Recipe(rules=rules), stages(CONFIG), tokens, progress=lambda *step: done.append(step)
    )
    kinds = {path: type(leaf).__name__ for path, leaf in leaves_with_paths(found)}
    assert kinds["layers_2/attention/o_proj/kernel"] == "LowRank"
    assert kinds["layers_2/mlp/down_proj/kernel"] == "Quantized"
    assert found["layers_1"]["attention"]["q_proj"]["kernel"] is params["layers_1"]["attention"]["q_proj"]["kernel"]
    assert done == [(i, 4) for i in range(1, 5)]
    logits = jax.jit(ej.lift(Decoder(CONFIG).apply))({"params": found}, tokens)
    assert np.isfinite(np.asarray(logits)).all()


def test_float16_weights_are_calibrated_in_float32(decoder):
    params, tokens = decoder
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    found = compress_sequentially(half, Recipe(rules=[("*/down_proj/kernel", WEIGHTED)]), stages(CONFIG), tokens)
    leaf = found["layers_2"]["mlp"]["down_proj"]["kernel"]
    assert leaf.dtype == jnp.bfloat16 and leaf.a.dtype == jnp.bfloat16


def test_what_no_stage_can_calibrate_is_refused_before_anything_runs(decoder):
    params, tokens = decoder
    head = params | {"lm_head": {"kernel": jnp.ones((32, 64))}}
    with pytest.raises(CalibrationError, match=r"^lm_head/kernel: LowRank needs \['second_moment'\], but this weight"):
        compress_sequentially(head, Recipe(rules=[("lm_head/*", WEIGHTED)]), stages(CONFIG), tokens)
    loose = [dataclasses.replace(stage, groups=stage.groups[1:]) for stage in stages(CONFIG)]
    with pytest.raises(CalibrationError, match=r"^layers_0/attention/k_proj/kernel is in none of the groups"):
        compress_sequentially(params, Recipe(rules=[(None, WEIGHTED)]), loose, tokens)
    with pytest.raises(CalibrationError, match="^the calibration set is empty"):
        compress_sequentially(params, Recipe(rules=[(None, WEIGHTED)]), stages(CONFIG), tokens[:0])
    with pytest.raises(LeafError, match="rank=40 is above the full rank 32"):
        wrong = Recipe(rules=[(None, ej.sketch.LowRank(rank=40, weighted=True))])
        compress_sequentially(params, wrong, stages(CONFIG), tokens)


def test_fisher_information_comes_from_outside():
    """A stage gets it by path, beside or without what its inputs give."""
    fisher = InputStats(count=jnp.ones(()), fisher_sum=jnp.ones((32, 48)), examples=jnp.ones(()))
    inputs = InputStats(count=jnp.ones(()), outer_sum=jnp.eye(32))
    both = with_fisher(inputs, fisher)
    assert both.outer_sum is inputs.outer_sum and both.fisher_sum is fisher.fisher_sum
    assert with_fisher(None, fisher) is fisher
