"""Data: sets of labelled images, their division among clients, mini-batches and augmentation."""

from __future__ import annotations

from dfed.data.augment import AUGMENTATIONS
from dfed.data.batches import Augment, client_batches
from dfed.data.cache import cache_folder
from dfed.data.dataset import DATASET_GIVEN, ArrayDataset, Bundle, Dataset, DataSplits, Subset, load
from dfed.data.partition import PARTITIONER_GIVEN, make_partition
from dfed.data.partitions import Partition

__all__ = [
    "AUGMENTATIONS",
    "DATASET_GIVEN",
    "PARTITIONER_GIVEN",
    "ArrayDataset",
    "Augment",
    "Bundle",
    "DataSplits",
    "Dataset",
    "Partition",
    "Subset",
    "cache_folder",
    "client_batches",
    "load",
    "make_partition",
]
