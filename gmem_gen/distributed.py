"""The processes of a training: one, or several started by torchrun or accelerate; what they share, and who writes.

Set up, wrapped and joined by accelerate; precision is the trainer's, so that it is the same with one process as with many.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

from gmem_bank.errors import ConfigError
from gmem_gen.runtime import pick_device

PATIENCE = datetime.timedelta(hours=12)
"""How long the others wait while the first process reads the images or encodes them."""


class Processes:
    """The processes that train together.

    Args:
        device: of `train.device`; with several processes each takes the GPU of its number.

    Raises:
        ConfigError: the device cannot be used, or there are fewer GPUs than processes.
    """

    def __init__(self, device: str = "auto") -> None:
        self.device = pick_device(device)
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if several and self.device.type == "cuda":
            if ":" in device or local >= torch.cuda.device_count():
                raise ConfigError(
                    f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} are there): start as "
                    "many processes as there are GPUs, with train.device 'cuda'", key="train.device",
                )  # fmt: skip
            self.device = torch.device("cuda", local)
        self._ours = not PartialState._shared_state  # accelerate keeps one state a process
        try:
            self._accelerator = Accelerator(
                cpu=self.device.type != "cuda", mixed_precision="no", device_placement=False,
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(
                f"this Python process already uses accelerate in another way: {error}", key="train.device"
            ) from error
        self.count: int = self._accelerator.num_processes
        self.rank: int = self._accelerator.process_index

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return which of `count` items are this process's: a run of them, as equal as can be."""
        return range(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a module whose gradients are the mean over all processes."""
        wrapped: nn.Module = self._accelerator.prepare_model(model, device_placement=False) if self.count > 1 else model
        return wrapped

    def without_exchange(self, model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager[object]:
        """Keep gradients of a wrapped module to this process inside the block."""
        return self._accelerator.no_sync(model) if enabled and self.count > 1 else contextlib.nullcontext()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes."""
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        added: list[float] = self._accelerator.reduce(numbers, reduction="sum").tolist()
        return added

    @contextlib.contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """Run the block in the first process, then in the others."""
        with self._accelerator.main_process_first():
            yield

    def wait(self) -> None:
        """Wait until all processes are here."""
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group, and leave accelerate as it was found."""
        if self.count > 1:
            self._accelerator.end_training()
        if self._ours:  # so that the caller may set it up in another way afterwards
            AcceleratorState._reset_state(reset_partial_state=True)
