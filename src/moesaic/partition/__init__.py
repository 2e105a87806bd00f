"""Which neuron belongs to which expert: one method a file."""

from .base import Partition, Partitioner

__all__ = ["Partition", "Partitioner"]
