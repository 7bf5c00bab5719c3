"""Live comparison with `transformers`, in both directions and on a trained model; needs the extra `parity`."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.models.generate import generate_text
from effjax.models.hf import load_model, save_hf
from tests.models.families import FAMILIES, hf_tensors, tokens, write_checkpoint

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # torch and transformers warn about themselves
]
REPOSITORY = Path(__file__).parents[2]
STORIES = REPOSITORY / os.environ.get("EFFJAX_DATA", "../shared/data") / "models" / "stories260K" / "hf"


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
def test_our_directory_read_by_transformers(family, tmp_path, transformers):
    from tests.models.record_goldens import reference_logits

    model = load_model(write_checkpoint(tmp_path / "theirs", FAMILIES[family]))
    save_hf(tmp_path / "ours", model.config, model.params)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype="float32"
    ).eval()
    logits = model.apply({"params": model.params}, jnp.asarray(tokens(rows=2)))
    np.testing.assert_allclose(logits, reference_logits(reference, tokens(rows=2)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_their_directory_read_by_us(family, tmp_path, transformers):
    from tests.models.record_goldens import reference_logits, reference_model

    reference = reference_model(FAMILIES[family])
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, scan_layers=True)
    logits = model.apply({"params": model.params}, jnp.asarray(tokens(rows=2)))
    np.testing.assert_allclose(logits, reference_logits(reference, tokens(rows=2)), atol=1e-4, rtol=0)


def test_rule_lists_the_tensors_that_transformers_has(transformers):
    from tests.models.record_goldens import reference_model

    for family, entries in FAMILIES.items():
        theirs = {name: tuple(tensor.shape) for name, tensor in reference_model(entries).state_dict().items()}
        if entries["tie_word_embeddings"]:
            theirs.pop("lm_head.weight", None)
        assert theirs == {name: tensor.shape for name, tensor in hf_tensors(entries).items()}, family


@pytest.mark.skipif(not STORIES.exists(), reason="the trained model is not at hand (EFFJAX_DATA)")
def test_trained_model(transformers):
    """stories260K: the same logits over a whole context, and the same greedy text."""
    import torch

    from tests.models.record_goldens import reference_logits

    model = load_model(STORIES)
    reference = transformers.AutoModelForCausalLM.from_pretrained(STORIES, attn_implementation="eager").eval()
    prompt = "Once upon a time, there was a little girl"
    ids = model.encode(prompt)
    [text] = generate_text(model, [prompt], max_new_tokens=100)
    with torch.no_grad():
        theirs = reference.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=100)[0].numpy()
    assert prompt + text == model.decode(theirs.tolist())
    logits = jax.jit(model.apply)({"params": model.params}, jnp.asarray(theirs[None], jnp.int32))
    np.testing.assert_allclose(logits, reference_logits(reference, theirs[None]), atol=1e-4, rtol=0)
