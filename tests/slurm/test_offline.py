"""The shipped offline.sbatch goes on under a real Slurm, with other nodes than before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.cli import main
from data_pipeline.text.tokenizer import VOCAB_SIZE
from tests.support.slurm_cluster import Cluster

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def test_stopped_job_on_two_nodes_is_finished_by_one_on_one_node(
    cluster: Cluster, slurm_workplace: Path
) -> None:
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = GptOssConfig(vocab_size=VOCAB_SIZE, **sizes, **heads, **experts)
    GptOssForCausalLM(config).save_pretrained(slurm_workplace / "base")
    out = slurm_workplace / "targets"
    model = ("--model", str(slurm_workplace / "base"), "--build", str(slurm_workplace / "built"))
    words = ("kl_targets", *model, "--source", "en_web", "--top_k", "4", "--save_every", "2")
    job = ("slurm/offline.sbatch", *words, "--out", str(out))
    settings = {"CPT_ENV": f"{slurm_workplace}/env.sh", "CPT_MAX_RESTARTS": "0"}
    fault = {"CPT_FAULT": "offline_pass:1:2:term", "CPT_ALLOW_FAULTS": "1"}
    stopped = cluster.submit("--nodes=2", "--gpus-per-node=1", *job, **settings, **fault)
    assert cluster.wait(stopped)["ExitCode"] == "75:0", cluster.output(stopped)
    assert "are done and kept in" in cluster.output(stopped)
    assert out.with_name("targets.partial").is_dir()
    finished = cluster.submit("--nodes=1", "--gpus-per-node=2", *job, **settings)
    assert cluster.wait(finished)["ExitCode"] == "0:0", cluster.output(finished)
    assert not out.with_name("targets.partial").exists()
    assert main([*words, "--out", str(slurm_workplace / "one")]) == 0
    for name in ("en_web.safetensors", "kl_targets.json"):
        assert (out / name).read_bytes() == (slurm_workplace / "one" / name).read_bytes()
