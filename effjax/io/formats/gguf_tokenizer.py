"""The vocabulary of a tokenizer.json as the `tokenizer.ggml.*` metadata of GGUF, and the tokenizer back from a file.

Three kinds have a place there: byte-level BPE (`gpt2`), BPE with byte fallback as of SentencePiece (`llama`) and
Unigram (`t5`). How text is cut before BPE is a name in GGUF that readers know the pattern of; a pattern without a name
is refused, since a reader would cut otherwise without a word. The whole tokenizer.json goes along under
`tokenizer.huggingface.json`, from which it is read back.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from effjax.errors import CheckpointError
from effjax.models.config import DecoderConfig

_WHOLE = "tokenizer.huggingface.json"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    _LETTERS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"\p{N}" + _REST: "qwen2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
}
_NO_PLACE = "write the model without it (tokenizer_json=None) and keep the tokenizer.json beside the file"


def tokenizer_metadata(tokenizer_json: str | None, config: DecoderConfig) -> dict[str, Any]:
    """Entries that a reader builds the tokenizer from; without one the entry that says there is none.

    Args:
        tokenizer_json: the text of tokenizer.json, or None.
        config: of the model: its `vocab_size` rows are all named, unused ones `[PAD…]`.

    Raises:
        CheckpointError: a damaged tokenizer, one of a kind that GGUF has no place for, or one with more tokens than the
            model has embeddings.
    """
    if tokenizer_json is None:
        return {"tokenizer.ggml.model": "none"}
    try:
        whole = json.loads(tokenizer_json)
        model = whole["model"]
        kind, vocab = model["type"], model["vocab"]
        if kind == "BPE" and not model.get("byte_fallback"):
            entries = _bpe(whole)
        elif kind == "BPE":
            entries = _sentence_piece(whole)
        elif kind == "Unigram":
            entries = _unigram(whole)
        else:
            raise CheckpointError(f"tokenizer.json: model {kind} has no place in GGUF; {_NO_PLACE}")
        pieces = {i: piece for i, (piece, _) in enumerate(vocab)} if kind == "Unigram" else _by_id(vocab)
        tokens, types = _pieces(pieces, whole, config.vocab_size)
        if (unknown := _unknown(whole)) is not None:
            entries["unknown_token_id"] = tokens.index(unknown)
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"tokenizer.json is damaged ({type(error).__name__}: {error}); copy it again") from error
    scores = {}
    if (by_piece := entries.pop("scores", None)) is not None:
        scores = {"tokenizer.ggml.scores": np.array([by_piece.get(token, 0.0) for token in tokens], np.float32)}
    return (
        {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
        | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
        | scores
        | {_WHOLE: tokenizer_json}
    )


def read_tokenizer(metadata: Mapping[str, Any], source: str) -> Any:
    """The `tokenizers.Tokenizer` of a file that holds a whole tokenizer.json, or None.

    Raises:
        CheckpointError: it is damaged.
    """
    text = metadata.get(_WHOLE)
    if text is None:
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the reader raises plain Exception
        raise CheckpointError(f"{source}: {_WHOLE} is damaged ({error}); convert the model anew") from error


def _pieces(pieces: dict[int, str], whole: Mapping[str, Any], size: int) -> tuple[list[str], np.ndarray]:
    """All tokens by id, and their types."""
    unknown = _unknown(whole)
    types = {
        token: _BYTE if _is_byte(piece) else _UNKNOWN if piece == unknown else _NORMAL
        for token, piece in pieces.items()
    }
    for added in whole.get("added_tokens") or ():
        token = added["id"]
        pieces[token] = added["content"]
        if types.get(token) != _UNKNOWN:
            types[token] = _CONTROL if added.get("special") else _USER_DEFINED
    if pieces and max(pieces) >= size:
        raise CheckpointError(
            f"tokenizer.json makes token {max(pieces)}, but vocab_size is {size}; take the one that belongs to this "
            "model"
        )
    tokens = [pieces.get(token, f"[PAD{token}]") for token in range(size)]
    return tokens, np.array([types.get(token, _UNUSED) for token in range(size)], np.int32)


def _by_id(vocab: Mapping[str, int]) -> dict[int, str]:
    return {token: piece for piece, token in vocab.items()}


def _unknown(whole: Mapping[str, Any]) -> str | None:
    model = whole["model"]
    if model["type"] == "Unigram":
        return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _steps(whole: Mapping[str, Any], key: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, a sequence taken apart."""
    step = whole.get(key)
    if step is not None and step["type"] == "Sequence":
        yield from next(value for name, value in step.items() if name != "type")
    elif step is not None:
        yield step


def _merges(whole: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in whole["model"]["merges"]]
    return [(first, second) for first, second in pairs]


def _bpe(whole: Mapping[str, Any]) -> dict[str, Any]:
    steps = list(_steps(whole, "pre_tokenizer"))
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if not patterns and len(byte_level) == 1 and byte_level[0].get("use_regex", True):
        patterns = [next(pattern for pattern, name in _PATTERNS.items() if name == "gpt-2")]
    known = len(patterns) == 1 and len(byte_level) == 1 and len(steps) <= 2 and patterns[0] in _PATTERNS
    if not known or any(step["type"] != "NFC" for step in _steps(whole, "normalizer")):
        raise CheckpointError(
            f"tokenizer.json: how it cuts text before BPE has no name in GGUF that this writer knows; {_NO_PLACE}"
        )
    return {
        "model": "gpt2",
        "pre": _PATTERNS[patterns[0]],
        "merges": [f"{first} {second}" for first, second in _merges(whole)],
        "add_space_prefix": bool(byte_level[0].get("add_prefix_space", False)),
    }


def _sentence_piece(whole: Mapping[str, Any]) -> dict[str, Any]:
    # Readers join the pair whose result scores highest: the order of the merges, negated.
    scores: dict[str, float] = {}
    for rank, (first, second) in enumerate(_merges(whole)):
        scores.setdefault(first + second, -float(rank))
    worst = -float(len(scores))
    vocab = whole["model"]["vocab"]
    return {
        "model": "llama",
        "pre": "default",
        "scores": {piece: 0.0 if _is_byte(piece) else scores.get(piece, worst) for piece in vocab},
        "add_space_prefix": _prefixes_space(whole),
    }


def _unigram(whole: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model": "t5",
        "scores": {piece: float(score) for piece, score in whole["model"]["vocab"]},
        "add_space_prefix": _prefixes_space(whole),
    }


def _prefixes_space(whole: Mapping[str, Any]) -> bool:
    steps = [*_steps(whole, "normalizer"), *_steps(whole, "pre_tokenizer")]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
