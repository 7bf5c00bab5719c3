"""Logits agree with those that `transformers` gave for every family (see record_goldens.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.hf import load_model
from tests.models.families import FAMILIES, POSITIONS, tokens, write_checkpoint

GOLDENS = Path(__file__).parent / "goldens" / "logits.npz"


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_reference(family, scan_layers, tmp_path):
    model = load_model(write_checkpoint(tmp_path, FAMILIES[family]), scan_layers=scan_layers)
    logits = jax.jit(model.apply)({"params": model.params}, jnp.asarray(tokens()))
    with np.load(GOLDENS, allow_pickle=False) as goldens:
        np.testing.assert_allclose(logits[0, np.array(POSITIONS)], goldens[family], atol=1e-4, rtol=0)


def test_goldens_tell_the_families_apart():
    """Window, scaling, biases and norms change the last token's logits by far more than the tolerance."""
    with np.load(GOLDENS, allow_pickle=False) as goldens:
        assert set(goldens.files) == set(FAMILIES)
        pairs = [
            ("llama2", "llama_biases"),
            ("llama2", "llama_linear"),
            ("llama2", "llama_dynamic"),
            ("mistral", "mistral_no_window"),
        ]
        for one, other in pairs:
            assert np.abs(goldens[one][-1] - goldens[other][-1]).max() > 0.05, (one, other)


def test_llama3_scaling_matters(tmp_path):
    """Without its scaling the same checkpoint is far off, so the golden really tests it."""
    model = load_model(write_checkpoint(tmp_path, FAMILIES["llama3"] | {"rope_scaling": None}))
    logits = jax.jit(model.apply)({"params": model.params}, jnp.asarray(tokens()))
    with np.load(GOLDENS, allow_pickle=False) as goldens:
        assert np.abs(logits[0, POSITIONS[-1]] - goldens["llama3"][-1]).max() > 0.05
