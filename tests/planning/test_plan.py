"""`cpt plan` computes what is known from elsewhere, and the layout it names is one that starts."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
from transformers import GptOssConfig

from cpt.cli import main
from cpt.commands import plan as plan_command
from cpt.commands.plan import CLUSTER_NAMES, GPU_NAMES
from cpt.commands.plan_report import gpu_in_node
from cpt.config import RunYaml, load
from cpt.model.configuration import load_config
from cpt.planning.estimate import Estimate, estimate
from cpt.planning.flops import flops_per_token
from cpt.planning.hardware import CLUSTERS, GPUS, Assumptions, with_fabric
from cpt.planning.memory import ParameterCounts, count_parameters
from cpt.planning.search import SIMPLER_UNTIL, Layout, Places, as_config, layouts, search
from cpt.planning.traffic import traffic
from tests.support.launcher import ROOT

FILES = [
    "--config",
    str(ROOT / "configs" / "gpt-oss-20b.yaml"),
    "--ds_config",
    str(ROOT / "ds_configs" / "z3_ep.json"),
]
H100, ASSUMED = GPUS["h100"], Assumptions()


@functools.cache
def model(name: str = "gpt-oss-20b") -> tuple[GptOssConfig, ParameterCounts]:
    config = load_config(None, name)
    return config, count_parameters(config, ())


@functools.cache
def run_of(seq_len: int, rows: int) -> RunYaml:
    run, _ = load(Path(FILES[1]), Path(FILES[3]), {})
    return dataclasses.replace(
        run, train=dataclasses.replace(run.train, seq_len=seq_len, global_batch_size=rows)
    )


def layout(**changes: Any) -> Layout:
    plain = Layout(
        sp_size=1,
        ep_size=1,
        stage=3,
        micro_batch_size=1,
        activation_checkpointing=True,
        offload_checkpoints=False,
    )
    return dataclasses.replace(plain, **changes)


def estimated(
    gpus: int = 16,
    name: str = "gpt-oss-20b",
    seq_len: int = 4096,
    assumed: Assumptions = ASSUMED,
    **changes: Any,
) -> Estimate:
    config, counts = model(name)
    resolved = as_config(layout(**changes), run_of(seq_len, 512), config, gpus)
    return estimate(resolved, config, counts, H100, assumed)


@pytest.mark.parametrize(
    ("name", "seq_len", "gigaflops"),
    [
        ("gpt-oss-20b", 4096, 22.9),
        ("gpt-oss-20b", 8192, 24.1),
        ("gpt-oss-20b", 32768, 31.4),
        ("gpt-oss-120b", 4096, 32.7),
        ("gpt-oss-120b", 8192, 34.5),
        ("gpt-oss-120b", 32768, 45.4),
    ],
)
def test_operations_of_a_token_are_those_counted_by_hand(
    name: str, seq_len: int, gigaflops: float
) -> None:
    """Worked out from the model card's active parameters; rounded to 0.1 there."""
    assert flops_per_token(model(name)[0], seq_len).total / 1e9 == pytest.approx(
        gigaflops, abs=0.051
    )


def test_share_of_the_peak_in_place_of_parts_gives_the_tokens_that_the_peak_allows() -> None:
    """40 % of 989 TFLOP/s over 22.9 GFLOPs is 17.3k tokens/s; recomputation leaves three
    quarters.
    """
    tokens = 512 * 4096 / 16
    forty = dataclasses.replace(ASSUMED, mfu=0.4)
    once = estimated(activation_checkpointing=False, assumed=forty)
    assert tokens / once.seconds["compute"] == pytest.approx(17_300, rel=0.005)
    twice = estimated(assumed=forty)
    assert tokens / twice.seconds["compute"] == pytest.approx(0.75 * 17_300, rel=0.005)
    assert once.parts == twice.parts == {}


def test_state_of_16_bytes_per_parameter_is_divided_by_the_ranks() -> None:
    """2 for bf16 weights, 4 for fp32 gradients, 12 for master weights and moments."""
    memory = estimated(gpus=8).memory
    state = sum(memory[part] for part in ("weights", "gradients", "optimizer"))
    assert state / 8 == pytest.approx(18 * 20.914757184e9 / 64, rel=1e-3)


def test_nothing_leaves_a_node_of_eight() -> None:
    for ep_size, sp_size in ((1, 1), (8, 8), (4, 2)):
        assert all(
            wire.inter == 0
            for wire in estimated(gpus=8, ep_size=ep_size, sp_size=sp_size).wire.values()
        )


def test_experts_of_one_node_are_gathered_between_nodes_and_never_inside() -> None:
    """Expert parallel 8 on two nodes: the other copy of an expert's shard lies on the other
    node.
    """
    config, counts = model()
    only_experts = dataclasses.replace(counts, dense=0, trained_dense=0)
    resolved = as_config(layout(ep_size=8), run_of(4096, 512), config, 16)
    gather = traffic(resolved, config, only_experts, 8)["ZeRO gather"]
    micro_steps = resolved.gradient_accumulation_steps
    assert gather.intra == 0 and gather.inter == 2 * micro_steps * 2 * counts.experts / 8 / 2


def test_without_expert_parallelism_one_hop_in_eight_leaves_the_node() -> None:
    gather = estimated(gpus=32).wire["ZeRO gather"]
    assert gather.intra == pytest.approx(7 * gather.inter)
    assert gather.total == pytest.approx(2 * (512 / 32) * 2 * 20.914757184e9 * 31 / 32)


def test_exchanges_over_two_nodes_are_split_by_where_the_peers_are() -> None:
    """Of 15 peers 7 are in the node; of 15 neighbors in a row one is in the next node."""
    wire = estimated(gpus=16, sp_size=16, ep_size=16, seq_len=32768).wire
    assert wire["ulysses"].intra / wire["ulysses"].total == pytest.approx(7 / 15)
    assert wire["experts"].intra / wire["experts"].total == pytest.approx(7 / 15)
    assert wire["halo"].inter / wire["halo"].total == pytest.approx(1 / 15)


EXPERTS = ("experts: products", "experts: the rest")


def test_imbalance_slows_experts_and_their_exchange_only() -> None:
    even = estimated(ep_size=8)
    skewed = estimated(ep_size=8, assumed=dataclasses.replace(ASSUMED, imbalance=2.0))
    for part, seconds in even.parts.items():
        if part in EXPERTS:
            # the weights are read once, however many rows they meet
            assert 1.8 < skewed.parts[part] / seconds <= 2
        else:
            assert skewed.parts[part] == seconds
    assert skewed.exchange_seconds == pytest.approx(2 * even.exchange_seconds)


def test_experts_in_halves_hide_half_of_their_exchange_at_most_for_more_memory() -> None:
    config, counts = model()
    even = estimated(ep_size=8, seq_len=32768)
    with_halves = dataclasses.replace(even.config.model, expert_overlap="halves")
    resolved = dataclasses.replace(even.config, model=with_halves)
    found = estimate(resolved, config, counts, H100, ASSUMED)
    computing = sum(even.parts[part] for part in EXPERTS)
    hidden = min(even.exchange_seconds / 2, computing)
    assert even.exchange_seconds - found.exchange_seconds == pytest.approx(hidden) and hidden > 0
    assert even.step_seconds - found.step_seconds == pytest.approx(hidden)
    rows = 32768 * config.num_experts_per_tok
    more = sum(found.memory.values()) - sum(even.memory.values())
    values = 5 * config.intermediate_size // 2
    matrices = 3 * config.num_local_experts // 8 * config.hidden_size * config.intermediate_size
    # two bytes each; another moment of the step may have been the peak before
    assert 0 < more <= 2 * (rows * values + matrices)


def test_without_expert_parallelism_no_rank_is_busier_than_another() -> None:
    skewed = estimated(ep_size=1, assumed=dataclasses.replace(ASSUMED, imbalance=2.0))
    assert skewed.step_seconds == estimated(ep_size=1).step_seconds


def test_offloading_moves_memory_from_device_to_host() -> None:
    plain = estimated(gpus=16)
    places = Places(offloads=("offload_optimizer", "offload_param"))
    moved = estimated(gpus=16, places=places, offload_checkpoints=True)
    for part in ("weights", "gradients", "optimizer"):
        assert moved.memory[part] == 0 and moved.host[part] == plain.memory[part]
    assert moved.nvme == plain.nvme == {}
    inputs = 24 * 4096 * 2880 * 2
    assert moved.host["layer inputs"] == inputs
    assert plain.memory["activations"] - moved.memory["activations"] == inputs * 22 // 24
    assert (
        moved.seconds["PCIe"] > 0 == plain.seconds["PCIe"]
        and moved.seconds["update"] > plain.seconds["update"]
    )


@pytest.mark.parametrize(
    ("name", "gpus", "seq_len"), [("gpt-oss-20b", 16, 131072), ("gpt-oss-120b", 64, 4096)]
)
def test_layout_found_starts_and_no_layout_that_fits_is_clearly_faster(
    name: str, gpus: int, seq_len: int
) -> None:
    config, counts = model(name)
    run = run_of(seq_len, 64 if seq_len > 4096 else 512)
    found = search(run, config, counts, gpus, H100, ASSUMED)
    assert found is not None and found[1].fits
    rates = []
    for other in [
        candidate for candidate in layouts(run, config, gpus) if candidate.micro_batch_size == 1
    ]:
        one = estimate(as_config(other, run, config, gpus), config, counts, H100, ASSUMED)
        rates.append(one.tokens_per_gpu_second if one.fits else 0.0)
    assert max(rates) <= SIMPLER_UNTIL * found[1].tokens_per_gpu_second


def test_120b_needs_the_host_on_8_and_16_gpus_of_80_gb_and_nothing_but_gpus_on_64() -> None:
    """State of 18 bytes per parameter is 2.1 TB: 263 GB each on 8, 131 GB on 16, 33 GB on 64.

    Of the 8, gradients stay on the GPUs and weights do not: with gradients the host would hold 1.87
    TB, and it is filled up to 85 % of 2 TB; beside gradients the GPUs have no room for weights.
    """
    config, counts = model("gpt-oss-120b")
    found = {
        gpus: search(run_of(4096, 512), config, counts, gpus, H100, ASSUMED) for gpus in (8, 16, 64)
    }
    assert found[8] is not None and found[16] is not None and found[64] is not None
    both = ("offload_optimizer", "offload_param")
    assert found[8][0].places == Places(offloads=both, gradients="device")
    assert found[8][0].optimizer_state is None
    assert "offload_optimizer" in found[16][0].places.offloads
    assert found[64][0].places == Places()


@pytest.mark.parametrize(
    ("setting", "seq_len", "sp_sizes", "ep_sizes"),
    [
        ({"expert_overlap": "halves"}, 4096, {1, 2, 4, 8, 16, 32}, {2, 4, 8, 16}),
        ({"ulysses_groups": 2}, 4096, {2, 4}, {1, 2, 4, 8, 16, 32}),
        ({"window_exchange": "halo"}, 512, {1, 2, 4}, {1, 2, 4, 8, 16, 32}),
    ],
)
def test_search_leaves_out_the_sizes_that_a_start_with_such_an_exchange_refuses(
    setting: dict[str, Any], seq_len: int, sp_sizes: set[int], ep_sizes: set[int]
) -> None:
    """The model has 32 experts, 8 key/value heads, and a window of 128 tokens."""
    config, counts = model("gpt-oss-20b")
    run = run_of(seq_len, 512)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, **setting))
    tried = list(layouts(run, config, 32))
    assert {one.sp_size for one in tried} == sp_sizes
    assert {one.ep_size for one in tried} == ep_sizes
    first_of_sizes = {(one.sp_size, one.ep_size): one for one in reversed(tried)}
    for one in first_of_sizes.values():
        as_config(one, run, config, 32)
    found = search(run, config, counts, 32, H100, ASSUMED)
    assert found is not None and found[1].fits


# the command


def plan(*arguments: str) -> int:
    return main(["plan", *FILES, *arguments])


def test_one_point_shows_the_files_beside_the_best_layout(capsys: Any) -> None:
    assert plan("--gpus", "8", "--model", "gpt-oss-20b", "--seq_len", "4096") == 0
    printed = capsys.readouterr().out
    assert "as configured" in printed and "best found" in printed and '"autoep_size"' in printed
    for row in (
        "optimizer",
        "ZeRO gather",
        "experts",
        "GFLOPs per token",
        "bottleneck",
        "tokens/s/GPU",
        "NVLink",
    ):
        assert f"  {row}" in printed, row
    assert "products 745 TFLOP/s" in printed and "routing: balanced" in printed
    assert "experts: products" in printed and "loss head" in printed


def test_share_of_the_peak_overrides_the_parts(capsys: Any) -> None:
    point = ["--gpus", "8", "--model", "gpt-oss-20b", "--seq_len", "4096"]
    assert plan(*point, "--mfu", "0.4") == 0
    printed = capsys.readouterr().out
    assert "computing reaches 40% of it (--mfu)" in printed
    assert "experts: products" not in printed


def test_many_points_are_a_table_and_a_plot(tmp_path: Path, capsys: Any) -> None:
    svg = tmp_path / "cost.svg"
    sizes = ["--seq_len", "4096", "32768", "--batch_tokens", str(2**22), "--plot", str(svg)]
    assert (
        plan("--gpus", "8", "64", "--gpu", "h200", "--model", "gpt-oss-20b", "gpt-oss-120b", *sizes)
        == 0
    )
    lines = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("  gpt-oss")
    ]
    points = itertools.product(("gpt-oss-20b", "gpt-oss-120b"), ("4096", "32768"), ("8", "64"))
    assert [line[:3] for line in lines] == [list(point) for point in points]
    assert (
        "Computed, not measured: H200" in svg.read_text()
        and svg.read_text().count(">20b, 32,768<") == 2
    )


def test_configuration_that_does_not_start_is_told_beside_the_best_layout(capsys: Any) -> None:
    """64 rows cannot be divided among 128 data-parallel ranks; two ranks that share a row can take
    them.
    """
    rows = ("--set", "train.global_batch_size=64", "--set", "train.micro_batch_size=1")
    assert plan("--gpus", "128", "--model", "gpt-oss-20b", *rows) == 0
    printed = capsys.readouterr().out
    assert (
        "as configured it does not start on 128 GPUs:" in printed
        and "global_batch_size=64 rows" in printed
    )
    assert "best found" in printed and '"sequence_parallel_size": 2' in printed


def test_files_that_exchange_experts_in_halves_stand_beside_the_best_layout(capsys: Any) -> None:
    assert (
        plan("--gpus", "8", "--model", "gpt-oss-20b", "--set", "model.expert_overlap=halves") == 0
    )
    printed = capsys.readouterr().out
    assert "as configured" in printed and "best found" in printed
    assert "does not start" not in printed


def test_weights_that_are_not_here_need_the_name_of_their_architecture(capsys: Any) -> None:
    assert plan("--gpus", "8") == 78
    assert "--model gpt-oss-20b" in capsys.readouterr().err


NODES_OF_ONE = dataclasses.replace(ASSUMED, ranks_per_node=1)
NODES_OF_FOUR = dataclasses.replace(ASSUMED, ranks_per_node=4)


def test_names_on_the_command_line_are_those_of_the_hardware() -> None:
    assert set(GPU_NAMES) == set(GPUS) and set(CLUSTER_NAMES) == set(CLUSTERS)


def test_exchange_over_nodes_of_four_crosses_the_fabric_which_one_of_eight_does_not() -> None:
    inside = estimated(ep_size=8, sp_size=8)
    across = estimated(ep_size=8, sp_size=8, assumed=NODES_OF_FOUR)
    for kind in ("ulysses", "experts"):
        assert inside.wire[kind].inter == 0
        assert across.wire[kind].total == pytest.approx(inside.wire[kind].total)
        # of seven peers three are on the same node
        assert across.wire[kind].inter == pytest.approx(across.wire[kind].total * 4 / 7)
    by_hand = 0.0
    for kind in ("ulysses", "experts"):
        by_hand += across.wire[kind].inter / (ASSUMED.network_share * H100.network_bytes_per_second)
    assert across.exchange_seconds == pytest.approx(by_hand)
    assert across.exchange_seconds > inside.exchange_seconds


def test_everything_crosses_the_fabric_where_a_node_has_one_gpu() -> None:
    found = estimated(gpus=8, ep_size=4, sp_size=2, assumed=NODES_OF_ONE)
    assert sum(wire.intra for wire in found.wire.values()) == 0
    for kind in ("ZeRO gather", "ZeRO reduce", "halo", "experts"):
        assert found.wire[kind].inter > 0, kind


def test_half_the_fabric_takes_twice_the_time() -> None:
    config, counts = model()
    resolved = as_config(layout(ep_size=16), run_of(4096, 512), config, 16)
    full = estimate(resolved, config, counts, H100, ASSUMED)
    half = estimate(resolved, config, counts, with_fabric(H100, 8, 1600), ASSUMED)
    assert half.seconds["InfiniBand"] == pytest.approx(2 * full.seconds["InfiniBand"])
    assert half.exchange_seconds > full.exchange_seconds


@pytest.mark.parametrize(
    ("arguments", "ranks", "gigabytes", "host", "name"),
    [
        ([], 8, 50, 250, "H100 SXM 80 GB"),
        (["--gpu", "h100-94gb", "--fabric_gbit", "800"], 4, 25, 250, "H100 SXM 94 GB"),
        (["--gpu", "gh200-96gb"], 1, 50, 480, "GH200 96 GB"),
        (["--gpu", "gh200-144gb", "--ranks_per_node", "4"], 4, 50, 480, "GH200 144 GB"),
        (["--cluster", "tsubame4"], 4, 25, 206, "H100 SXM 94 GB"),
        (["--cluster", "abci3"], 8, 25, 256, "H200 SXM 141 GB"),
        (["--cluster", "miyabi"], 1, 25, 120, "GH200 96 GB"),
        (["--cluster", "abci3", "--fabric_gbit", "3200"], 8, 50, 256, "H200 SXM 141 GB"),
        (["--cluster", "abci3", "--gpu", "b200"], 8, 25, 256, "B200 180 GB"),
        (["--ranks_per_node", "4", "--host_memory_gb", "512"], 4, 50, 128, "H100 SXM 80 GB"),
    ],
)
def test_node_is_that_of_the_cluster_or_the_usual_one_as_far_as_no_option_changes_it(
    arguments: list[str], ranks: int, gigabytes: float, host: float, name: str
) -> None:
    """`gigabytes` per second and `host` gigabytes are the shares of one GPU."""
    gpu = gpu_in_node(options(*arguments))
    assert (gpu.name, gpu.ranks_per_node) == (name, ranks)
    assert gpu.network_bytes_per_second == pytest.approx(gigabytes * 1e9)
    assert gpu.host_memory_bytes == pytest.approx(host * 1e9, rel=0.005)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan_command.add_parser(parser.add_subparsers())
    return parser.parse_args(["plan", *FILES, "--gpus", "8", *arguments])


def test_plan_prints_the_node_that_it_assumes(capsys: Any) -> None:
    arguments = ["--gpus", "16", "--model", "gpt-oss-20b", "--cluster", "tsubame4"]
    assert plan(*arguments) == 0
    printed = capsys.readouterr().out
    assert "on 16 x H100 SXM 94 GB" in printed
    assert "InfiniBand 22.5 GB/s per GPU and direction, 4 ranks per node with 800 Gbit/s" in printed


def test_options_that_make_no_sense_are_refused_together(capsys: Any) -> None:
    wrong = ["--mfu", "1.5", "--overlap", "2", "--imbalance", "0.5"]
    wrong += ["--ranks_per_node", "0", "--fabric_gbit", "-1"]
    assert plan("--gpus", "0", "--model", "gpt-oss-20b", *wrong) == 78
    told = capsys.readouterr().err
    assert all(
        option in told
        for option in (
            "--gpus",
            "--mfu is 1.5",
            "--overlap is 2",
            "--imbalance is 0.5",
            "--ranks_per_node is 0",
            "--fabric_gbit is -1",
        )
    )


def test_rows_that_do_not_divide_a_step_are_refused(capsys: Any) -> None:
    assert plan("--gpus", "8", "--model", "gpt-oss-20b", "--seq_len", "3000") == 78
    assert "1048576 tokens of a step are no multiple of rows of 3000" in capsys.readouterr().err
