"""The CIFAR-10 ResNets of He et al. (2016) with padded shortcuts (option A), their weights, and the images."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Part = tuple[np.ndarray, np.ndarray]
STAGES = ("layer1", "layer2", "layer3")
MEAN, STD = (np.array(x, np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def resnet(params: Any, images: Float[Array, "batch 32 32 3"]) -> Float[Array, "batch 10"]:
    """Logits in inference mode; all widths are taken from the shapes of `params` (see `read_resnet`)."""
    return _forward(params, images, lambda p, x: (_norm(p, x), None))[0]


def resnet_in_training(params: Any, images: Float[Array, "batch 32 32 3"]) -> tuple[Float[Array, "batch 10"], Any]:
    """Logits from the statistics of the batch, and `params` with running statistics that took a tenth of them."""

    def norm(p: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        now = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
        running = {name: 0.9 * p[name] + 0.1 * jax.lax.stop_gradient(now[name]) for name in now}
        return _norm(p | now, x), p | running

    logits, norms = _forward(params, images, norm)
    blocks = {s: [old | new for old, new in zip(params[s], norms[s], strict=True)] for s in STAGES}
    return logits, params | blocks | {"norm": norms["norm"]}


def _forward(params: Any, images: jax.Array, norm: Callable[[Any, jax.Array], tuple[jax.Array, Any]]) -> Any:
    """Logits, and the second results of all norms, as their parameters are nested."""
    x, first = norm(params["norm"], _conv(images, params["conv"]))
    x, norms = jax.nn.relu(x), {"norm": first} | {stage: [] for stage in STAGES}
    for stage in STAGES:
        for i, block in enumerate(params[stage]):
            stride = 2 if stage != "layer1" and i == 0 else 1
            y, inner = norm(block["norm_1"], _conv(x, block["conv_1"], stride))
            y, outer = norm(block["norm_2"], _conv(jax.nn.relu(y), block["conv_2"]))
            norms[stage].append({"norm_1": inner, "norm_2": outer})
            around = (y.shape[-1] - x.shape[-1]) // 2
            x = jax.nn.relu(y + jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (around, around))))
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], norms


def _conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=numbers)


def _norm(p: Any, x: jax.Array) -> jax.Array:
    return (x - p["mean"]) * (jax.lax.rsqrt(p["var"] + 1e-5) * p["scale"]) + p["bias"]


def read_resnet(data: Path, depth: int) -> Any:
    """Parameters and running statistics from `data/models/resnet_cifar10`, kernels as HWIO."""
    with np.load(data / "models" / "resnet_cifar10" / f"resnet{depth}_cifar10.npz") as file:
        z = {name: file[name] for name in file.files}

    def conv(name: str) -> jax.Array:
        return jnp.asarray(z[f"{name}.weight"].transpose(2, 3, 1, 0))

    def norm(name: str) -> dict[str, jax.Array]:
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        return {ours: jnp.asarray(z[f"{name}.{theirs}"]) for ours, theirs in names.items()}

    def block(name: str) -> dict[str, Any]:
        parts = {"conv_1": conv(f"{name}.conv1"), "conv_2": conv(f"{name}.conv2")}
        return parts | {"norm_1": norm(f"{name}.bn1"), "norm_2": norm(f"{name}.bn2")}

    stages = {f"layer{s}": [block(f"layer{s}.{i}") for i in range((depth - 2) // 6)] for s in (1, 2, 3)}
    head = {"kernel": jnp.asarray(z["linear.weight"].T), "bias": jnp.asarray(z["linear.bias"])}
    return {"conv": conv("conv1"), "norm": norm("bn1"), "head": head} | stages


def normalized(images: np.ndarray) -> np.ndarray:
    """`uint8 [n, 32, 32, 3]` as the networks take them, float32."""
    return (images.astype(np.float32) / 255 - MEAN) / STD


def read_cifar10(data: Path, name: str, limit: int | None = None) -> Part:
    """Images `uint8 [n, 32, 32, 3]` and labels of `data/images/cifar10/cifar10_{name}.npz`.

    "train_jpeg" and "test_jpeg" are complete and lossy, which costs the networks about ten points of accuracy;
    "train_first4000_lossless" is not.
    """
    with np.load(data / "images" / "cifar10" / f"cifar10_{name}.npz") as file:
        labels = file["labels"][:limit]
        if "images" in file.files:
            return file["images"][:limit], labels
        data_bytes, offsets = file["jpeg_bytes"], file["offsets"]
    from PIL import Image

    spans = zip(offsets, offsets[1:][:limit], strict=False)
    images = [np.asarray(Image.open(io.BytesIO(data_bytes[i:j].tobytes()))) for i, j in spans]
    return np.stack(images), labels
