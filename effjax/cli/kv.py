"""What names on the command line say of the key-value cache: a method that evicts, and a coding with its tables."""

import os
import re
from typing import TYPE_CHECKING, Any

from effjax.errors import ConfigError

if TYPE_CHECKING:
    from effjax.cli.inputs import CalibratingKV
    from effjax.kv.coders import KVCoders
    from effjax.kv.coding import KVCoding
    from effjax.kv.method import EvictionMethod
    from effjax.kv.nomad import NoMAD
    from effjax.kv.nomad_slots import NomadLayers
    from effjax.models.hf import LoadedModel

_COUPLED = {1: (8, 8), 2: (4, 8), 4: (2, 8)}  # bits a channel: channels and bits of a code
_CODES = (
    "cq1, cq2, cq4 (bits a channel), cq-8c8b and the like, kvquant1 to kvquant8, int1 to int8, kivi1 to kivi8, nomad1, "
    "nomad2, nomad4"
)


def eviction_method(name: str, budget: float) -> "EvictionMethod":
    """The method of a name, with a share below 1 or a whole number of tokens.

    Raises:
        ConfigError: a budget that is neither.

    Example:
        >>> eviction_method("h2o", 0.2).budget, eviction_method("streamingllm", 256).budget
        (0.2, 256)
    """
    from effjax import kv

    if not (0 < budget < 1 or (budget >= 1 and budget == int(budget))):
        raise ConfigError(f"--kv-budget {budget:g}: a share between 0 and 1, or a whole number of tokens")
    size = budget if budget < 1 else int(budget)
    if name == "streamingllm":
        return kv.SinkWindow(window=0.5).within(size)
    methods = {
        "scissorhands": kv.Scissorhands,
        "h2o": kv.H2O,
        "snapkv": kv.SnapKV,
        "pyramidkv": kv.PyramidKV,
        "tova": kv.TOVA,
    }
    return methods[name](budget=size)


def coding(name: str, head_dim: int) -> "KVCoding | NoMAD":
    """The coding of a name, for heads of this width.

    Raises:
        ConfigError: no such name, or channels that do not divide the width.

    Example:
        >>> str(coding("cq2", 64)), str(coding("cq-2c6b", 64)), coding("int8", 64)
        ('CQ-4c8b', 'CQ-2c6b', IntKV(bits=8, head_dim=64))
    """
    from effjax import kv

    def refused(why: str) -> ConfigError:
        return ConfigError(f"--kv-code {name}: {why}; choose {_CODES}, or a file that `effjax calibrate-kv` wrote")

    def dividing(channels: int) -> int:
        if channels < 1 or head_dim % channels:
            raise refused(f"{channels} channels do not divide a head of {head_dim}")
        return channels

    coupled = re.fullmatch(r"cq-(\d+)c(\d+)b", name)
    plain = re.fullmatch(r"(cq|kvquant|int|kivi)(\d+)", name)
    try:
        if name in ("nomad1", "nomad2", "nomad4"):
            return kv.NoMAD(d_sub=dividing(int(name[-1])))
        if coupled or (plain and plain[1] == "cq" and int(plain[2]) in _COUPLED):
            channels, bits = map(int, coupled.groups()) if coupled else _COUPLED[int(plain[2])]  # type: ignore[index]
            return kv.CQ(channels=dividing(channels), bits=bits)
        if plain and plain[1] != "cq":
            kinds: dict[str, Any] = {"kvquant": kv.KVQuant, "int": kv.IntKV, "kivi": kv.KIVI}
            return kinds[plain[1]](bits=int(plain[2]), head_dim=head_dim)
    except ConfigError:
        raise
    except ValueError as error:
        raise refused(str(error)) from error
    raise refused("no such coding or file")


def coders(name: str, model: "LoadedModel", calibrating: "CalibratingKV") -> "KVCoders | NomadLayers":
    """The coders in a file, or those that the calibration text gives for a coding of this name; KIVI needs none.

    Raises:
        ConfigError, CheckpointError, CalibrationError: no such name, a damaged file, a text that is too short.
    """
    if os.path.exists(name) or name.endswith(".safetensors"):
        from effjax.kv.coders_file import load_coders

        return load_coders(name)
    from effjax.kv.kivi import KIVI

    method = coding(name, model.config.head_dim)
    if isinstance(method, KIVI):
        return method.coders(model.config.num_hidden_layers)
    return learned(name, model, calibrating)


def learned(name: str, model: "LoadedModel", calibrating: "CalibratingKV") -> "KVCoders | NomadLayers":
    """The coders that the calibration text gives for the coding of a name.

    Raises:
        ConfigError, CalibrationError: no such name, a text that is too short.
    """
    import jax

    from effjax.arrays.base import materialize
    from effjax.kv.capture import capture_kv
    from effjax.kv.coders import fit_layers
    from effjax.kv.kivi import KIVI
    from effjax.kv.nomad import NoMAD
    from effjax.kv.nomad_text import learn_layers

    method = coding(name, model.config.head_dim)
    if isinstance(method, KIVI):
        raise ConfigError(f"--code {name}: learns nothing from a text; write `effjax generate --kv-code {name}`")
    windows = calibrating.cut(model)
    captured = capture_kv(model.config, materialize(model.params), windows)
    key = jax.random.key(calibrating.calibration_seed)
    if isinstance(method, NoMAD):
        return learn_layers(method, model.config, captured, windows.shape[1], key=key)
    return fit_layers(method, captured, key=key)
