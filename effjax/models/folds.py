"""Which layers of the decoder make the inputs of which others: where factors of inputs can be folded."""

from effjax.models.config import DecoderConfig

Fold = tuple[str, tuple[str, ...]]


def decoder_folds(config: DecoderConfig) -> list[Fold]:
    """The pairs `(producer, consumers)` of `Decoder` for `effjax.quantize.fold_scales`.

    A value projection makes the inputs of the output projection only where every query head has its own values; with
    grouped-query attention `o_proj` is left out.

    Example:
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> for producer, consumers in decoder_folds(config):
        ...     print(producer, len(consumers))
        */attention_norm/scale 3
        */attention/v_proj/kernel 1
        */mlp_norm/scale 2
        */mlp/up_proj/kernel 1
    """
    folds: list[Fold] = [
        ("*/attention_norm/scale", tuple(f"*/attention/{name}_proj/kernel" for name in ("q", "k", "v"))),
        ("*/attention/v_proj/kernel", ("*/attention/o_proj/kernel",)),
        ("*/mlp_norm/scale", ("*/mlp/gate_proj/kernel", "*/mlp/up_proj/kernel")),
        ("*/mlp/up_proj/kernel", ("*/mlp/down_proj/kernel",)),
    ]
    if config.is_opt:
        folds = [(producer, tuple(c for c in consumers if "gate_proj" not in c)) for producer, consumers in folds]
        if config.relu_shift:  # factors pass a ReLU, but not a shifted one
            folds = folds[:-1]
    grouped = config.num_key_value_heads != config.num_attention_heads
    return [fold for fold in folds if not (grouped and fold[0] == "*/attention/v_proj/kernel")]
