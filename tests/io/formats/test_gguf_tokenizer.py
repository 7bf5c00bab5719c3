"""Vocabularies in the metadata of GGUF: what a reader is told, and what has no place there."""

import json

import numpy as np
import pytest

from effjax.errors import CheckpointError
from effjax.io.formats.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from effjax.models.config import DecoderConfig
from effjax.models.embedded import load_default

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def config(size: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )


def split(pattern: str) -> dict:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }


def byte_level(**changes) -> dict:
    whole = {
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}, {"id": 4, "content": "tool", "special": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "byte_fallback": False},
    }
    return whole | changes


def sentence_piece() -> dict:
    vocab = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "ab": 7, "▁ab": 8}
    model = {"type": "BPE", "vocab": vocab, "byte_fallback": True, "unk_token": "<unk>"}
    return {
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True}],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "model": model | {"merges": ["a b", "▁ ab", "▁ a", "▁a b"]},
    }


def test_byte_level():
    found = tokenizer_metadata(json.dumps(byte_level()), config(7))
    whole = found.pop("tokenizer.huggingface.json")
    assert json.loads(whole) == byte_level()
    types = found.pop("tokenizer.ggml.token_type")
    assert types.dtype == np.int32
    assert types.tolist() == [NORMAL, NORMAL, NORMAL, CONTROL, USER_DEFINED, UNUSED, UNUSED]
    assert found == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "tool", "[PAD5]", "[PAD6]"],
    }


@pytest.mark.parametrize("pattern, name", [(LLAMA3, "llama-bpe"), (QWEN2, "qwen2")])
def test_patterns_with_a_name(pattern, name):
    whole = byte_level(pre_tokenizer=split(pattern), normalizer={"type": "NFC"})
    assert tokenizer_metadata(json.dumps(whole), config(5))["tokenizer.ggml.pre"] == name


def test_sentence_piece():
    """The earliest merge that makes a piece decides its score; what no merge makes scores lowest."""
    found = tokenizer_metadata(json.dumps(sentence_piece()), config(10))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.unknown_token_id"]) == ("llama", 0)
    assert found["tokenizer.ggml.add_space_prefix"] is True and "tokenizer.ggml.merges" not in found
    types = found["tokenizer.ggml.token_type"].tolist()
    assert types == [UNKNOWN, CONTROL, BYTE, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL, UNUSED]
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"].tolist(), strict=True))
    assert scores["ab"] == 0 and scores["▁ab"] == -1 and scores["▁a"] == -2
    assert scores["a"] == scores["▁"] == -3 and scores["<0x0A>"] == 0
    assert found["tokenizer.ggml.scores"].dtype == np.float32


def test_unigram():
    whole = {
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁a", -1.5], ["b", -2.0]]},
    }
    found = tokenizer_metadata(json.dumps(whole), config(3))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.unknown_token_id"]) == ("t5", 0)
    assert found["tokenizer.ggml.scores"].tolist() == [0.0, -1.5, -2.0]
    assert found["tokenizer.ggml.token_type"].tolist() == [UNKNOWN, NORMAL, NORMAL]
    assert found["tokenizer.ggml.add_space_prefix"] is False


def test_without_a_tokenizer():
    assert tokenizer_metadata(None, config(3)) == {"tokenizer.ggml.model": "none"}
    assert read_tokenizer({"tokenizer.ggml.model": "none"}, "x.gguf") is None


def test_the_whole_tokenizer_comes_back():
    tokenizer = load_default().tokenizer
    found = read_tokenizer(tokenizer_metadata(tokenizer.to_str(), config(2048)), "x.gguf")
    text = "for i in range(10):\n    print('naïve', i)"
    assert found.encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    "text, size, message",
    [
        ("{", 5, "tokenizer.json is damaged .JSONDecodeError"),
        ("[]", 5, "tokenizer.json is damaged .TypeError"),
        ("{}", 5, "tokenizer.json is damaged .KeyError: 'model'"),
        (json.dumps(byte_level(model={"type": "BPE", "vocab": {}, "merges": [["a"]]})), 5, "is damaged .ValueError"),
        (json.dumps(byte_level(model={"type": "WordPiece", "vocab": {}})), 5, "model WordPiece has no place in GGUF"),
        (json.dumps(byte_level(pre_tokenizer=split(r"\w+"))), 5, "how it cuts text before BPE has no name in GGUF"),
        (json.dumps(byte_level(pre_tokenizer={"type": "Whitespace"})), 5, "how it cuts text before BPE has no name"),
        (json.dumps(byte_level(normalizer={"type": "Lowercase"})), 5, "how it cuts text before BPE has no name"),
        (json.dumps(byte_level()), 4, "makes token 4, but vocab_size is 4; take the one that belongs to this model"),
    ],
)
def test_refused(text, size, message):
    with pytest.raises(CheckpointError, match=message):
        tokenizer_metadata(text, config(size))


def test_damaged_tokenizer_in_a_file():
    with pytest.raises(
        CheckpointError, match="x.gguf: tokenizer.huggingface.json is damaged .*; convert the model anew"
    ):
        read_tokenizer({"tokenizer.huggingface.json": "{}"}, "x.gguf")
    with pytest.raises(CheckpointError, match="x.gguf: tokenizer.huggingface.json is damaged"):
        read_tokenizer({"tokenizer.huggingface.json": 3}, "x.gguf")
