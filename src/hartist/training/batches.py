"""Which items a step sees and what is drawn for them: functions of (seed, step, part), never of the past"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed for one step and purpose, far from its neighbours' (SplitMix64 finaliser)."""
    z = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & (2**63 - 1)


def batch_indices(num_items: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The items of step's batch: epochs are seeded permutations laid end to end."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, num_items)
        generator = torch.Generator().manual_seed(step_seed(seed, epoch, stream=1))
        order = torch.randperm(num_items, generator=generator)
        taken = order[offset : offset + batch_size - len(indices)].tolist()
        indices += taken
        position += len(taken)
    return indices


@dataclass(frozen=True)
class MicroBatch:
    """One of the `count` equal parts of a step's batch.

    All that is drawn for it follows from the run's seed, the step and its index. So it doesn't matter which
    process computes it: one process that accumulates gradients over all parts, or many with a few each.
    """

    step: int
    index: int
    count: int
    size: int
    """Images in this part."""
    seed: int
    """The run's."""
    first_step: int = 0
    """Where the run's present phase began; batches are counted from there, as phases differ in batch size."""

    def rows(self, num_items: int) -> list[int]:
        """Its share of the step's batch, out of `num_items`."""
        seed = self.seed if self.first_step == 0 else step_seed(self.seed, self.first_step, stream=5)
        batch = batch_indices(num_items, self.size * self.count, self.step - self.first_step, seed)
        return batch[self.index * self.size :][: self.size]

    def seed_global_generator(self) -> None:
        """Seed torch's own generators, on every device, for the draws inside this part."""
        torch.manual_seed(step_seed(self.seed, self.step, stream=16 + self.index))

    def generator(self, stream: int) -> torch.Generator:
        """Draws that all parts of the step share: a coin for the batch, how many cells to keep."""
        return torch.Generator().manual_seed(step_seed(self.seed, self.step, stream))


def micro_batches(step: int, batch_size: int, micro_size: int, seed: int, first_step: int = 0) -> list[MicroBatch]:
    """The parts of a step's batch; `micro_size` 0 is the batch as a whole, and must else divide it."""
    size = micro_size or batch_size
    count = batch_size // size
    return [MicroBatch(step, index, count, size, seed, first_step) for index in range(count)]
