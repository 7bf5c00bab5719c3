"""Checkpoints of a run: written while it goes on, whole or not at all, the oldest removed."""

from pathlib import Path
from typing import Any, Self

import orbax.checkpoint as ocp

from effjax.errors import CheckpointError

FOLDER = "checkpoints"  # in that of the run


class Checkpoints:
    """The folder of a run's checkpoints.

    `save` returns as soon as the arrays are copied to the host; a checkpoint gets its name only when all of it is
    written. With several processes each writes its own shards, and all must call.

    Args:
        folder: made where it is missing.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()  # waits for what is being written

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Any) -> None:
        """Begins to write.

        Args:
            step: steps done.
            state: a tree of arrays.
            position: in the data, as JSON can hold it; the same in every process.
        """
        parts = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position))
        self._manager.save(step, args=parts)

    def restore(self, step: int, shapes: Any) -> tuple[Any, Any]:
        """State and position in the data.

        Args:
            step: of the checkpoint.
            shapes: `ShapeDtypeStruct`s with the shardings to restore to; those it was saved with may have been others.

        Raises:
            CheckpointError: it does not hold such a state.
        """
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), data=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=parts)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise CheckpointError(
                f"checkpoint {step} in {self._folder.name} does not hold the state of this run: go on with the model "
                f"and the optimizer it was begun with, or name another folder ({error})"
            ) from error
        return found["state"], found["data"]


def newest(out: Path, keep: int) -> int | None:
    """Step of the newest checkpoint of the run in `out`; None where it has none."""
    with Checkpoints(out / FOLDER, keep) as checkpoints:
        return checkpoints.latest
