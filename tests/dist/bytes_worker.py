"""One rank of the traffic comparison, in the shape of gpt-oss-20b at 32k tokens and SP = 4."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from cpt.deepspeed_adapter.groups import create_topology, init_distributed
from cpt.parallel.halo import WindowHalo
from cpt.parallel.ulysses import Ulysses


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    init_distributed(device)
    topology = create_topology(sp_size=4, ep_size=1, device=device)
    local_tokens = 32_768 // 4
    head_dim = 64
    shapes = []
    for heads in (64, 8, 8):  # of query, key and value
        shapes.append((1, heads, local_tokens, head_dim))

    def draw() -> list[torch.Tensor]:
        return [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]

    sent = {}
    ulysses = Ulysses(topology)
    query, _, value = ulysses.start_qkv(*draw(), group=0).finish()
    out = ulysses.join_out([ulysses.start_out(query.transpose(1, 2))])
    (out.sum() + value.sum()).backward()
    sent["ulysses"] = topology.traffic.take()["ulysses"]
    halo = WindowHalo(topology, 128)
    query, key, value = draw()
    query, key, value = halo.edge(halo.start(key, value), query, key, value)
    (query.sum() + key.sum() + value.sum()).backward()
    sent["halo"] = topology.traffic.take()["halo"]
    totals = torch.tensor([sent["ulysses"], sent["halo"]])
    dist.all_reduce(totals, group=topology.control_group)
    if topology.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(totals.tolist()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
