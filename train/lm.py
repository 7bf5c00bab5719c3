"""Trains the embedded default: a small Llama-style decoder on the documentation that every Python install carries.

    python -m train.lm --out runs/lm

The result, `runs/lm/model`, is a directory as Hugging Face tools read it: config.json, model.safetensors (bfloat16),
tokenizer.json, README.md. With `--resume` an interrupted run goes on where it was, a finished one is written again.
"""

import dataclasses
import json
import math
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from effjax.data import python_docs
from effjax.errors import ConfigError
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.models.generate import generate_text
from effjax.models.hf import LoadedModel, save_hf
from train.command import run
from train.config import LoopConfig
from train.lm_card import write_card
from train.loop import fit
from train.processes import is_main, to_host

BOS, EOS = "<s>", "</s>"
PROMPTS = ("This module", "If the object is", 'The "with" statement', "")
TEMPERATURE, SAMPLE_TOKENS = 0.5, 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmConfig(LoopConfig):
    """The model, its data and the loop.

    Attributes:
        out: folder for `checkpoints/`, `metrics.jsonl` and the finished `model/`.
        resume: go on from the newest checkpoint in `out`.
        batch: windows a step.
        context: tokens a window, and the length the model is made for.
        noise: share of input tokens replaced by others of the batch while training, against overfitting: the corpus
            is small and seen many times (Xie et al., Data noising as smoothing, 2017).
        vocab: entries of the byte-level BPE tokenizer, the two marks and 256 bytes included.
        hidden: width of the residual stream.
        layers: decoder blocks.
        heads: query heads.
        kv_heads: key and value heads.
        intermediate: width of the gated MLP.
    """

    out: Path
    resume: bool = False
    batch: int = 16
    context: int = 256
    noise: float = 0.1
    vocab: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 640

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.noise < 1.0:
            raise ConfigError(f"noise={self.noise}: must be in [0, 1)")
        if self.vocab < 258:
            raise ConfigError(f"vocab={self.vocab}: must hold 256 bytes and two marks, 258 at least")


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE: any text has an encoding and comes back unchanged. `encode` adds the begin mark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text between its begin and its end mark."""
    end = [tokenizer.token_to_id(EOS)]
    return [np.array(encoding.ids + end, np.int32) for encoding in tokenizer.encode_batch(texts)]


def window_sampler(documents: list[np.ndarray], *, batch: int, context: int, seed: int):
    """Returns `step -> int32 [batch, context + 1]`: every second window starts with a document, the others anywhere.

    The draw is a function of (seed, step) alone, so a resumed run sees what the uninterrupted one would have seen.
    """
    stream = np.concatenate(documents)
    last = stream.size - context - 1
    if last < 1:
        raise ConfigError(f"context={context}: the corpus has only {stream.size} tokens; choose a shorter context")
    starts = np.cumsum([0] + [len(ids) for ids in documents])
    starts = starts[starts <= last]

    def batch_at(step: int) -> np.ndarray:
        draw = np.random.default_rng((seed, step))
        anywhere = draw.integers(0, last + 1, batch)
        begun = starts[draw.integers(0, starts.size, batch)]
        first = np.where(np.arange(batch) % 2 == 0, begun, anywhere)
        return stream[first[:, None] + np.arange(context + 1)]

    return batch_at


def make_loss(model: Decoder, *, noise: float):
    """Next-token cross-entropy `(params, windows, key) -> (sum, count)`, in nats."""

    def loss_fn(params, windows, key):
        inputs, targets = windows[:, :-1], windows[:, 1:]
        if noise:
            where, what = jax.random.split(key)
            others = jax.random.permutation(what, inputs.reshape(-1)).reshape(inputs.shape)  # as frequent as in text
            inputs = jnp.where(jax.random.bernoulli(where, noise, inputs.shape), others, inputs)
        losses = _nats(model, params, inputs, targets)
        return losses.sum(), jnp.asarray(losses.size, jnp.float32)

    return loss_fn


def _nats(model: Decoder, params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each target, [batch, length]."""
    logits = jnp.asarray(model.apply({"params": params}, inputs), jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def make_evaluate(model: Decoder, documents: list[np.ndarray], texts: list[str], *, context: int, batch: int = 16):
    """Returns `params -> {"heldout_loss": nats a token, "heldout_bits_per_byte": …}` after `python_docs.windows`."""
    rows, mask = python_docs.windows(documents, context)
    padding = -len(rows) % batch
    rows = np.pad(rows, ((0, padding), (0, 0))).reshape(-1, batch, context + 1)
    mask = np.pad(mask, ((0, padding), (0, 0))).reshape(-1, batch, context)
    text_bytes = sum(len(text.encode()) for text in texts)

    @jax.jit
    def nats(params, windows, valid):
        return jnp.sum(_nats(model, params, windows[:, :-1], windows[:, 1:]) * valid)

    def evaluate(params) -> dict[str, float]:
        total = math.fsum(float(nats(params, r, m)) for r, m in zip(rows, mask, strict=True))
        return {
            "heldout_loss": total / int(mask.sum()),
            "heldout_bits_per_byte": total / math.log(2) / text_bytes,
        }

    return evaluate


def decoder_config(config: LmConfig) -> DecoderConfig:
    """The shape of the model; the marks are the tokenizer's first two entries."""
    return DecoderConfig(
        vocab_size=config.vocab,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.hidden // config.heads,
        max_position_embeddings=config.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(1,),
    )


def train(config: LmConfig) -> dict[str, float] | None:
    """Trains tokenizer and model and writes `config.out / "model"`.

    Returns:
        The held-out figures of the weights as written, or None when the run was stopped before its last step.
    """
    texts, heldout = python_docs.documents("train"), python_docs.documents("heldout")
    tokenizer = train_tokenizer(texts, config.vocab)
    if tokenizer.get_vocab_size() != config.vocab:
        raise ConfigError(f"vocab={config.vocab}: the corpus yields only {tokenizer.get_vocab_size()} entries")
    train_ids, heldout_ids = encode_documents(tokenizer, texts), encode_documents(tokenizer, heldout)
    shape = decoder_config(config)
    model = Decoder(shape)
    evaluate = make_evaluate(model, heldout_ids, heldout, context=config.context)
    history = config.out / "history.txt"  # every command that took part, for the card
    before = history.read_text().splitlines() if config.resume and history.exists() else []
    first = int(before[-1].rpartition(" ")[2]) + 1 if before else 1
    state = fit(
        make_loss(model, noise=config.noise),
        lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        window_sampler(train_ids, batch=config.batch, context=config.context, seed=config.seed),
        config,
        config.out,
        resume=config.resume,
        evaluate=evaluate,
        unit="tokens",
    )
    if is_main() and int(state.step) >= first:
        before.append(f"{command_of(config)}  # steps {first} to {int(state.step)}")
        history.write_text("".join(line + "\n" for line in before))
    if int(state.step) < config.steps:
        print(f"stopped at step {int(state.step)} of {config.steps}; go on with --resume")
        return None

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), to_host(state.params))
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    heldout_figures = evaluate(rounded)
    if not is_main():
        return heldout_figures
    loaded = LoadedModel(config=shape, params=jax.device_put(rounded), tokenizer=tokenizer, source="default")
    records = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    seen = config.steps * config.batch * config.context
    figures = heldout_figures | {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "train_loss": float(np.mean([record["loss"] for record in records[-100:]])),
        "seen": seen,
        "epochs": seen / sum(map(len, train_ids)),
        "minutes": sum(record["seconds"] for record in records) / 60,
        "train_documents": len(texts),
        "train_tokens": sum(map(len, train_ids)),
        "heldout_documents": len(heldout),
        "heldout_tokens": sum(map(len, heldout_ids)),
    }
    card = write_card(
        shape,
        commands=before,
        settings=dataclasses.asdict(config),
        figures=figures,
        samples=dict(zip(PROMPTS, write_samples(loaded, seed=config.seed), strict=True)),
        temperature=TEMPERATURE,
    )
    marks = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    files = {"README.md": card, "tokenizer_config.json": json.dumps(marks, indent=2) + "\n"}
    save_hf(config.out / "model", shape, params, tokenizer.to_str(), files=files, overwrite=True)
    return heldout_figures


def write_samples(model: LoadedModel, *, seed: int) -> list[str]:
    """What the model writes after each of `PROMPTS`."""
    return generate_text(model, PROMPTS, max_new_tokens=SAMPLE_TOKENS, temperature=TEMPERATURE, seed=seed)


def command_of(config: LmConfig) -> str:
    """The command that makes the same model again; it names a relative folder instead of the one used."""
    words = ["python", "-m", "train.lm", "--out", "runs/lm"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "out" and value != field.default:
            words += [f"--{field.name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return shlex.join(words)


def main() -> None:
    run(LmConfig, train, prog="python -m train.lm", description=__doc__)


if __name__ == "__main__":
    main()
