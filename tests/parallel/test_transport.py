"""What NCCL can use is read from the kernel's files, and what it cannot use is told with a cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpt.parallel.transport import Transport, plugin_names, read_ports, read_transport


def add_device(
    root: Path, name: str, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)", **more: str
) -> None:
    """Write what the kernel shows of a device with one port."""
    device = root / "sys" / "class" / "infiniband" / name
    port = device / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text(f"{rate}\n")
    (port / "link_layer").write_text(f"{more.get('link_layer', 'InfiniBand')}\n")
    driver = root / "sys" / "bus" / "drivers" / more.get("driver", "mlx5_core")
    driver.mkdir(parents=True, exist_ok=True)
    (device / "device").mkdir()
    (device / "device" / "driver").symlink_to(driver)


def add_device_files(root: Path) -> None:
    """Write the files that a process needs to open a device."""
    folder = root / "dev" / "infiniband"
    folder.mkdir(parents=True)
    (folder / "uverbs0").touch()


def loader(*present: str) -> Any:
    """Return a stand-in for dlopen on a machine with these libraries."""

    def load(name: str) -> None:
        if name not in present:
            raise OSError(f"{name}: cannot open shared object file")

    return load


def seen(root: Path, *libraries: str, **variables: str) -> Transport:
    return read_transport(root, variables, loader(*libraries))


def test_active_ports_are_named_with_the_sum_of_their_rates(tmp_path: Path) -> None:
    for name in ("mlx5_0", "mlx5_1"):
        add_device(tmp_path, name)
    add_device(tmp_path, "mlx5_2", state="1: DOWN")
    add_device_files(tmp_path)
    found = seen(tmp_path, "libibverbs.so.1")
    assert found.problem() == ""
    assert found.describe() == "InfiniBand mlx5_0, mlx5_1 (800 Gbit/s)"


def test_missing_libibverbs_is_told_with_the_packages_that_bring_it(tmp_path: Path) -> None:
    add_device(tmp_path, "mlx5_0")
    add_device_files(tmp_path)
    found = seen(tmp_path)
    assert "mlx5_0, but there is no libibverbs in this environment" in found.problem()
    assert "libibverbs1, ibverbs-providers and librdmacm1" in found.problem()
    assert found.describe() == "TCP"


def test_container_without_the_device_files_is_told(tmp_path: Path) -> None:
    add_device(tmp_path, "mlx5_0")
    found = seen(tmp_path, "libibverbs.so.1")
    assert "/dev/infiniband" in found.problem() and "--device" in found.problem()


def test_ports_that_are_all_down_are_told(tmp_path: Path) -> None:
    add_device(tmp_path, "mlx5_0", state="1: DOWN")
    add_device_files(tmp_path)
    assert seen(tmp_path, "libibverbs.so").problem().startswith("no port of mlx5_0 is active")


def test_node_without_devices_uses_tcp_and_there_is_nothing_to_mend(tmp_path: Path) -> None:
    found = seen(tmp_path)
    assert found.problem() == "" and found.describe().startswith("TCP (no InfiniBand")


@pytest.mark.parametrize(
    ("name", "value", "is_tcp"),
    [
        ("NCCL_IB_DISABLE", "1", True),
        ("NCCL_IB_DISABLE", "0", False),
        ("NCCL_IB_DISABLE", "", False),
        ("NCCL_NET", "Socket", True),
        ("NCCL_NET", "IB", False),
    ],
)
def test_tcp_that_somebody_chose_is_shown_with_the_variable(
    tmp_path: Path, name: str, value: str, is_tcp: bool
) -> None:
    add_device(tmp_path, "mlx5_0")
    add_device_files(tmp_path)
    found = seen(tmp_path, **{name: value})
    assert (found.describe() == f"TCP ({name}={value})") == is_tcp
    assert bool(found.problem()) != is_tcp


def test_efa_needs_the_plugin_and_no_libibverbs(tmp_path: Path) -> None:
    add_device(tmp_path, "rdmap79s0", driver="efa", link_layer="Unspecified", rate="")
    add_device_files(tmp_path)
    assert "aws-ofi-nccl" in seen(tmp_path, "libibverbs.so.1").problem()
    found = seen(tmp_path, "libnccl-net.so")
    assert found.problem() == "" and found.describe() == "EFA rdmap79s0"


def test_ethernet_ports_are_roce(tmp_path: Path) -> None:
    add_device(tmp_path, "mlx5_bond_0", link_layer="Ethernet", rate="25 Gb/sec (1X EDR)")
    (port,) = read_ports(tmp_path / "sys" / "class" / "infiniband")
    assert port.link == "RoCE" and port.gbit == 25


def test_named_plugin_is_looked_for_first() -> None:
    assert plugin_names({"NCCL_NET_PLUGIN": "ofi"}) == [
        "ofi",
        "libnccl-net-ofi.so",
        "libnccl-net.so",
    ]


def test_only_variables_of_nccl_are_kept(tmp_path: Path) -> None:
    found = seen(tmp_path, NCCL_IB_HCA="mlx5_0", HF_TOKEN="secret")
    assert found.variables == {"NCCL_IB_HCA": "mlx5_0"}
