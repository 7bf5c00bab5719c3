"""Random compressed matrices and what they are in float64, read bit by bit without the library's own unpacking."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from effjax.arrays import Codebook, Hashed, NMSparse, Quantized
from effjax.ops.neurons import make_neurons

MASK = 0xFFFFFFFF


def stream(packed, bits, count):
    """The codes of every column: bit `i * bits + b` of the stream is bit b of code i."""
    every_bit = np.unpackbits(np.asarray(packed), axis=0, bitorder="little")
    used = every_bit[: count * bits].reshape(count, bits, -1).astype(np.int64)
    return (used << np.arange(bits)[None, :, None]).sum(1)


def quantized(n, out, *, bits, group=None, zeros="symmetric", seed=0, scale_dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    groups = 1 if group is None else n // group
    points = {
        "symmetric": lambda: None,
        "packed": lambda: jnp.asarray(rng.integers(0, 2**bits, (groups, out)), jnp.uint8),
        "real": lambda: jnp.asarray(rng.uniform(0, 2**bits, (groups, out)), jnp.float32),
    }
    return Quantized.from_codes(
        jnp.asarray(rng.integers(0, 2**bits, (n, out)), jnp.uint8),
        jnp.asarray(rng.uniform(0.5, 1.5, (groups, out)), scale_dtype),
        points[zeros](),
        bits=bits,
        dtype=jnp.float32,
    )


def codebook(n, out, *, entries, tables=(1, 1), scales=None, global_scale=None, seed=0, scale_dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return Codebook.from_codes(
        jnp.asarray(rng.integers(0, entries, (n, out)), jnp.uint8),
        jnp.asarray(rng.standard_normal((*tables, entries)), jnp.float32),
        None if scales is None else jnp.asarray(rng.uniform(0.5, 1.5, (scales, out)), scale_dtype),
        dtype=jnp.float32,
        global_scale=None if global_scale is None else jnp.full((1, 1), global_scale, jnp.float32),
    )


def nm_sparse(rows, out, *, n, m, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    rank = np.argsort(np.argsort(rng.standard_normal((rows // m, m, out)), axis=1), axis=1)
    dense = jnp.asarray(rng.standard_normal((rows, out)), dtype)
    return NMSparse.from_dense(dense, jnp.asarray((rank < n).reshape(rows, out)), n=n, m=m)


def hashed(n, out, *, slots, block=1, seed=0):
    table = np.random.default_rng(seed).standard_normal(slots)
    return Hashed(
        table=jnp.asarray(table, jnp.float32),
        seed=jnp.uint32(0xDEADBEEF),
        in_features=n,
        out_features=out,
        block=block,
    )


def mlp_neurons(d, n, out, dtype, gated, *, activation=None, shift=0.0, biased=True, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    return make_neurons(
        draw(d, n),
        draw(n, out),
        gate=draw(d, n) if gated else None,
        up_bias=jnp.asarray(rng.normal(size=n), jnp.float32) if biased else None,
        gate_bias=jnp.asarray(rng.normal(size=n), jnp.float32) if biased and gated else None,
        down_bias=jnp.asarray(rng.normal(size=out), jnp.float32) if biased else None,
        activation=activation or ("silu" if gated else "relu"),
        shift=shift,
    )


def some_neurons(x, neurons, chosen, count, block=1):
    """The output of some blocks of neurons, one neuron after the other, in float64."""
    act = {
        "relu": lambda z: np.maximum(z, 0),
        "silu": lambda z: z / (1 + np.exp(-z)),
        "gelu": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    }[neurons.activation]
    x, y = wide(x), np.zeros((len(x), neurons.down.shape[1]))
    for number in list(chosen)[:count]:
        for j in range(number * block, (number + 1) * block):
            if not 0 <= j < neurons.count:
                continue
            z = x @ wide(neurons.up[j]) + (0 if neurons.up_bias is None else float(neurons.up_bias[j]))
            gate = z
            if neurons.gate is not None:
                gate = x @ wide(neurons.gate[j]) + (0 if neurons.gate_bias is None else float(neurons.gate_bias[j]))
            h = act(gate - neurons.shift) * (1 if neurons.gate is None else z)
            y += h[:, None] * wide(neurons.down[j])
    return y if neurons.down_bias is None else y + wide(neurons.down_bias)


def wide(x):
    return np.asarray(x).astype(np.float64)


def dense(w):
    """The matrix in float64."""
    return {Quantized: _quantized, Codebook: _codebook, NMSparse: _nm_sparse, Hashed: _hashed}[type(w)](w)


def _quantized(w):
    n, out = w.shape
    groups = w.scales.shape[0]
    codes = stream(w.codes, w.bits, n)
    if w.zeros is None:
        zeros = np.full((groups, out), 0.5 if w.bits == 1 else 2 ** (w.bits - 1), np.float64)
    elif np.asarray(w.zeros).dtype.kind == "f":
        zeros = wide(w.zeros)
    else:
        zeros = stream(w.zeros, w.bits, groups)
    spread = np.arange(n) // (n // groups)
    return wide(w.scales)[spread] * (codes - zeros[spread])


def _codebook(w):
    n, out = w.shape
    in_groups, out_groups, _ = w.tables.shape
    row, column = np.meshgrid(np.arange(n), np.arange(out), indexing="ij")
    values = wide(w.tables)[row // (n // in_groups), column // (out // out_groups), stream(w.codes, w.bits, n)]
    if w.scales is not None:
        values = values * wide(w.scales)[row // (n // w.scales.shape[0]), column]
    return values if w.global_scale is None else values / float(w.global_scale[0, 0])


def _nm_sparse(w):
    n, out = w.shape
    result = np.zeros((n, out))
    kept = w.values.shape[0]
    positions = stream(w.indices, (w.m - 1).bit_length(), kept)
    group = np.arange(kept) // w.n
    np.add.at(result, (group[:, None] * w.m + positions, np.arange(out)[None]), wide(w.values))
    return result


def _mix(x):
    x &= MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)


def _hashed(w):
    """Entry by entry in Python's integers, from the definition of the hash."""
    table, seed = wide(w.table), int(w.seed)
    result = np.zeros(w.shape)
    for row in range(w.shape[0]):
        row_hash = _mix(row * 0x9E3779B1 + seed)
        for column in range(w.shape[1]):
            run, offset = divmod(column, w.block)
            slot = (_mix(row_hash ^ (run * 0x85157AF5 & MASK)) + offset & MASK) % len(table)
            sign = _mix(row_hash + column * 0xC2B2AE3D + 0x27D4EB2F) >> 31
            result[row, column] = -table[slot] if sign else table[slot]
    return result


def assert_product(kernel, w, *, rows, dtype, transpose=False, tolerance=None, seed=1, **options):
    """The kernel in the simulator of a TPU against the product in float64, relative to the largest result.

    Weights are rounded to bfloat16 with bfloat16 activations (an ulp is 2**-8), sums are in float32.
    """
    n, out = w.shape
    x = np.random.default_rng(seed).standard_normal((rows, out if transpose else n))
    x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    expected = x.astype(np.float64) @ (dense(w).T if transpose else dense(w))
    actual = kernel(jnp.asarray(x), w, transpose=transpose, interpret=True, **options)
    assert actual.dtype == jnp.float32 and actual.shape == expected.shape
    tolerance = (4e-3 if dtype == "bfloat16" else 5e-6) if tolerance is None else tolerance
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"off by {error:.2e} of the largest result"
