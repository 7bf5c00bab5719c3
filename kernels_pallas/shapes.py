"""The matrices that the projections of real decoders multiply by: tests, tuning and benchmarks share these names."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """The widths of a decoder's layer.

    Attributes:
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        heads, kv_heads: attention heads, and those that keys and values have.
        head_dim: width of a head.
        vocabulary: tokens, the outputs of the head.
        layers: how many.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    layers: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """`(in, out)` of the products of a layer, those of equal input fused or not as checkpoints have them."""
        attention, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, attention),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (attention, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


MODELS = {
    "Llama-3.1-8B": Decoder(
        hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=128256, layers=32
    ),
    "Llama-3.1-70B": Decoder(
        hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocabulary=128256, layers=80
    ),
    "Qwen3-0.6B": Decoder(
        hidden=1024, intermediate=3072, heads=16, kv_heads=8, head_dim=128, vocabulary=151936, layers=28
    ),
    "TinyLlama-1.1B": Decoder(
        hidden=2048, intermediate=5632, heads=32, kv_heads=4, head_dim=64, vocabulary=32000, layers=22
    ),
}

DECODE_ROWS = (1, 4, 16)  # sequences that decode together
PREFILL_ROWS = (256, 2048)  # tokens of a prompt


def shape(model: str, projection: str) -> tuple[int, int]:
    """`(in, out)` of a model's projection.

    Raises:
        KeyError: no such model or projection, with the names that there are.

    Example:
        >>> shape("Llama-3.1-8B", "down_proj")
        (14336, 4096)
    """
    if model not in MODELS:
        raise KeyError(f"no model {model!r}; there are {', '.join(MODELS)}")
    projections = MODELS[model].projections
    if projection not in projections:
        raise KeyError(f"no projection {projection!r}; there are {', '.join(projections)}")
    return projections[projection]


def unique_shapes(model: str) -> dict[tuple[int, int], list[str]]:
    """The different matrices of a layer, with the projections that have each.

    Example:
        >>> unique_shapes("Qwen3-0.6B")[(1024, 3072)]
        ['gate_proj', 'up_proj']
    """
    names: dict[tuple[int, int], list[str]] = {}
    for name, matrix in MODELS[model].projections.items():
        names.setdefault(matrix, []).append(name)
    return names
