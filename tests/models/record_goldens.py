"""Records the logits of `transformers` for the small configurations of every family.

    python -m tests.models.record_goldens

Needs the extra `parity`. Weights come from the rule in `families.py`, so only logits of a few tokens are kept.
"""

import importlib.metadata
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.models.families import FAMILIES, POSITIONS, tokens, weight

GOLDENS = Path(__file__).parent / "goldens" / "logits.npz"


def reference_model(entries: dict) -> transformers.PreTrainedModel:
    """The `transformers` model of a config.json, with the weights of the rule, in float32 and with eager attention."""
    config = transformers.AutoConfig.for_model(**entries)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    state = {
        name: torch.from_numpy(weight(name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
        if not (entries["tie_word_embeddings"] and name == "lm_head.weight")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def reference_logits(model: transformers.PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 `[batch, length, vocab]`."""
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64)), use_cache=False).logits.float().numpy()


def main() -> None:
    logits = {name: reference_logits(reference_model(entries), tokens()) for name, entries in FAMILIES.items()}
    kept = {name: values[0, list(POSITIONS)] for name, values in logits.items()}
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **kept)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    print(f"{GOLDENS.name}: {len(kept)} families, {GOLDENS.stat().st_size} bytes, from {versions}")


if __name__ == "__main__":
    main()
