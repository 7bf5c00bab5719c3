"""The shipped model: it loads, predicts held-out documentation as its card says, and writes recognisable English."""

import re
from importlib.resources import files

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.data import python_docs
from effjax.models.decoder import Decoder
from effjax.models.embedded import load_default
from effjax.models.generate import generate_text
from train.lm import encode_documents, make_evaluate


@pytest.fixture(scope="module")
def model():
    return load_default(dtype=jnp.float32)


@pytest.fixture(scope="module")
def heldout():
    return python_docs.documents("heldout")


def test_heldout_loss_is_what_the_card_says(model, heldout):
    card = (files("effjax") / "assets" / "default_model" / "README.md").read_text()
    nats, bits = map(float, re.search(r"\*\*([\d.]+) nats a token, ([\d.]+) bits a byte\*\*", card).groups())
    documents = encode_documents(model.tokenizer, heldout)
    figures = make_evaluate(Decoder(model.config), documents, heldout, context=256)(model.params)
    # Another Python release has slightly other documentation.
    assert figures["heldout_loss"] == pytest.approx(nats, abs=0.1)
    assert figures["heldout_bits_per_byte"] == pytest.approx(bits, abs=0.1)


def test_it_writes_words_that_the_documentation_has(model, heldout):
    known = set(re.findall(r"[a-z]{2,}", " ".join(heldout).lower()))
    prompts = ["Return the", "If the object is", "This module", 'The "with" statement']
    texts = generate_text(model, prompts, max_new_tokens=60, temperature=0.5, seed=0)
    words = re.findall(r"[a-z]{2,}", " ".join(texts).lower())
    assert len(words) > 40
    assert np.mean([word in known for word in words]) > 0.75
    assert {"the", "is"} & set(words)
