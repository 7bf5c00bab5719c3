"""Oracles and damages for the tests of formats: streams bit by bit, and mutations of the tensors of one weight."""

import ml_dtypes
import numpy as np
from hypothesis import strategies as st


def stream_words(codes, bits):
    """Unsigned 32-bit words of one column of codes: bit t of the stream is bit t % 32 of word t // 32."""
    words = [0] * -(-len(codes) * bits // 32)
    for i, code in enumerate(codes):
        for j in range(bits):
            t = i * bits + j
            words[t // 32] |= (int(code) >> j & 1) << t % 32
    return words


def int32(words):
    """Unsigned words as the two's complement int32 that files hold."""
    return np.array(words, np.uint64).astype(np.uint32).view(np.int32)


def hexes(words):
    return [f"{int(word) & 0xFFFFFFFF:08X}" for word in np.ravel(words)]


def fields_are_sound(leaf, shape):
    """A leaf that a reader let pass: its fields make up `shape` and its floats are finite."""
    import jax

    assert jax.eval_shape(lambda x: x.materialize(), leaf).shape == shape
    for x in jax.tree.leaves(leaf):
        if x.dtype.kind not in "iu":
            assert np.isfinite(np.asarray(x).astype(np.float32)).all()
    return True


DTYPES = (np.int32, np.int64, np.uint8, np.int8, np.float16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)


@st.composite
def damaged(draw, tensors):
    """`tensors` with one to three of them dropped, renamed, cast, cut, widened, turned, emptied or with other bytes."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        x = tensors.pop(name)
        how = draw(st.sampled_from(["drop", "rename", "cast", "cut", "double", "turn", "flatten", "bytes", "bytes"]))
        if how == "drop":
            if not tensors:
                tensors[name] = x
            continue
        if how == "rename":
            name = draw(st.sampled_from(["../evil", "weight", "g_idx", "weight_zero_point", name + "2"]))
        elif how == "cast":
            with np.errstate(invalid="ignore", over="ignore"):
                x = x.astype(draw(st.sampled_from(DTYPES)))
        elif how == "cut":
            x = x[: draw(st.integers(0, max(0, len(x) - 1)))] if x.ndim else x
        elif how == "double":
            x = np.concatenate([x, x], axis=draw(st.integers(0, x.ndim - 1))) if x.ndim else x
        elif how == "turn":
            x = np.ascontiguousarray(x.T)
        elif how == "flatten":
            x = x.reshape(draw(st.sampled_from([(-1,), (1, -1), (-1, 1)])))
        elif x.size:
            raw = bytearray(np.ascontiguousarray(x).tobytes())
            for _ in range(draw(st.integers(1, 4))):
                raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
            x = np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)
        tensors[name] = x
    return tensors
