"""A tiny random model on disk, made once, and the command line run in this process."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from effjax.cli import main
from effjax.models.config import DecoderConfig
from effjax.models.decoder import Decoder
from effjax.models.hf import save_hf

CONFIG = DecoderConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_ids=(1,),
    tie_word_embeddings=True,
)
WORDS = "the quick brown fox jumps over the lazy dog and every good boy does fine while seven wizards hum "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command left: its exit code and its two outputs."""

    code: int
    out: str
    err: str


def byte_tokenizer() -> Tokenizer:
    """A token a byte, after the two marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    params = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    save_hf(directory, CONFIG, params, byte_tokenizer().to_str())
    return directory


@pytest.fixture
def work(tmp_path: Path, _made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the dense model `tiny` and the text `text.txt` in it."""
    shutil.copytree(_made, tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(WORDS * 12, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def effjax(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command line with a string of arguments."""

    def run(arguments: str) -> Ran:
        capsys.readouterr()
        code = main(arguments.split())
        captured = capsys.readouterr()
        return Ran(code=code, out=captured.out, err=captured.err)

    return run
