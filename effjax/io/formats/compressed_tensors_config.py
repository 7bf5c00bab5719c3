"""The `quantization_config` of compressed-tensors: groups of modules with a scheme each; parsed and written."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from effjax.errors import ConfigError, LeafError

FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
SCALE_DTYPES = {"nvfp4-pack-quantized": "torch.float8_e4m3fn", "mxfp4-pack-quantized": "torch.uint8"}
# The keys an argument block may have; the peers' reader forbids others too.
_ARGUMENTS = frozenset(
    "num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype zp_dtype observer "
    "observer_kwargs".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTScheme:
    """How one weight is stored.

    Attributes:
        format: one of `FORMATS`.
        num_bits: 1 to 8 for integers, 8 or 4 for floats.
        symmetric: whether there are no zero points.
        strategy: "tensor", "channel" or "group" (a scale for so many weights), "block" (`float-quantized` only) or
            "tensor_group" (`nvfp4` only).
        group_size: inputs that share a scale, for "group" and "tensor_group".
        block: outputs and inputs that share a scale, for "block".
        padded_words: whether words hold whole codes only, as versions up to 0.12 packed; None where no version is
            named. Read only.

    Raises:
        ConfigError: a value that is none of these.
    """

    format: str = "pack-quantized"
    num_bits: int = 4
    symmetric: bool = True
    strategy: str = "group"
    group_size: int | None = 128
    block: tuple[int, int] | None = None
    padded_words: bool | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        where = "quantization_config: weights"
        if self.format not in FORMATS:
            raise ConfigError(f"{where}: format {self.format!r} is not read; {', '.join(FORMATS)} are")
        floating = self.format in FORMATS[2:]
        bits = {"float-quantized": (8,)}.get(self.format, (4,) if floating else tuple(range(1, 9)))
        if type(self.num_bits) is not int or self.num_bits not in bits:
            raise ConfigError(
                f"{where}: num_bits {self.num_bits!r} with {self.format}; {bits[0]} to {bits[-1]} are read"
            )
        if not isinstance(self.symmetric, bool) or (floating and not self.symmetric):
            raise ConfigError(f"{where}: symmetric {self.symmetric!r}; write true, or false for integers")
        strategies = {
            "float-quantized": ("tensor", "channel", "block"),
            "nvfp4-pack-quantized": ("tensor_group",),
            "mxfp4-pack-quantized": ("group",),
        }.get(self.format, ("tensor", "channel", "group"))
        if self.strategy not in strategies:
            raise ConfigError(f"{where}: strategy {self.strategy!r} is not read with {self.format}; {strategies} are")
        sizes = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
        if "group" in self.strategy:
            size = self.group_size
            if type(size) is not int or size < 1 or size != sizes.get(self.format, size):
                wanted = sizes.get(self.format, "a positive number")
                raise ConfigError(f"{where}: group_size {size!r} with {self.format}; write {wanted}")
        if self.strategy == "block":
            block = self.block
            if block is None or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
                raise ConfigError(f"{where}: block_structure {block!r}; write two positive numbers")

    def to_json(self) -> dict[str, Any]:
        """The argument block."""
        arguments: dict[str, Any] = {
            "num_bits": self.num_bits,
            "type": "float" if self.format in FORMATS[2:] else "int",
            "symmetric": self.symmetric,
            "group_size": self.group_size if "group" in self.strategy else None,
            "strategy": self.strategy,
            "dynamic": False,
        }
        if self.strategy == "block":
            arguments["block_structure"] = list(self.block or ())
        if self.format in SCALE_DTYPES:
            arguments["scale_dtype"] = SCALE_DTYPES[self.format]
        return arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTConfig:
    """Which modules are stored how.

    Attributes:
        groups: `(targets, scheme)`; a target is the class `Linear`, the name of a module, or `re:` and a regular
            expression for the start of names. The first group that matches decides.
        ignore: targets that stay dense.
    """

    groups: tuple[tuple[tuple[str, ...], CTScheme], ...]
    ignore: tuple[str, ...] = ()

    def scheme(self, module: str) -> CTScheme | None:
        """How the linear layer `module` is stored, None where it is dense."""
        if any(_matches(target, module) for target in self.ignore):
            return None
        # A name is meant before a class, whatever the order: the peers sort targets so.
        for by_class in (False, True):
            for targets, scheme in self.groups:
                if any(_matches(target, module) for target in targets if (target == "Linear") == by_class):
                    return scheme
        return None

    def to_json(self) -> dict[str, Any]:
        """The entries that compressed-tensors, transformers and vLLM read."""
        formats = {scheme.format for _, scheme in self.groups}
        return {
            "config_groups": {
                f"group_{i}": {
                    "targets": list(targets),
                    "weights": scheme.to_json(),
                    "input_activations": None,
                    "output_activations": None,
                    "format": scheme.format if len(formats) > 1 else None,
                }
                for i, (targets, scheme) in enumerate(self.groups)
            },
            "quant_method": "compressed-tensors",
            "kv_cache_scheme": None,
            "format": next(iter(formats)) if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": list(self.ignore),
        }


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target in ("Linear", module)


def parse_config(entries: Mapping[str, Any]) -> CTConfig:
    """Reads the entries; unknown ones at the top are passed over, in an argument block they are refused.

    How activations are quantized is not kept: leaves are weights only.

    Raises:
        ConfigError: naming the entry that is missing, unknown or not read.

    Example:
        >>> weights = {"num_bits": 4, "group_size": 32}
        >>> groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        >>> parse_config({"config_groups": groups, "format": "pack-quantized"}).scheme("layers.0.up_proj").group_size
        32
    """
    at = "quantization_config"
    groups = entries.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{at}: config_groups must hold at least one group, found {groups!r}")
    if entries.get("quantization_status") not in (None, "compressed"):
        raise ConfigError(
            f"{at}: quantization_status {entries['quantization_status']!r}; only compressed models are read"
        )
    for key in ("sparsity_config", "transform_config"):
        inner = entries.get(key)
        if inner and not (isinstance(inner, Mapping) and inner.get("format") == "dense"):
            raise ConfigError(f"{at}: {key}: sparse and transformed models are not read")
    padded = _packs_with_padding(entries.get("version"))
    parsed = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise ConfigError(f"{at}: {name} must be an object, found {group!r}")
        targets = _targets(f"{at}: {name}: targets", group.get("targets"))
        arguments = group.get("weights")
        if arguments is None:
            continue
        kind = group.get("format") or entries.get("format")
        scheme = _scheme(f"{at}: {name}: weights", arguments, kind)
        parsed.append((targets, dataclasses.replace(scheme, padded_words=padded)))
    if not parsed:
        raise ConfigError(f"{at}: config_groups: none of them says how weights are stored")
    ignore = _targets(f"{at}: ignore", entries.get("ignore") or [])
    return CTConfig(groups=tuple(parsed), ignore=ignore)


def _scheme(at: str, arguments: Any, kind: Any) -> CTScheme:
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{at} must be an object, found {arguments!r}")
    unknown = sorted(set(arguments) - _ARGUMENTS)
    if unknown:
        raise ConfigError(f"{at}: {unknown[0]!r} is not known; the keys are {', '.join(sorted(_ARGUMENTS))}")
    number = arguments.get("type", "int")
    if number not in ("int", "float"):
        raise ConfigError(f"{at}: type {number!r}; write int or float")
    if kind == "naive-quantized":
        kind = f"{number}-quantized"
    size, strategy = arguments.get("group_size"), arguments.get("strategy")
    if size == -1:
        size = None
    if strategy is None:  # as the peers infer it
        strategy = "tensor" if arguments.get("group_size") is None else "channel" if size is None else "group"
    block = arguments.get("block_structure")
    if isinstance(block, str):  # older files write "128x128"
        block = [int(n) if n.isdigit() else n for n in block.split("x")]
    if not isinstance(kind, str):
        raise ConfigError(f"{at}: format {kind!r}; write one of {', '.join(FORMATS)}")
    scheme = CTScheme(
        format=kind,
        num_bits=arguments.get("num_bits", 8),
        symmetric=arguments.get("symmetric", True),
        strategy=strategy,
        group_size=size if "group" in str(strategy) else None,
        block=tuple(block) if isinstance(block, list | tuple) and strategy == "block" else None,  # type: ignore
    )
    if (number == "float") != (kind in FORMATS[2:]):
        raise ConfigError(f"{at}: type {number!r} contradicts format {kind!r}")
    return scheme


def _targets(at: str, targets: Any) -> tuple[str, ...]:
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise ConfigError(f"{at} must list names, found {targets!r}")
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise ConfigError(f"{at}: {target!r} is no regular expression ({error})") from error
    return tuple(targets)


def _packs_with_padding(version: Any) -> bool | None:
    """Whether the version of compressed-tensors that packed a model let no code straddle words (0.12 and before)."""
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return None if match is None else (int(match[1]), int(match[2])) <= (0, 12)


def config_for(schemes: Mapping[str, CTScheme | None]) -> CTConfig:
    """The configuration of a model whose linear layers are stored so; None are dense.

    Raises:
        LeafError: no module is quantized.
    """
    by_scheme: dict[CTScheme, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme is not None:
            by_scheme.setdefault(scheme, []).append(module)
    if not by_scheme:
        raise LeafError("no weight of the model is quantized: compressed-tensors needs at least one")
    ignore = tuple(module for module, scheme in schemes.items() if scheme is None)
    if len(by_scheme) == 1:
        return CTConfig(groups=((("Linear",), next(iter(by_scheme))),), ignore=ignore)
    return CTConfig(groups=tuple((tuple(modules), scheme) for scheme, modules in by_scheme.items()), ignore=ignore)
