"""Any JSON in place of an entry of a quantization_config is read or refused as a ConfigError, never anything else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.errors import ConfigError
from effjax.io.formats import awq, bitsandbytes, compressed_tensors, gptq
from tests.io.formats.test_compressed_tensors import W4A16
from tests.io.formats.test_gptq import CONFIGS

SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.sampled_from([0.5, 1e400, "", "gptq", "re:(", "2x2", "group"])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
STARTS = {
    "gptq": (gptq, CONFIGS["GPTQModel"]),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "modules_to_not_convert": []}),
    "compressed-tensors": (compressed_tensors, W4A16 | {"version": "0.9", "transform_config": None}),
    "bitsandbytes": (bitsandbytes, bitsandbytes.BNBConfig(dense=("lm_head",)).to_json()),
}


def places(entries, at=()):
    """The paths of all entries, those of nested objects too."""
    for key, value in entries.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from places(value, (*at, key))


def put(entries, path, value):
    key, *rest = path
    return entries | {key: put(entries[key], rest, value) if rest else value}


@pytest.mark.parametrize("name", STARTS)
@given(st.data())
@settings(max_examples=60)
def test_any_entry(name, data):
    module, entries = STARTS[name]
    for _ in range(data.draw(st.integers(1, 2))):
        entries = put(entries, data.draw(st.sampled_from(sorted(places(entries)))), data.draw(JSON))
    try:
        config = module.parse_config(entries)
    except ConfigError as error:
        assert "quantization_config" in str(error)
        return
    config.scheme("model.layers.0.mlp.up_proj")
    assert module.parse_config(config.to_json()).scheme("lm_head") == config.scheme("lm_head")
