"""All randomness follows from (seed, step): nothing here reads or moves the global generators for good."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def permutation(num_rows: int, seed: int, epoch: int, level: int) -> Tensor:
    """A permutation of ``range(num_rows)`` by (seed, epoch, level) alone; level 0 is training, 1 validation."""
    # Distinct 63-bit seeds: torch mixes them well (Philox / MT19937 initialisation), a sum of the parts would not do.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2 + level)
    return torch.randperm(num_rows, generator=generator)


class EndlessPermutations:
    """The endless sequence of permutations of ``range(num_rows)``: validation rows are read from it, cycle by cycle.

    Args:
        num_rows: in a cycle; at least 1.
        seed: all the randomness there is.
    """

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed = num_rows, seed
        self._cycle, self._order = -1, list[int]()

    def places(self, first: int, num_places: int) -> list[int]:
        """The numbers at positions ``first .. first + num_places - 1``."""
        found = []
        for position in range(first, first + num_places):
            cycle, place = divmod(position, self.num_rows)
            if cycle != self._cycle:
                self._cycle, self._order = cycle, permutation(self.num_rows, self.seed, cycle, level=1).tolist()
            found.append(self._order[place])
        return found


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it the global generators start from ``seed``; on leaving they are as they were on entering."""
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(seed % 2**63)
        yield
