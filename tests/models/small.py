"""A decoder small enough to compile in a moment, with shared key heads; its layers are written out."""

from effjax.models.config import DecoderConfig

SMALL = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
