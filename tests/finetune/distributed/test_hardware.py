"""GPU specs by name, by memory size and by the driver's name; this machine's devices."""

import subprocess

import pytest

from finetune.distributed import hardware
from finetune.distributed.hardware import GIB, GPUS, detect_devices, device_by_name
from finetune.recipe.errors import UserError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "h100"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA-RTX-4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("A100-40G", "a100-40g"),
        ("a100_40g", "a100-40g"),
        ("a100", "a100-80g"),
    ],
)
def test_a_card_goes_by_many_names(text: str, name: str) -> None:
    assert device_by_name(text) is GPUS[name]


def test_every_card_has_sensible_numbers() -> None:
    for gpu in GPUS.values():
        assert 10 * GIB < gpu.memory < 200 * GIB
        assert gpu.flops_16bit >= gpu.flops_float32 * 0.99 and gpu.bandwidth > 1e11
        assert 0 < gpu.utilization[0] < gpu.utilization[1] < 1
    assert [name for name, gpu in GPUS.items() if not gpu.bfloat16] == ["t4", "v100-32g", "v100-16g"]


@pytest.mark.parametrize("text", ["24GB", "24gb", "24 GB", "24G", "24GiB", "24.0GB"])
def test_a_size_is_a_card_of_unknown_speed(text: str) -> None:
    card = device_by_name(text)
    assert 23 * GIB < card.memory < 24 * GIB and card.available_bytes < card.memory
    assert card.peak_flops("bfloat16") == 0 and card.bfloat16


def test_an_unknown_gpu_is_reported_with_a_suggestion() -> None:
    with pytest.raises(UserError) as error:
        device_by_name("rtx4091")
    [problem] = error.value.problems
    assert problem.where == "--gpu" and "did you mean 'rtx4090'?" in problem.repair
    with pytest.raises(UserError, match="--gpu 24GB"):
        device_by_name("something else")


@pytest.mark.parametrize(
    ("spoken", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000ada"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16g"),
        ("Tesla V100-SXM2-32GB", "v100-32g"),
    ],
)
def test_this_machine_has_the_gpus_of_nvidia_smi(
    spoken: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = f"{spoken}, 24564\n{spoken}, 24564\n"
    ended = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(hardware.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(hardware.subprocess, "run", lambda *words, **options: ended)
    card, count = detect_devices()
    assert (card.name, count, card.flops_16bit) == (spoken, 2, GPUS[name].flops_16bit)
    assert 23.4 * GIB < card.memory < 23.7 * GIB


def test_an_unlisted_gpu_has_its_memory_and_unknown_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 0, stdout="NVIDIA GeForce GTX 1080, 8192\n")
    monkeypatch.setattr(hardware.shutil, "which", lambda program: program)
    monkeypatch.setattr(hardware.subprocess, "run", lambda *words, **options: ended)
    card, _ = detect_devices()
    assert 7 * GIB < card.memory < 8 * GIB and card.flops_16bit == 0


def test_a_driver_that_fails_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 9, stdout="NVIDIA-SMI has failed, 1\n")
    monkeypatch.setattr(hardware.shutil, "which", lambda program: program)
    monkeypatch.setattr(hardware.subprocess, "run", lambda *words, **options: ended)
    card, count = detect_devices()
    assert (card.kind, count) == ("cpu", 1)


def test_the_cpu_has_the_machine_s_memory() -> None:
    cpu = device_by_name("cpu")
    assert cpu.kind == "cpu" and cpu.memory > GIB and cpu.flops_float32 > 0
