"""The integer hash in Python's integers: it knows nothing of jax."""


def mix(x: int) -> int:
    """Murmur3's finaliser, masked to 32 bits."""
    mask = 0xFFFFFFFF
    x = int(x) & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)
