"""The model card of a decoder that `train.lm` made."""

import os
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from effjax.models.config import DecoderConfig

_CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [jax, flax, effjax]
---

# effjax default model

A small Llama-style decoder that writes in the manner of Python's documentation. effjax carries it so that every command
and every test has a real trained model to work on, without a network. It is good for that and for nothing else: it
knows no facts and makes up functions.

{table}

## Data

pydoc's topics and the docstrings of the standard library of {python} (Python Software Foundation License),
read from the source files by `effjax.data.python_docs`: {train_documents:,} documents of {train_tokens:,} tokens
to train on, {heldout_documents:,} of {heldout_tokens:,} tokens held out by a hash of their text.
The held-out loss is over `python_docs.windows` of {context} tokens. Documents that differ in one word count as
different, so some held-out ones have near copies among the others.

## How it was made

```console
{commands}
```

with seed {seed} and jax {jax}, from a checkout of effjax. The same Python, jax and processor give the same losses.

## What it writes

Sampled at temperature {temperature}, the prompt before `⟨…⟩`; the first draws of seed {seed}, not chosen.

{samples}
"""


def write_card(
    config: DecoderConfig,
    *,
    commands: Sequence[str],
    settings: Mapping[str, Any],
    figures: Mapping[str, float],
    samples: Mapping[str, str],
    temperature: float,
) -> str:
    """The text of README.md.

    Args:
        config: the decoder's shape.
        commands: what was run, in order, with a relative folder.
        settings: steps, batch, context, noise and seed of the run.
        figures: what was counted and measured, under the names used in this file.
        samples: what the model wrote after each prompt.
        temperature: of the samples.
    """
    f, s, c = figures, settings, config
    heads = f"{c.num_attention_heads} query and {c.num_key_value_heads} key heads of {c.head_dim}"
    shape = f"{c.num_hidden_layers} layers, width {c.hidden_size}, {heads}, MLP {c.intermediate_size}, tied embedding"
    loss = f"**{f['heldout_loss']:.4f} nats a token, {f['heldout_bits_per_byte']:.4f} bits a byte**"
    noise = f", {s['noise']:.0%} of the input tokens exchanged" if s["noise"] else ""
    rows = {
        "parameters": f"{f['parameters']:,} ({shape})",
        "weights": f"bfloat16, {f['bytes']:,} bytes",
        "tokenizer": f"byte-level BPE, {c.vocab_size:,} entries; `<s>` begins a text, `</s>` ends it",
        "context": f"{s['context']} tokens",
        "held-out loss": f"{loss} (these rounded weights, computed in float32)",
        "training loss": f"{f['train_loss']:.4f} nats a token (mean of the last 100 steps{noise})",
        "steps": f"{s['steps']:,} of {s['batch']} windows: {f['seen']:,} tokens, {f['epochs']:.1f} times the corpus",
        "time": f"{f['minutes']:.0f} minutes on {os.cpu_count()} {platform.machine()} cores ({jax.default_backend()})",
    }
    return _CARD.format(
        table="\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        jax=jax.__version__,
        commands="\n".join(f"$ {command}" for command in commands),
        context=s["context"],
        seed=s["seed"],
        temperature=temperature,
        samples="\n\n".join(f"~~~text\n{prompt}⟨…⟩{text}\n~~~" for prompt, text in samples.items()),
        **{name: int(f[name]) for name in ("train_documents", "train_tokens", "heldout_documents", "heldout_tokens")},
    )
