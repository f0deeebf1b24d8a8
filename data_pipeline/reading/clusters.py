"""Which documents belong together, for the statistics of the guard.

    cluster_by of a source -> hash of the file, folder or key of a document (one part)
    turns: each            -> hash of the record that a document is a turn of (one part)
                           -> number of the first held-out document of the same cluster (the build)

Documents of one site, package or conversation change together when a model is trained, so they
count as one.
The build keeps no name and no hash: equal documents give an equal build wherever they lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import xxhash

from data_pipeline.config.record_filters import plain_value
from data_pipeline.store.hashing import Hashes64
from data_pipeline.store.packing import Integers
from data_pipeline.text.record_keys import find_field

KEY_RULES_VERSION = 2
"""Version of the rules by which the value of a key names a cluster.

It belongs to the fingerprint of a build and to what a part is known by, so a change of what a value
names must raise it.
"""
NO_CLUSTER = 0
"""Cluster of a document that belongs to no other."""


def cluster_of(cluster_by: str | None, path: str, record: Mapping[str, Any]) -> int:
    """Return the cluster of a document as a hash of 64 bits.

    Args:
        cluster_by: The setting of its source.
        path: File of the document.
        record: Keys or columns of the document; empty if it has none.
    """
    if cluster_by is None:
        return NO_CLUSTER
    if cluster_by == "file":
        name = path
    elif cluster_by == "folder":
        name = str(Path(path).parent)
    else:
        name = _name_in(find_field(record, cluster_by))
    if not name:
        return NO_CLUSTER
    return xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) or 1


def _name_in(value: Any) -> str:
    """Return the name of a cluster in the value of a key, in which 3, 3.0 and "3" are the same.

    It is empty if the value is absent, or names nothing.
    """
    if isinstance(value, str):
        return host_of(value.strip())
    if isinstance(value, float) and math.isnan(value):
        return ""
    return plain_value(value) if isinstance(value, (int, float)) else ""


def host_of(value: str) -> str:
    """Return the host of a URL in lower case; another value as it is."""
    if "://" not in value:
        return value
    try:
        return urlsplit(value).hostname or value
    except ValueError:
        return value


def first_of_cluster(hashes: Hashes64) -> Integers:
    """Return for each document the position of the first one of its cluster.

    Args:
        hashes: (documents,) clusters; NO_CLUSTER for those that belong to no other.
    """
    positions = np.arange(len(hashes), dtype=np.int64)
    _, first, numbers = np.unique(hashes, return_index=True, return_inverse=True)
    return np.where(hashes == NO_CLUSTER, positions, first[numbers]).astype(np.int64)
