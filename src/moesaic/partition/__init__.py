"""Which neuron belongs to which expert: one method a file."""

from .base import Partition, Partitioner

Base = Partitioner

__all__ = ["Base", "Partition", "Partitioner"]
