"""The configuration of a decoder, and its translation from and to the `config.json` of a Hugging Face directory."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from effjax.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Family:
    """What a `model_type` fixes, and the values its `config.json` may leave out."""

    qkv_bias: bool | None  # None: `attention_bias` decides
    qk_norm: bool
    sliding_window: bool
    defaults: Mapping[str, Any]
    opt: bool = False  # layer norms, learned positions, a feed-forward layer without a gate, biases everywhere


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(
        qkv_bias=None,
        qk_norm=False,
        sliding_window=False,
        defaults={"max_position_embeddings": 2048},
    ),
    "mistral": _Family(
        qkv_bias=False,
        qk_norm=False,
        sliding_window=True,
        defaults={"max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "qwen2": _Family(
        qkv_bias=True,
        qk_norm=False,
        sliding_window=True,
        defaults={"max_position_embeddings": 32768},
    ),
    "qwen3": _Family(
        qkv_bias=None,
        qk_norm=True,
        sliding_window=True,
        defaults={"max_position_embeddings": 32768, "head_dim": 128},
    ),
    "opt": _Family(
        qkv_bias=True,
        qk_norm=False,
        sliding_window=False,
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        opt=True,
    ),
}
# What an OPT file calls otherwise, and what it may say but one way.
_OPT_NAMES: Mapping[str, str] = {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"}
_OPT_FIXED: Mapping[str, Any] = {
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}
# An activation of the other name is one that `transformers` lacks, so that it refuses a model it would run wrongly.
_SHIFTED = "shifted_relu"
_ACTIVATIONS: Mapping[str, str] = {"silu": "silu", "swish": "silu", "relu": "relu", _SHIFTED: "relu"}
_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained on.

    Attributes:
        rope_type: `"linear"` (all positions divided by `factor`), `"dynamic"` (the base grows with the text, NTK) or
            `"llama3"` (low frequencies divided by `factor`, high ones kept, a ramp in between).
        factor: the stretch, at least 1.
        low_freq_factor: `llama3` only: wavelengths longer than `original / low_freq_factor` are stretched.
        high_freq_factor: `llama3` only: wavelengths shorter than `original / high_freq_factor` are kept.
        original_max_position_embeddings: the length before stretching; only `llama3` computes with it (`dynamic` starts
            to stretch at the model's `max_position_embeddings`).
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.rope_type, str) or self.rope_type not in _ROPE_KEYS:
            raise ConfigError(
                f"rope_scaling: rope_type {self.rope_type!r} is not known; write one of {sorted(_ROPE_KEYS)} or null"
            )
        for key in _ROPE_KEYS[self.rope_type]:
            value = getattr(self, key)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"rope_scaling: {self.rope_type} needs a positive number {key}, found {value!r}")
        if self.factor < 1:
            raise ConfigError(f"rope_scaling: factor {self.factor} is below 1; it divides frequencies, write 1 or more")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:  # type: ignore[operator]
            raise ConfigError(
                f"rope_scaling: low_freq_factor {self.low_freq_factor} must be below high_freq_factor "
                f"{self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a Llama-family decoder; field names are those of `config.json`.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layers; a tuple with one a layer where they differ, as after
            structured pruning. Such layers are written out: a scan runs one block over stacked kernels, which have one
            width, and padding them to the widest would bring back what was cut. No `config.json` of these families has
            a place for it, so that other programs do not read such models (`effjax.models.hf.save_hf` refuses).
        num_hidden_layers: blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads; None means as many as those.
        head_dim: width of a head, even; None means `hidden_size / num_attention_heads`.
        model_type: `"llama"`, `"mistral"`, `"qwen2"`, `"qwen3"` or `"opt"`.
        rms_norm_eps: added to the mean square in every norm; to the variance where they are layer norms (OPT).
        rope_theta: base of the rotary frequencies.
        rope_scaling: see `RopeScaling`, or None.
        max_position_embeddings: the longest text the model was made for (only `dynamic` scaling computes with it).
        sliding_window: a token sees itself and the `sliding_window - 1` before it; None: everything before it.
        qkv_bias: biases on the query, key and value projections (None: what the family prescribes).
        o_bias: a bias on the attention output projection; OPT has one always.
        mlp_bias: biases in the feed-forward layer; OPT has them always.
        hidden_act: of the feed-forward layer, `"silu"` or `"relu"` (None: ReLU for OPT, SiLU for all others).
        relu_shift: a ReLU gate lets through what exceeds this: `max(x - relu_shift, 0)`.
        norm_relu: a ReLU after the norms before attention and the feed-forward layer, as in stage 2 of Mirzadeh et al.,
            ReLU Strikes Back (ICLR 2024).
        tie_word_embeddings: the head is the transposed embedding.
        bos_token_id: put in front of a prompt, or None.
        eos_token_ids: tokens that end a text.
        scan_layers: one traced block scanned over stacked parameters instead of one traced block a layer.
        remat: recompute each block's activations in the backward pass.
        dtype: name of the floating dtype to compute in; None: that of the embedding.
        param_dtype: name of the dtype that `Decoder.init` makes parameters in.

    Raises:
        ConfigError: an entry is missing, malformed or contradicts another one.

    Example:
        >>> config = DecoderConfig(
        ...     vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=8
        ... )
        >>> config.head_dim
        8
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int | tuple[int, ...]
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = None  # type: ignore[assignment]  # filled in below
    head_dim: int = None  # type: ignore[assignment]  # filled in below
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    sliding_window: int | None = None
    qkv_bias: bool = None  # type: ignore[assignment]  # filled in below
    o_bias: bool = False
    mlp_bias: bool = False
    hidden_act: str = None  # type: ignore[assignment]  # filled in below
    relu_shift: float = 0.0
    norm_relu: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    scan_layers: bool = False
    remat: bool = False
    dtype: str | None = None
    param_dtype: str = "float32"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head before the rotation."""
        return _FAMILIES[self.model_type].qk_norm

    @property
    def is_opt(self) -> bool:
        """Layer norms, learned positions in place of rotated ones, and feed-forward layers without a gate."""
        return _FAMILIES[self.model_type].opt

    @property
    def widths(self) -> tuple[int, ...]:
        """The feed-forward width of every layer."""
        size = self.intermediate_size
        return size if isinstance(size, tuple) else (size,) * self.num_hidden_layers

    def one_width(self, asker: str) -> int:
        """The feed-forward width of all layers, for what takes one alone.

        Raises:
            ConfigError: they differ.
        """
        if isinstance(self.intermediate_size, int):
            return self.intermediate_size
        raise ConfigError(
            f"{asker} takes one feed-forward width for all layers, and those of this decoder are "
            f"{list(self.intermediate_size)}: cut equally many neurons from each, with Structured(scope='group')"
        )

    def of_layer(self, layer: int) -> "DecoderConfig":
        """What the block of a layer is made from: this, with that layer's width.

        Example:
            >>> config = DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=(172, 96),
            ...                        num_hidden_layers=2, num_attention_heads=8)
            >>> config.of_layer(1).intermediate_size
            96
        """
        if isinstance(self.intermediate_size, int):
            return self
        return dataclasses.replace(self, intermediate_size=self.intermediate_size[layer])

    def __post_init__(self) -> None:
        family = _family(self.model_type)

        def default(name: str, value: Any) -> None:
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            _positive_int(name, getattr(self, name))
        self._check_widths()
        default("num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} does not divide into num_attention_heads {self.num_attention_heads}; "
                "write head_dim"
            )
        default("head_dim", self.hidden_size // self.num_attention_heads)
        default("qkv_bias", bool(family.qkv_bias))
        default("hidden_act", "relu" if family.opt else "silu")
        if family.opt:
            object.__setattr__(self, "o_bias", True)
            object.__setattr__(self, "mlp_bias", True)
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
            _positive_int(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}; every key head serves a whole number of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs, write an even head_dim")
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic" and self.head_dim < 4:
            raise ConfigError(f"rope_scaling: dynamic needs a head_dim of 4 or more, found {self.head_dim}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
                raise ConfigError(f"{name} must be a positive number, found {value!r}")
        if self.sliding_window is not None:
            _positive_int("sliding_window", self.sliding_window)
            if not family.sliding_window:
                raise ConfigError(
                    f"sliding_window {self.sliding_window} contradicts model_type {self.model_type!r}, which attends "
                    "to "
                    "all tokens; write model_type 'mistral' or sliding_window null"
                )
        for name in (
            "qkv_bias",
            "o_bias",
            "mlp_bias",
            "norm_relu",
            "tie_word_embeddings",
            "scan_layers",
            "remat",
        ):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, found {getattr(self, name)!r}")
        if family.qkv_bias is not None and self.qkv_bias != family.qkv_bias:
            raise ConfigError(
                f"qkv_bias {self.qkv_bias} contradicts model_type {self.model_type!r}, which fixes it to "
                f"{family.qkv_bias}"
            )
        if self.o_bias and not (self.qkv_bias and (family.qkv_bias is None or family.opt)):
            raise ConfigError(f"o_bias needs a model_type with attention_bias and qkv_bias, found {self.model_type!r}")
        if family.qkv_bias is None and self.qkv_bias != self.o_bias:
            raise ConfigError(f"model_type {self.model_type!r} has one attention_bias: write qkv_bias and o_bias alike")
        if self.mlp_bias and self.model_type not in ("llama", "opt"):
            raise ConfigError(f"mlp_bias contradicts model_type {self.model_type!r}; only 'llama' has it")
        if self.hidden_act not in ("silu", "relu"):
            raise ConfigError(f"hidden_act {self.hidden_act!r} is not supported; this decoder has 'silu' and 'relu'")
        shift = self.relu_shift
        if not isinstance(shift, int | float) or isinstance(shift, bool) or not math.isfinite(shift):
            raise ConfigError(f"relu_shift must be a finite number, found {shift!r}")
        if family.opt and (self.rope_scaling is not None or self.hidden_act != "relu"):
            raise ConfigError(
                f"model_type 'opt' has learned positions and ReLUs: rope_scaling {self.rope_scaling} and hidden_act "
                f"{self.hidden_act!r} must be None and 'relu'"
            )
        if (shift or self.norm_relu) and self.hidden_act != "relu":
            raise ConfigError(f"relu_shift and norm_relu need hidden_act 'relu', found {self.hidden_act!r}")
        if self.bos_token_id is not None:
            _token_id("bos_token_id", self.bos_token_id)
        if not isinstance(self.eos_token_ids, tuple):
            raise ConfigError(f"eos_token_ids must be a tuple of token ids, found {self.eos_token_ids!r}")
        for token in self.eos_token_ids:
            _token_id("eos_token_ids", token)

    def _check_widths(self) -> None:
        size = self.intermediate_size
        if not isinstance(size, tuple):
            return _positive_int("intermediate_size", size)
        for width in size:
            _positive_int("intermediate_size", width)
        if len(size) != self.num_hidden_layers:
            raise ConfigError(
                f"intermediate_size has {len(size)} widths for {self.num_hidden_layers} layers (num_hidden_layers): "
                "write one a layer, or one number for all"
            )
        if len(set(size)) == 1:
            object.__setattr__(self, "intermediate_size", size[0])
        elif self.scan_layers:
            raise ConfigError(
                f"intermediate_size {list(size)} differs from layer to layer, and a scan stacks kernels of one width: "
                "write scan_layers False"
            )

    @classmethod
    def from_hf(cls, entries: Mapping[str, Any], **changes: Any) -> "DecoderConfig":
        """Reads the entries of a `config.json`.

        Args:
            entries: the parsed file.
            **changes: fields of this class that a file does not hold (`scan_layers`, `remat`, `dtype`) or that shall
                differ.

        Returns:
            The configuration, equal to `from_hf(config.to_hf())`.

        Raises:
            ConfigError: naming the entry that is missing, unknown or contradictory, and what to write.

        Example:
            >>> sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5}
            >>> DecoderConfig.from_hf({"model_type": "llama", "num_attention_heads": 8, **sizes}).head_dim
            8
        """
        if not isinstance(entries, Mapping):
            raise ConfigError(f"config.json must hold an object of entries, found {type(entries).__name__}")
        if "model_type" not in entries:
            raise ConfigError(f"config.json: model_type is missing; write one of {sorted(_FAMILIES)}")
        model_type = entries["model_type"]
        family = _family(model_type)
        if entries.get("quantization_config"):
            raise ConfigError(
                "config.json: quantization_config says the weights are already compressed; import the original "
                "checkpoint"
            )
        entries = _opt_entries(entries) if family.opt else entries
        act = entries.get("hidden_act", "silu")
        if not isinstance(act, str) or act not in _ACTIVATIONS:
            raise ConfigError(
                f"config.json: hidden_act {act!r} is not supported; this decoder has {list(_ACTIVATIONS)}"
            )
        required = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        ]
        if (
            model_type != "llama"
        ):  # first-generation Llama files leave it out; the others' defaults depend on the version
            required.append("num_key_value_heads")
        missing = [key for key in required if key not in entries]
        if missing:
            raise ConfigError(
                f"config.json: missing {', '.join(missing)}; a {model_type} decoder cannot be shaped without"
            )
        known = {key: entries[key] for key in required}
        if isinstance(known["intermediate_size"], list):
            known["intermediate_size"] = tuple(known["intermediate_size"])
        optional = (
            "num_key_value_heads",
            "head_dim",
            "rms_norm_eps",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
        for key in optional:
            value = entries.get(key, family.defaults.get(key))
            if value is not None:
                known[key] = value
        attention_bias = entries.get("attention_bias", False)
        if family.qkv_bias is None:
            known |= {"qkv_bias": attention_bias, "o_bias": attention_bias}
        elif "attention_bias" in entries and attention_bias != family.qkv_bias:
            raise ConfigError(
                f"config.json: attention_bias {attention_bias} contradicts model_type {model_type!r}; remove the entry"
            )
        if entries.get("mlp_bias"):
            known["mlp_bias"] = entries["mlp_bias"]
        known["hidden_act"] = _ACTIVATIONS[act]
        if act == _SHIFTED:
            known |= {key: entries[key] for key in ("relu_shift", "norm_relu") if key in entries}
        theta, scaling = _read_rope(entries)
        if theta is not None:
            known["rope_theta"] = theta
        known |= {
            "rope_scaling": scaling,
            "sliding_window": _read_window(entries, family),
            "bos_token_id": entries.get("bos_token_id"),
            "eos_token_ids": token_ids(entries.get("eos_token_id"), "eos_token_id"),
        }
        fields: dict[str, Any] = {"model_type": model_type} | known | changes
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The entries of a `config.json` that `transformers` and `from_hf` read back.

        Layers of different widths are a list, which `from_hf` alone reads.
        """
        architectures = {
            "opt": "OPT",
            "llama": "Llama",
            "mistral": "Mistral",
            "qwen2": "Qwen2",
            "qwen3": "Qwen3",
        }
        entries: dict[str, Any] = {
            "architectures": [f"{architectures[self.model_type]}ForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": self.hidden_act,
        }
        if self.relu_shift or self.norm_relu:
            entries |= {"hidden_act": _SHIFTED, "relu_shift": self.relu_shift, "norm_relu": self.norm_relu}
        same = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim "
            "rms_norm_eps rope_theta max_position_embeddings tie_word_embeddings bos_token_id"
        )
        entries |= {key: getattr(self, key) for key in same.split()}
        entries["eos_token_id"] = (
            (self.eos_token_ids[0] if self.eos_token_ids else None)
            if len(self.eos_token_ids) < 2
            else list(self.eos_token_ids)
        )
        entries["rope_scaling"] = self.rope_scaling and {
            key: value for key, value in dataclasses.asdict(self.rope_scaling).items() if value is not None
        }
        family = _FAMILIES[self.model_type]
        if family.qkv_bias is None:
            entries["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            entries["mlp_bias"] = self.mlp_bias
        if family.sliding_window:
            entries["sliding_window"] = self.sliding_window
            if self.model_type != "mistral":
                entries |= {
                    "use_sliding_window": self.sliding_window is not None,
                    "max_window_layers": 0,
                }
        if self.is_opt:
            others = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling")
            entries = {_OPT_NAMES.get(key, key): value for key, value in entries.items() if key not in others}
            entries |= {"word_embed_proj_dim": self.hidden_size, **_OPT_FIXED}
        return entries


def _opt_entries(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of an OPT file under the names that the others have."""
    for key, wanted in _OPT_FIXED.items():
        if entries.get(key, wanted) is not wanted:
            raise ConfigError(f"config.json: {key} {entries[key]!r} is not run; this decoder runs OPT with {wanted}")
    width = entries.get("word_embed_proj_dim", entries.get("hidden_size"))
    if width != entries.get("hidden_size"):
        raise ConfigError(f"config.json: word_embed_proj_dim {width} differs from hidden_size, which is not run")
    read = {key: value for key, value in entries.items() if key not in _OPT_NAMES.values()}
    read |= {key: entries[name] for key, name in _OPT_NAMES.items() if name in entries}
    return {"hidden_act": "relu", "num_key_value_heads": entries.get("num_attention_heads")} | read


def token_ids(value: Any, key: str) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple; anything else is a `ConfigError` naming `key`."""
    listed = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for token in listed:
        _token_id(key, token)
    return tuple(listed)


def _family(model_type: Any) -> _Family:
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not known; this decoder runs {sorted(_FAMILIES)}")
    return _FAMILIES[model_type]


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a positive whole number, found {value!r}")


def _token_id(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name} must be a token id (a whole number of 0 or more), found {value!r}")


def _read_rope(entries: Mapping[str, Any]) -> tuple[Any, RopeScaling | None]:
    """The base and the scaling, from `rope_theta` and `rope_scaling` or from the newer `rope_parameters`."""
    old, new = entries.get("rope_scaling"), entries.get("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"config.json: {key} must be an object or null, found {value!r}")
    theta = entries.get("rope_theta")
    if new and new.get("rope_theta") is not None:
        if theta is not None and theta != new["rope_theta"]:
            raise ConfigError(
                f"config.json: rope_theta {theta} contradicts rope_parameters/rope_theta {new['rope_theta']}; keep one"
            )
        theta = new["rope_theta"]
    found = [_read_scaling(key, value) for key, value in (("rope_scaling", old), ("rope_parameters", new)) if value]
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError("config.json: rope_scaling contradicts rope_parameters; keep one")
    return theta, found[0] if found else None


def _read_scaling(key: str, entries: Mapping[str, Any]) -> RopeScaling | None:
    old, new = entries.get("type"), entries.get("rope_type")
    if old is not None and new is not None and old != new:
        raise ConfigError(f"config.json: {key} says type {old!r} and rope_type {new!r}; keep rope_type")
    rope_type = new if new is not None else old
    if rope_type == "default" or (rope_type is None and set(entries) <= {"rope_theta"}):
        return None
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise ConfigError(
            f"config.json: {key} has rope_type {rope_type!r}; this decoder runs 'default', 'linear', 'dynamic' and "
            "'llama3'"
        )
    names = {field.name for field in dataclasses.fields(RopeScaling)} - {"rope_type"}
    return RopeScaling(rope_type=rope_type, **{name: entries.get(name) for name in names})  # type: ignore[arg-type]


def _read_window(entries: Mapping[str, Any], family: _Family) -> int | None:
    """The window, if every layer has it; layers of both kinds are refused."""
    if not family.sliding_window:
        if entries.get("sliding_window") is not None:
            raise ConfigError(
                f"config.json: sliding_window contradicts model_type {entries['model_type']!r}, which attends to all "
                "tokens; write model_type 'mistral' or sliding_window null"
            )
        return None
    window, layers = (
        entries.get("sliding_window", family.defaults.get("sliding_window")),
        entries["num_hidden_layers"],
    )
    by_switch = entries["model_type"] != "mistral"  # Qwen files name a window even where they do not use it
    if window is None or (by_switch and not entries.get("use_sliding_window", False)):
        return None
    slides = [not by_switch or layer >= entries.get("max_window_layers", 28) for layer in range(layers)]
    if entries.get("layer_types") is not None:
        listed = list(entries["layer_types"])
        unknown = set(listed) - {"full_attention", "sliding_attention"}
        if unknown or len(listed) != layers:
            raise ConfigError(
                f"config.json: layer_types must list {layers} times 'full_attention' or 'sliding_attention' "
                f"(num_hidden_layers), found {len(listed)} "
                f"entries{', unknown ' + repr(sorted(unknown)) if unknown else ''}"
            )
        slides = [kind == "sliding_attention" for kind in listed]
    if all(slides):
        return window
    if not any(slides):
        return None
    raise ConfigError(
        f"config.json: sliding_window {window} holds for {sum(slides)} of {layers} layers (layer_types, "
        "max_window_layers); this decoder has one window for all layers: write use_sliding_window false if texts stay "
        "shorter than the window"
    )
