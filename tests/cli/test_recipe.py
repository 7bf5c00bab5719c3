"""Recipes: the same method in Python, in a file and on the command line; every mistake named with its line."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import effjax as ej
from effjax.errors import ConfigError, LeafError, RuleError
from effjax.recipe import Recipe, apply_recipe, kind_of, methods, parse_method

TEXT = """\
version: 1
seed: 3
rules:
  - where: "*/attention/*/kernel"
    method: rtn
    args: {bits: 8, group_size: 16}
  - where: "*/down_proj/kernel"
    method: none
  - method: low-rank
    args:
      rank: 2
"""


def params() -> dict:
    """Two layers, a head and an embedding, all with exact numbers of inputs."""
    keys = iter(jax.random.split(jax.random.key(0), 12))

    def layer() -> dict:
        return {
            "attention": {"q_proj": {"kernel": jax.random.normal(next(keys), (32, 16))}},
            "mlp": {
                "up_proj": {"kernel": jax.random.normal(next(keys), (32, 48))},
                "down_proj": {"kernel": jax.random.normal(next(keys), (48, 32))},
            },
        }

    return {
        "embed": {"embedding": jax.random.normal(next(keys), (20, 32))},
        "layers_0": layer(),
        "layers_1": layer(),
        "lm_head": {"kernel": jax.random.normal(next(keys), (32, 20))},
    }


def same_bytes(a: dict, b: dict) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def test_reads_yaml() -> None:
    recipe = Recipe.from_text(TEXT)
    assert recipe.seed == 3
    assert recipe.rules == (
        ("*/attention/*/kernel", ej.quantize.RTN(bits=8, group_size=16)),
        ("*/down_proj/kernel", None),
        (None, ej.sketch.LowRank(rank=2)),
    )


def test_round_trip_through_text_and_json() -> None:
    recipe = Recipe.from_text(TEXT)
    assert Recipe.from_text(recipe.to_text()) == recipe
    assert Recipe.from_text(json.dumps(recipe.to_dict())) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_every_field_is_written_out() -> None:
    rule = Recipe(rules=((None, ej.quantize.RTN(bits=4)),)).to_dict()["rules"][0]
    assert rule["method"] == "rtn"
    assert rule["args"]["scale_dtype"] == "float16" and rule["args"]["group_size"] == 128


def test_command_line_names_reach_every_method() -> None:
    assert set(methods()) >= {"rtn", "nf4", "low_rank", "hashed", "magnitude", "random"}
    assert parse_method("RTN", bits=3) == ej.quantize.RTN(bits=3)
    assert parse_method("low-rank", ratio=2) == ej.sketch.LowRank(ratio=2)
    assert parse_method("none") is None
    kinds = [kind_of(m) for m in (ej.quantize.NF4(), ej.sketch.Hashed(ratio=2), ej.prune.Magnitude(pattern="2:4"))]
    assert kinds == ["quantize", "sketch", "prune"]


def test_applies_what_the_transforms_apply() -> None:
    rtn, low = ej.quantize.RTN(bits=4, group_size=16), ej.sketch.LowRank(rank=2)
    recipe = Recipe(rules=(("*/attention/*/kernel", rtn), ("*/mlp/*/kernel", low)))
    expected = ej.quantize_params(params(), [("*/attention/*/kernel", rtn)])
    expected = ej.sketch_params(expected, [("*/mlp/*/kernel", low)])
    assert same_bytes(apply_recipe(params(), recipe), expected)


def test_seed_decides_what_random_methods_draw() -> None:
    method = ej.sketch.Hashed(ratio=4)
    expected = ej.sketch_params(params(), method, key=jax.random.key(5))
    assert same_bytes(apply_recipe(params(), Recipe(rules=((None, method),), seed=5)), expected)
    other = apply_recipe(params(), Recipe(rules=((None, method),), seed=6))
    assert not all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(expected), strict=True)
    )


def test_pruning_packs_patterns_and_zeroes_the_rest() -> None:
    recipe = Recipe(
        rules=(
            ("*/attention/*/kernel", ej.prune.Magnitude(pattern="2:4")),
            ("*/mlp/*/kernel", ej.prune.Magnitude(sparsity=0.25)),
        )
    )
    pruned = apply_recipe(params(), recipe)
    assert type(pruned["layers_0"]["attention"]["q_proj"]["kernel"]).__name__ == "NMSparse"
    assert float((pruned["layers_1"]["mlp"]["up_proj"]["kernel"] == 0).mean()) == 0.25


def test_sizes_are_known_without_weights() -> None:
    for method in (
        ej.quantize.RTN(bits=3, group_size=16),
        ej.prune.Magnitude(pattern="2:4"),
        ej.sketch.LowRank(rank=2),
    ):
        recipe = Recipe(rules=((None, method),))
        abstract = jax.eval_shape(lambda p, r=recipe: apply_recipe(p, r), params())
        concrete = apply_recipe(params(), recipe)
        assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
        assert ej.nbytes(abstract) == ej.nbytes(concrete)


def test_progress_counts_leaves() -> None:
    seen: list[tuple[int, int]] = []
    apply_recipe(params(), Recipe(rules=((None, ej.quantize.NF4(block_size=16)),)), progress=lambda *x: seen.append(x))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_mistakes_of_the_transforms_come_through() -> None:
    with pytest.raises(LeafError, match=r"layers_0/attention/q_proj/kernel \[32, 16\].*group_size=24 does not divide"):
        apply_recipe(params(), Recipe(rules=((None, ej.quantize.RTN(group_size=24)),)))
    with pytest.raises(RuleError, match="matches no leaf"):
        apply_recipe(params(), Recipe(rules=(("*/experts/*", ej.quantize.RTN(group_size=16)),)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method: rtn", "method: rtnn", r"recipe, line 5: unknown method 'rtnn' \(did you mean 'rtn'\?\)"),
        ("bits: 8", "bit: 8", r"line 6: method 'rtn' has no field 'bit' \(did you mean 'bits'\?\)"),
        ("bits: 8", "bits: 9", "line 6: method 'rtn': bits=9: choose 1 to 8"),
        ("bits: 8", "bits: four", "line 6: method 'rtn': bits must be int, found 'four'"),
        ("bits: 8", "bits: true", "line 6: method 'rtn': bits must be int, found True"),
        ("bits: 8", "clip: mean", "line 6: method 'rtn': clip must be 'absmax' or 'full' or 'mse', found 'mean'"),
        ("    method: none", "    methods: none", r"line 8: a rule has no key 'methods' \(did you mean 'method'\?\)"),
        ("    method: none", "    args: {}", "line 7: a rule needs a method"),
        ("seed: 3", "sed: 3", r"line 2: a recipe has no key 'sed' \(did you mean 'seed'\?\)"),
        ("seed: 3", "seed: -3", "line 2: seed=-3: use a whole number"),
        ("version: 1", "version: 2", "line 1: version 2 is not known"),
        ("rules:", "rules: {}\nrule:", r"line 4: a recipe has no key 'rule' \(did you mean 'rules'\?\)"),
        ('where: "*/down_proj/kernel"', "where: 7", "line 7: where must be a path pattern"),
        ("args: {bits: 8, group_size: 16}", "args: 8", "line 6: args must map fields to values"),
        ("seed: 3", "seed: 3\nseed: 4", "line 3: the key 'seed' stands twice"),
        ("seed: 3", "seed: [3", "line 3: not valid YAML or JSON"),
        ("seed: 3", "seed: !!python/object/apply:os.getcwd []", "line 2: not valid YAML or JSON"),
    ],
)
def test_mistakes_are_named_with_their_line(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError, match=message):
        Recipe.from_text(TEXT.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "[]", "rtn"])
def test_other_files_are_no_recipes(text: str) -> None:
    with pytest.raises(ConfigError, match="a recipe is a mapping with the key 'rules'"):
        Recipe.from_text(text)


def test_empty_rules_and_wrong_python_values() -> None:
    with pytest.raises(ConfigError, match="'rules' must be a list of at least one rule"):
        Recipe.from_text("rules: []")
    with pytest.raises(ConfigError, match="the key 'rules' is missing"):
        Recipe.from_text("seed: 1")
    with pytest.raises(ConfigError, match="at least one rule"):
        Recipe(rules=())
    with pytest.raises(ConfigError, match="holds path patterns"):
        Recipe(rules=((lambda path, leaf: True, None),))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is not a method"):
        Recipe(rules=((None, "rtn"),))


def test_files_that_cannot_be_recipes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Recipe.from_file(tmp_path / "missing.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        Recipe.from_file(tmp_path / "binary")
    (tmp_path / "large").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ConfigError, match="too large for a recipe"):
        Recipe.from_file(tmp_path / "large")
    (tmp_path / "good.json").write_text('{"rules": [{"method": "nf4"}]}')
    assert Recipe.from_file(tmp_path / "good.json").rules == ((None, ej.quantize.NF4()),)
