"""kvpress's side of kv.py, run by that file in an environment that has kvpress and no effjax.

Reads one job a line from stdin and answers each with one line of JSON on stdout; what the libraries print goes to
stderr. A job is a JSON object:

    model    directory in Hugging Face's layout
    tokens   .npy file, int32 [windows, length]
    prompt   how many tokens are read before the cache is compressed
    press    name of a class of kvpress with its arguments, [name, {...}], or null
    save     .npz file for the losses and likeliest successors of all tokens behind the prompt
"""

import contextlib
import json
import os
import sys
from typing import Any

_ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kvpress  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

BATCH = 64


def read(model: Any, tokens: torch.Tensor, prompt: int, press: Any) -> tuple[np.ndarray, np.ndarray]:
    """Losses and likeliest successors behind the prompts, whose tokens are read one by one after the compression."""
    cache = transformers.DynamicCache()
    with press(model) if press is not None else contextlib.nullcontext():
        logits = [model(tokens[:, :prompt], past_key_values=cache).logits[:, -1:]]
    for at in range(prompt, tokens.shape[1] - 1):
        places = torch.full((len(tokens), 1), at)  # true positions, whatever the cache holds
        logits.append(model(tokens[:, at : at + 1], past_key_values=cache, position_ids=places).logits)
    scores = torch.cat(logits, dim=1).float()
    nll = torch.nn.functional.cross_entropy(scores.transpose(1, 2), tokens[:, prompt:], reduction="none")
    return nll.numpy(), scores.argmax(-1).numpy()


def run(job: dict[str, Any]) -> dict[str, Any]:
    name, arguments = job["press"] or (None, {})
    # The plain implementation alone gives attention weights; but it takes one mask, that of the first layer, for all.
    attention = "eager" if name == "ObservedAttentionPress" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.float32, attn_implementation=attention
    )
    tokens = torch.from_numpy(np.load(job["tokens"]).astype(np.int64))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(tokens), BATCH):
            press = None if name is None else getattr(kvpress, name)(**arguments)
            parts.append(read(model.eval(), tokens[start : start + BATCH], job["prompt"], press))
    nll, likeliest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    np.savez(job["save"], nll=nll, likeliest=likeliest)
    return {"nll": float(nll.mean())}


def main() -> None:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("kvpress", "torch", "transformers")}
    print(json.dumps({"versions": versions}), file=_ANSWERS)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=_ANSWERS)


if __name__ == "__main__":
    main()
