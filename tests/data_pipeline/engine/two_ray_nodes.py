"""A Ray cluster of two nodes on this machine, until standard input closes.

    RAY_TMPDIR=FOLDER python two_ray_nodes.py        prints the address

Ray's own `ray start` does the same with more processes: an autoscaler, a dashboard, a proxy.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    settings = {
        "num_cpus": 2,
        "memory": 3 * 2**30,
        "object_store_memory": 80 * 2**20,
        "include_log_monitor": False,
    }
    head = {**settings, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**settings)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
