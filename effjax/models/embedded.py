"""The small trained decoder that ships inside the package."""

import importlib.resources
from typing import Any

from effjax.errors import CheckpointError
from effjax.models.hf import LoadedModel, load_model


def load_default(*, dtype: Any = None, scan_layers: bool = False) -> LoadedModel:
    """The decoder in `effjax/assets/default_model`, trained by `python -m train.lm`; its README.md is the model card.

    Args:
        dtype: of the parameters; None keeps what is on disk.
        scan_layers: stacks the layers for `nn.scan`.

    Raises:
        CheckpointError: the files are not installed or damaged.
    """
    files = importlib.resources.files("effjax") / "assets" / "default_model"
    if not (files / "config.json").is_file():
        raise CheckpointError(
            "the embedded model (effjax/assets/default_model) is not installed; reinstall effjax, or train it with "
            "python -m train.lm"
        )
    with importlib.resources.as_file(files) as directory:
        return load_model(directory, dtype=dtype, scan_layers=scan_layers)
