"""What each operation does to the labels of axes; an operation without a rule pins what it meets."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effjax.prune.coupling import Coupling, Factor, Value, along, dims_of, fixed, is_fixed

Rule = Callable[[Coupling, Any, list[Value], str], list[Value]]

# Entry by entry. Of the first, a result is 0 where the (first) operand is; of the others nothing is known.
_ZERO_AT_ZERO = (
    "neg sign abs sqrt cbrt square tanh sin tan asin atan sinh asinh atanh erf expm1 log1p floor ceil round real imag "
    "convert_element_type reduce_precision integer_pow"
).split()
_ELEMENTWISE = (
    "exp exp2 log logistic cos cosh acos acosh rsqrt erfc erf_inv lgamma digamma not is_finite max min pow rem atan2 "
    "nextafter and or xor eq ne lt le gt ge select_n clamp shift_left shift_right_logical shift_right_arithmetic "
    "population_count clz complex conj add_any"
).split()
_REDUCE = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
_CUMULATIVE = "cumsum cumprod cummax cummin cumlogsumexp".split()


def shapes_of(eqn: Any) -> list[tuple[int, ...]]:
    return [tuple(v.aval.shape) for v in eqn.outvars]


def unknown(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    for value in inputs:
        for factor in value.factors:
            c.pin(factor, f"{why} has no rule")
    data = any(v.from_data for v in inputs)
    return [Value(shape, fixed(shape), data) for shape in shapes_of(eqn)]


def elementwise(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    """Operands of one shape, or scalars."""
    (shape,) = shapes_of(eqn)
    arrays = [v for v in inputs if v.shape]
    factors = c.meet([f for v in arrays for f in v.factors], f"{why} meets an axis of fixed size")
    zero = _zero_dims(eqn.primitive.name, eqn.params, inputs)
    covered = set().union(*map(_labelled, inputs))
    return [Value(shape, factors, any(v.from_data for v in inputs), bool(covered) and covered <= zero)]


def _labelled(value: Value) -> set[int]:
    """Dimensions along which something might be cut."""
    return {d for f in value.factors if not is_fixed(f) for d in dims_of(f)}


def _zero_dims(name: str, params: Any, inputs: list[Value]) -> set[int]:
    """Dimensions along which the result is 0 at masked labels."""
    zero = [_labelled(v) if v.vanishes else set() for v in inputs]
    if name == "mul":
        return set().union(*zero)
    if name in ("add", "sub", "add_any"):
        return set.intersection(*zero)
    return zero[0] if name == "div" or (name in _ZERO_AT_ZERO and params.get("y", 1) > 0) else set()


def passed(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    """Every output is the input at its place."""
    return inputs


def reduce(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    """Sums, maxima and so on of activations depend on how many there are: a mean, a norm, a softmax."""
    axes = eqn.params["axes"]
    (value,) = inputs
    factors = c.contract(value.factors, axes, f"{why} runs along them, as a norm or a mean does")
    kept = [d for d in range(len(value.shape)) if d not in axes]
    return [_project(value, factors, kept, _sizes(value, kept))]


def _project(value: Value, factors: Sequence[Factor], dims: Sequence[int], shape: Sequence[int]) -> Value:
    """A value of other dimensions: `dims` of those before, in this order; of all others, no factor says anything."""
    others = tuple(d for d in range(len(value.shape)) if d not in dims)
    found = [f.transpose(*dims, *others).reshape(tuple(f.shape[d] for d in dims)) for f in factors]
    return value.with_factors(found, shape)


def cumulative(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    return [c.fix(inputs[0], [eqn.params["axis"]], f"{why} runs along them")]


def transpose(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    return [_project(inputs[0], inputs[0].factors, eqn.params["permutation"], shapes_of(eqn)[0])]


def reshape(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    return [c.reshape(inputs[0], shapes_of(eqn)[0], why)]


def broadcast_in_dim(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    (value, *_), (shape,) = inputs, shapes_of(eqn)
    to = eqn.params["broadcast_dimensions"]

    def placed(factor: Factor) -> Factor:
        sizes = [1] * len(shape)
        for d, size in zip(to, factor.shape, strict=True):
            sizes[d] = size
        return factor.reshape(sizes)

    return [value.with_factors(map(placed, value.factors), shape)]


def reverse(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    return [inputs[0].with_factors(np.flip(f, eqn.params["dimensions"]) for f in inputs[0].factors)]


def iota(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    (shape,) = shapes_of(eqn)
    return [Value(shape, fixed(shape, [eqn.params["dimension"]]))]


def dot_general(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    """Dimensions of both operands side by side, multiplied entry by entry, then summed over those contracted."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = eqn.params["dimension_numbers"]
    lhs, rhs = inputs
    lhs_free = [d for d in range(len(lhs.shape)) if d not in (*lhs_contract, *lhs_batch)]
    rhs_free = [d for d in range(len(rhs.shape)) if d not in (*rhs_contract, *rhs_batch)]
    shared = [lhs.shape[d] for d in (*lhs_batch, *lhs_contract)]
    shape = (*shared, *(lhs.shape[d] for d in lhs_free), *(rhs.shape[d] for d in rhs_free))
    first, last = len(lhs_batch), len(shared)
    left = [_joint(f, [*lhs_batch, *lhs_contract, *lhs_free], len(lhs.shape), len(rhs_free)) for f in lhs.factors]
    right = [_joint(f, [*rhs_batch, *rhs_contract, *rhs_free], last, len(lhs_free)) for f in rhs.factors]
    factors = _multiply(c, lhs, rhs, [*left, *right], range(first, last), 2 * math.prod(shape), why)
    joint = Value(shape, (), lhs.from_data or rhs.from_data, _product_vanishes(lhs, rhs, lhs_free, rhs_free))
    kept = [d for d in range(len(shape)) if not first <= d < last]
    return [_project(joint, factors, kept, shapes_of(eqn)[0])]


def _product_vanishes(lhs: Value, rhs: Value, lhs_free: Sequence[int], rhs_free: Sequence[int]) -> bool:
    """Whether each operand that has labels of its own in the result is 0 where they are masked."""
    own = [bool(_labelled(v) & set(free)) for v, free in ((lhs, lhs_free), (rhs, rhs_free))]
    return any(own) and (lhs.vanishes or not own[0]) and (rhs.vanishes or not own[1])


def _joint(factor: Factor, order: Sequence[int], at: int, others: int) -> Factor:
    """A factor of an operand over the dimensions of both: after its first `at`, in this order, come `others` more."""
    sizes = [factor.shape[d] for d in order]
    return factor.transpose(order).reshape(*sizes[:at], *(1,) * others, *sizes[at:])


def _multiply(
    c: Coupling, lhs: Value, rhs: Value, factors: list[Factor], contract: Sequence[int], work: int, why: str
) -> tuple[Factor, ...]:
    """Factors of a product after its sums."""
    met = c.meet(factors, f"{why} meets an axis of fixed size")
    c.work.append((work, met))
    reason = None
    if lhs.from_data and rhs.from_data:
        reason = f"{why} multiplies activations along them, whose scale may depend on their number"
    elif not (lhs.vanishes or rhs.vanishes):
        reason = f"{why} sums over them, and masked weights do not make 0 there"
    return c.contract(met, contract, reason)


def convolution(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    p, (shape,) = eqn.params, shapes_of(eqn)
    numbers, groups = p["dimension_numbers"], p["feature_group_count"]
    lhs, rhs = inputs
    depthwise = groups > 1 and groups == lhs.shape[numbers.lhs_spec[1]]
    if p["batch_group_count"] != 1 or (groups != 1 and not depthwise):
        return unknown(c, eqn, inputs, f"{why} with feature groups")
    batch, channels = (lhs.shape[d] for d in numbers.lhs_spec[:2])
    outputs, taps = rhs.shape[numbers.rhs_spec[0]], math.prod(rhs.shape[d] for d in numbers.rhs_spec[1:])
    lhs = c.fix(lhs, [numbers.lhs_spec[0], *numbers.lhs_spec[2:]], f"{why}: a spatial axis")
    rhs = c.fix(rhs, numbers.rhs_spec[2:], f"{why}: a spatial axis of the kernel")
    lhs, rhs = _restricted(lhs, numbers.lhs_spec[:2]), _restricted(rhs, numbers.rhs_spec[:2])
    work = 2 * math.prod(shape) * taps
    left = [f[:, :, None] for f in lhs.factors]
    if depthwise:  # outputs are the channels, each with its multiples
        rhs = c.reshape(rhs, (channels, outputs // channels), why)
        factors = _multiply(c, lhs, rhs, [*left, *(f[None] for f in rhs.factors)], (), work, why)
        joint = c.reshape(Value((batch, channels, outputs // channels), factors), (batch, outputs), why)
    else:
        right = [f.T[None] for f in rhs.factors]
        factors = _multiply(c, lhs, rhs, [*left, *right], [1], work, why)
        joint = _project(Value((batch, channels, outputs)), factors, (0, 2), (batch, outputs))
    to = numbers.out_spec
    placed = [along(f.ravel(), to[dims_of(f)[0]], len(shape)) for f in joint.factors]
    data = lhs.from_data or rhs.from_data
    return [Value(shape, (*placed, *fixed(shape, to[2:])), data, rhs.vanishes)]


def _restricted(value: Value, dims: Sequence[int]) -> Value:
    """A value over `dims` alone, in this order; no factor is over those and others."""
    return _project(value, [f for f in value.factors if set(dims_of(f)) <= set(dims)], dims, _sizes(value, dims))


def _sizes(value: Value, dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(value.shape[d] for d in dims)


def reduce_window(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    """Pooling: dimensions in which the window is 1 stay as they are."""
    p, (shape,) = eqn.params, shapes_of(eqn)
    value = inputs[0]
    moved = [d for d in range(len(shape)) if p["window_dimensions"][d] != 1 or value.shape[d] != shape[d]]
    value = c.fix(value, moved, f"{why} runs along them")
    kept = [f for f in value.factors if not set(dims_of(f)) <= set(moved)]
    return [Value(shape, (*kept, *fixed(shape, moved)), value.from_data)]


def pad(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    """What is put around an axis stays."""
    (value, _), config, (shape,) = inputs, eqn.params["padding_config"], shapes_of(eqn)
    inside = [d for d, (low, high, between) in enumerate(config) if between or low < 0 or high < 0]
    value = c.fix(value, inside, f"{why} fills between entries")

    def padded(factor: Factor) -> Factor:
        around = [(low, high) if factor.shape[d] > 1 else (0, 0) for d, (low, high, _) in enumerate(config)]
        return np.pad(factor, around)

    changed = [d for d, (low, high, between) in enumerate(config) if low or high or between]
    factors = []
    for factor in value.factors:
        touched = [d for d in dims_of(factor) if d in changed]
        if len(dims_of(factor)) > 1 and touched:  # parts of blocks
            factors.append(c.whole(factor, touched, f"{why} of a part of a block"))
        elif set(touched) <= set(inside) and touched:
            continue
        else:
            factors.append(padded(factor))
    covered = {d for f in factors for d in dims_of(f)}
    return [Value(shape, (*factors, *fixed(shape, [d for d in changed if d not in covered])), value.from_data)]


def concatenate(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    dim, (shape,) = eqn.params["dimension"], shapes_of(eqn)
    pieces, others = [], []
    for value in inputs:
        labels = np.zeros(value.shape[dim], np.int64)
        for factor in value.factors:
            if dims_of(factor) == (dim,):
                labels = factor.ravel()
            else:
                others.append(c.whole(factor, set(dims_of(factor)) & {dim}, f"{why} of parts of blocks"))
        pieces.append(labels)
    factors = c.meet(others, f"{why} meets an axis of fixed size")
    data, vanishes = any(v.from_data for v in inputs), all(v.vanishes for v in inputs)
    return [Value(shape, (*factors, along(np.concatenate(pieces), dim, len(shape))), data, vanishes)]


def merged(c: Coupling, values: Sequence[Value], why: str) -> Value:
    """A value that may be any of these."""
    factors = c.meet([f for v in values for f in v.factors], f"{why} meets an axis of fixed size")
    return Value(
        values[0].shape,
        factors,
        any(v.from_data for v in values),
        all(v.vanishes for v in values) and len({frozenset(_labelled(v)) for v in values}) == 1,
    )


def stack(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    (shape,), axis = shapes_of(eqn), eqn.params["axis"]
    both = merged(c, inputs, why)
    factors = [np.expand_dims(f, axis) for f in both.factors]
    return [Value(shape, (*factors, *fixed(shape, [axis])), both.from_data, both.vanishes)]


def unstack(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    (value,), axis = inputs, eqn.params["axis"]
    pieces = [_piece(c, value, axis, i, i + 1, 1, why) for i in range(value.shape[axis])]
    return [
        piece.with_factors([f.squeeze(axis) for f in piece.factors], shape)
        for piece, shape in zip(pieces, shapes_of(eqn), strict=True)
    ]


def _piece(c: Coupling, value: Value, dim: int, start: int, stop: int, stride: int, why: str) -> Value:
    """Entries of one dimension."""
    size = value.shape[dim]
    if (start, stop, stride) == (0, size, 1):
        return value
    if stride != 1:
        value = c.fix(value, [dim], f"{why} takes every {stride}th entry")
    factors = []
    for factor in value.factors:
        if factor.shape[dim] > 1:
            if not is_fixed(factor):
                c.pieces.append((factor, dim, start, stop, f"{why} takes a piece at a fixed place"))
            factor = factor[tuple(slice(start, stop, stride) if d == dim else slice(None) for d in range(factor.ndim))]
            if factor.shape[dim] == 1:  # one entry, without which the array would be empty
                if not dims_of(factor):
                    c.pin(factor, f"{why} takes one entry")
        factors.append(factor)
    shape = list(value.shape)
    shape[dim] = len(range(start, stop, stride))
    return value.with_factors([f for f in factors if dims_of(f)], shape)


def slice_(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    p, (value,) = eqn.params, inputs
    strides = p["strides"] or (1,) * len(value.shape)
    for dim, cut in enumerate(zip(p["start_indices"], p["limit_indices"], strides, strict=True)):
        value = _piece(c, value, dim, *cut, why)
    return [value]


def split(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    ends = np.cumsum([0, *eqn.params["sizes"]]).tolist()
    spans = zip(ends, ends[1:], strict=False)
    return [_piece(c, inputs[0], eqn.params["axis"], start, stop, 1, why) for start, stop in spans]


def dynamic_slice(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    (value, *_), (shape,) = inputs, shapes_of(eqn)
    moved = [d for d in range(len(shape)) if shape[d] != value.shape[d]]
    value = c.fix(value, moved, f"{why} moves along them")
    kept = [f for f in value.factors if not set(dims_of(f)) & set(moved)]
    return [value.with_factors((*kept, *fixed(shape, moved)), shape)]


def gather(c: Coupling, eqn: Any, inputs: list[Value], why: str) -> list[Value]:
    """Whole slices of an array are looked up, as rows of an embedding: dimensions taken in full stay as they are."""
    (value, indices), (shape,), p = inputs, shapes_of(eqn), eqn.params
    numbers = p["dimension_numbers"]
    if numbers.operand_batching_dims:
        return unknown(c, eqn, inputs, why)
    partial = [d for d, size in enumerate(p["slice_sizes"]) if size != value.shape[d]]
    value = c.fix(value, partial, f"{why} looks up entries")
    offsets = [d for d in range(len(value.shape)) if d not in numbers.collapsed_slice_dims]
    to = dict(zip(offsets, numbers.offset_dims, strict=True))
    factors, covered = [], set()
    for factor in value.factors:
        dims = dims_of(factor)
        if set(dims) & set(partial) or not set(dims) <= set(to):
            continue
        sizes = [1] * len(shape)
        for d in dims:
            sizes[to[d]] = factor.shape[d]
        factors.append(
            factor.transpose(
                [*(d for d in range(factor.ndim) if d not in to), *sorted(to, key=to.__getitem__)]
            ).reshape(sizes)
        )
        covered |= {to[d] for d in dims}
    free = {to[d] for d in offsets if d not in partial}
    rest = [d for d in range(len(shape)) if d not in covered | free]
    data = value.from_data or indices.from_data
    return [Value(shape, (*factors, *fixed(shape, rest)), data, value.vanishes)]


RULES: dict[str, Rule] = {
    **dict.fromkeys((*_ZERO_AT_ZERO, *_ELEMENTWISE, "mul", "add", "sub", "div"), elementwise),
    **dict.fromkeys(_REDUCE, reduce),
    **dict.fromkeys(_CUMULATIVE, cumulative),
    **dict.fromkeys(
        "copy copy_p name pvary stop_gradient optimization_barrier device_put sharding_constraint reshard".split(),
        passed,
    ),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), reshape),
    "reduce_window_sum": reduce_window,
    "reduce_window_max": reduce_window,
    "reduce_window_min": reduce_window,
    "transpose": transpose,
    "broadcast_in_dim": broadcast_in_dim,
    "rev": reverse,
    "iota": iota,
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "pad": pad,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "slice": slice_,
    "split": split,
    "dynamic_slice": dynamic_slice,
    "gather": gather,
}
