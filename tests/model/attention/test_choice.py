"""Which backend runs on which machine, and what a refusal says."""

from dataclasses import replace

import pytest
import torch

from cpt.model.attention import Attention, choose
from cpt.model.attention.choice import BACKENDS, chosen_backend, known_names
from cpt.model.attention.machine import Machine

CUDA = torch.device("cuda")
ALL_PACKAGES = {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36", "triton": "3.6.0"}
H100 = Machine(
    compute_capability=(9, 0),
    torch_build="2.13.0+cu130",
    torch_has_flash=True,
    packages=ALL_PACKAGES,
)
NO_GPU = Machine(compute_capability=None, torch_build="2.13.0+cpu", torch_has_flash=False)

MACHINES = {
    "H100 with everything": (H100, "flash_attn_4"),
    "B200 with everything": (replace(H100, compute_capability=(10, 0)), "flash_attn_4"),
    "H100 with torch alone": (replace(H100, packages={"triton": "3.6.0"}), "torch_flash"),
    "H100 with an old flash-attn-4": (
        replace(H100, packages={"flash-attn-4": "4.0.0b25"}),
        "torch_flash",
    ),
    "A100 with everything": (replace(H100, compute_capability=(8, 0)), "torch_flash"),
    "RTX 5090 with everything": (replace(H100, compute_capability=(12, 0)), "torch_flash"),
    "A100, torch without flash": (
        replace(H100, compute_capability=(8, 0), torch_has_flash=False),
        "flash_attn_2",
    ),
    "A100, torch without flash, no package": (
        replace(
            H100, compute_capability=(8, 0), torch_has_flash=False, packages={"triton": "3.6.0"}
        ),
        "flex",
    ),
}


def attention_of(name: str) -> Attention:
    return next(backend.attention for backend in BACKENDS if backend.name == name)


@pytest.mark.parametrize(("machine", "name"), MACHINES.values(), ids=MACHINES)
def test_auto_takes_the_fastest_backend_that_is_right_for_the_gpu(
    machine: Machine, name: str
) -> None:
    got = choose("auto", device=CUDA, dtype=torch.bfloat16, head_dim=64, machine=machine)
    assert got is attention_of(name)


def test_float32_on_a_gpu_is_for_flex_alone() -> None:
    assert (
        chosen_backend("auto", device=CUDA, dtype=torch.float32, head_dim=64, machine=H100).name
        == "flex"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_gets_the_cpu_kernel_even_beside_a_gpu(dtype: torch.dtype) -> None:
    assert (
        chosen_backend(
            "auto", device=torch.device("cpu"), dtype=dtype, head_dim=64, machine=H100
        ).name
        == "cpu"
    )


def test_auto_never_takes_the_reference() -> None:
    old = Machine(compute_capability=(7, 0), torch_build="2.13.0+cu130", torch_has_flash=True)
    with pytest.raises(ValueError) as error:
        choose("auto", device=CUDA, dtype=torch.bfloat16, head_dim=64, machine=old)
    text = str(error.value)
    assert text.startswith(
        "attention 'auto' cannot run. flash_attn_4: it has no code for this GPU, SM70"
    )
    assert all(
        f"{name}: " in text for name in ("flash_attn_4", "torch_flash", "flash_attn_2", "flex")
    )
    assert "cpu:" not in text and text.endswith('attention "reference" runs everywhere.')


REFUSALS = {
    "no GPU": (
        "torch_flash",
        NO_GPU,
        torch.bfloat16,
        64,
        "no CUDA GPU is visible (torch is a CPU build): needs",
    ),
    "AMD": ("torch_flash", replace(H100, is_rocm=True), torch.bfloat16, 64, "built for AMD GPUs"),
    "not in torch": (
        "torch_flash",
        replace(H100, torch_has_flash=False),
        torch.bfloat16,
        64,
        "torch 2.13.0+cu130 is built without FlashAttention: install a wheel from pytorch.org",
    ),
    "float32": (
        "torch_flash",
        H100,
        torch.float32,
        64,
        "no code for torch.float32: needs bfloat16 or float16 (train.",
    ),
    "head size": (
        "torch_flash",
        H100,
        torch.bfloat16,
        36,
        "head_dim 36 is not a multiple of 8 up to 256",
    ),
    "no package": (
        "flash_attn_2",
        replace(H100, packages={}),
        torch.bfloat16,
        64,
        "package flash-attn is not installed: pip install 'flash-attn>=2.8' --no-build-isolation",
    ),
    "old package": (
        "flash_attn_4",
        replace(H100, packages={"flash-attn-4": "4.0.0b20"}),
        torch.bfloat16,
        64,
        "package flash-attn-4 4.0.0b20 is older than 4.0.0b26: "
        "pip install 'flash-attn-4>=4.0.0b26'",
    ),
    "no backward with sinks": (
        "flash_attn_4",
        replace(H100, compute_capability=(12, 0)),
        torch.bfloat16,
        64,
        "it has no code for this GPU, SM120: needs one of SM9x, SM10x, SM11x",
    ),
    "large head": ("flash_attn_4", H100, torch.bfloat16, 256, "head_dim 256 is above 128"),
    "no triton": (
        "flex",
        replace(H100, packages={}),
        torch.bfloat16,
        64,
        "package triton is not installed",
    ),
    "small head": ("flex", H100, torch.bfloat16, 8, "head_dim 8 is below 16"),
}


@pytest.mark.parametrize(
    ("name", "machine", "dtype", "head_dim", "message"), REFUSALS.values(), ids=REFUSALS
)
def test_a_refusal_says_why_and_what_would_help(
    name: str, machine: Machine, dtype: torch.dtype, head_dim: int, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        choose(name, device=CUDA, dtype=dtype, head_dim=head_dim, machine=machine)
    assert f"attention {name!r} cannot run. {name}: " in str(error.value) and message in str(
        error.value
    )


def test_all_reasons_are_given_at_once() -> None:
    backend = next(backend for backend in BACKENDS if backend.name == "flash_attn_2")
    reason = backend.usable(CUDA, torch.float32, 64, NO_GPU)
    assert reason is not None
    assert [part.split()[0] for part in reason.split("; ")] == ["no", "it", "package"]


def test_a_gpu_backend_is_refused_for_tensors_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="torch_flash: it reads CUDA tensors, these are on cpu"):
        choose(
            "torch_flash",
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            head_dim=64,
            machine=H100,
        )


def test_names_are_in_the_order_of_auto() -> None:
    assert known_names() == (
        "auto",
        "flash_attn_4",
        "torch_flash",
        "flash_attn_2",
        "flex",
        "cpu",
        "reference",
    )


def test_facts_of_this_machine_can_be_read() -> None:
    machine = Machine.of(torch.device("cpu"))
    assert machine.torch_build == torch.__version__
    assert (machine.compute_capability is None) == (not torch.cuda.is_available())
