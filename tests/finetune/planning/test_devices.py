"""GPU specs by name, by memory size and by the driver's name; this machine's devices."""

import subprocess

import pytest

from finetune.planning import devices
from finetune.planning.devices import GIB, GPUS, device, this_machine
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
    assert device(text) is GPUS[name]


def test_every_card_has_sensible_numbers() -> None:
    for gpu in GPUS.values():
        assert 10 * GIB < gpu.memory < 200 * GIB
        assert gpu.half >= gpu.single * 0.99 and gpu.bandwidth > 1e11
        assert 0 < gpu.used[0] < gpu.used[1] < 1
    assert [name for name, gpu in GPUS.items() if not gpu.bfloat16] == ["t4", "v100-32g", "v100-16g"]


@pytest.mark.parametrize("text", ["24GB", "24gb", "24 GB", "24G", "24GiB", "24.0GB"])
def test_a_size_is_a_card_of_unknown_speed(text: str) -> None:
    found = device(text)
    assert 23 * GIB < found.memory < 24 * GIB and found.room < found.memory
    assert found.peak("bfloat16") == 0 and found.bfloat16


def test_an_unknown_card_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        device("rtx4091")
    [problem] = caught.value.problems
    assert problem.where == "--gpu" and "did you mean 'rtx4090'?" in problem.repair
    with pytest.raises(UserError, match="--gpu 24GB"):
        device("something else")


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
def test_this_machine_has_what_the_driver_lists(
    spoken: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = f"{spoken}, 24564\n{spoken}, 24564\n"
    ended = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(devices.shutil, "which", lambda program: f"/usr/bin/{program}")
    monkeypatch.setattr(devices.subprocess, "run", lambda *words, **options: ended)
    found, count = this_machine()
    assert (found.name, count, found.half) == (spoken, 2, GPUS[name].half)
    assert 23.4 * GIB < found.memory < 23.7 * GIB


def test_a_card_that_is_not_listed_has_its_memory_and_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 0, stdout="NVIDIA GeForce GTX 1080, 8192\n")
    monkeypatch.setattr(devices.shutil, "which", lambda program: program)
    monkeypatch.setattr(devices.subprocess, "run", lambda *words, **options: ended)
    found, _ = this_machine()
    assert 7 * GIB < found.memory < 8 * GIB and found.half == 0


def test_a_driver_that_fails_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 9, stdout="NVIDIA-SMI has failed, 1\n")
    monkeypatch.setattr(devices.shutil, "which", lambda program: program)
    monkeypatch.setattr(devices.subprocess, "run", lambda *words, **options: ended)
    found, count = this_machine()
    assert (found.kind, count) == ("cpu", 1)


def test_the_cpu_has_the_machine_s_memory() -> None:
    found = device("cpu")
    assert found.kind == "cpu" and found.memory > GIB and found.single > 0
