"""What a training writes down: log.jsonl always, TensorBoard's events when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmem_bank.errors import MissingDependencyError
from gmem_gen.run import Log

COUNTS = frozenset({"step", "elapsed"})


def require_tensorboard() -> Any:
    """Return TensorBoard's writer; raises MissingDependencyError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            "--tensorboard needs tensorboard: pip install 'gmem[train]'", extra="train"
        ) from error
    return SummaryWriter


class Journal:
    """The records of a training, one a call.

    Args:
        run: the run's folder.
        step: where the training goes on: later records are dropped, they will be written again.
        tensorboard: also write RUN/tensorboard.
    """

    def __init__(self, run: Path, step: int, *, tensorboard: bool = False) -> None:
        self._log = Log(run, step)
        self._events: Any = None
        if tensorboard:
            self._events = require_tensorboard()(log_dir=str(run / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Write a record with its "step"."""
        self._log.write(record)
        if self._events is not None:
            for name, value in record.items():
                if name not in COUNTS:
                    group = "validation" if name.startswith("validation_") else "train"
                    self._events.add_scalar(f"{group}/{name}", value, record["step"])

    def picture(self, grid: Path, step: int) -> None:
        """Show a grid of samples in TensorBoard."""
        if self._events is not None:
            import numpy as np
            from PIL import Image

            with Image.open(grid) as image:
                self._events.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        if self._events is not None:
            self._events.close()
