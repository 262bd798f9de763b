"""Limits of containers and the GPUs that torch would use, from files of invented machines."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

from golfbook import machine
from golfbook.errors import RunError

MIB = 2**20
V2 = "29 23 0:26 {top} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate"
V1 = "\n".join(
    f"3{i} 25 0:3{i} {{top}} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}"
    for i, name in enumerate(("cpu,cpuacct", "memory"))
)


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 cores and 256 GiB."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 256 * 1024 * MIB}))


def write(root: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def test_a_machine_without_limits(tmp_path: Path) -> None:
    assert machine.available_cores(tmp_path) == 64 and machine.available_memory(tmp_path) == 256 * 1024 * MIB
    free = {
        "proc/self/cgroup": "0::/user.slice",
        "proc/self/mountinfo": V2.format(top="/"),
        "sys/fs/cgroup/user.slice/cpu.max": "max 100000",
        "sys/fs/cgroup/user.slice/memory.max": "max",
        "sys/fs/cgroup/user.slice/memory.current": 5 * MIB,
    }
    write(tmp_path, free)
    assert machine.available_cores(tmp_path) == 64 and machine.available_memory(tmp_path) == 256 * 1024 * MIB
    assert machine.available_cores() >= 0.01 and machine.available_memory() > 0, "this machine"


def test_limits_of_version_2_hold_for_all_groups_below(tmp_path: Path) -> None:
    own = "sys/fs/cgroup/job.slice/task"
    files = {
        "proc/self/cgroup": "0::/job.slice/task",
        "proc/self/mountinfo": V2.format(top="/"),
        "sys/fs/cgroup/job.slice/cpu.max": "150000 100000",
        f"{own}/cpu.max": "400000 100000",
        f"{own}/memory.max": 900 * MIB,
        f"{own}/memory.current": 500 * MIB,
        f"{own}/memory.stat": f"anon {200 * MIB}\nactive_file {100 * MIB}\ninactive_file {200 * MIB}",
    }
    write(tmp_path, files)
    assert machine.available_cores(tmp_path) == 1.5
    assert machine.available_memory(tmp_path) == 700 * MIB, "what files take is given back"
    high = {
        "sys/fs/cgroup/job.slice/memory.high": 600 * MIB,
        "sys/fs/cgroup/job.slice/memory.current": 700 * MIB,
    }
    assert machine.available_memory(write(tmp_path, high)) == 0


@pytest.mark.parametrize("top", ["/", "/docker/abc", "/elsewhere"])
def test_limits_of_version_1(tmp_path: Path, top: str) -> None:
    """The path is one of the whole machine, of the container, or (by another namespace) of neither."""
    inside = "docker/abc/" if top == "/" else ""
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/",
        "proc/self/mountinfo": f"31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n{V1.format(top=top)}",
        f"sys/fs/cgroup/cpu,cpuacct/{inside}cpu.cfs_quota_us": 50000,
        f"sys/fs/cgroup/cpu,cpuacct/{inside}cpu.cfs_period_us": 100000,
        f"sys/fs/cgroup/memory/{inside}memory.limit_in_bytes": 900 * MIB,
        f"sys/fs/cgroup/memory/{inside}memory.usage_in_bytes": 100 * MIB,
        f"sys/fs/cgroup/memory/{inside}memory.stat": f"inactive_file 1\ntotal_inactive_file {40 * MIB}",
    }
    write(tmp_path, files)
    assert machine.available_cores(tmp_path) == 0.5 and machine.available_memory(tmp_path) == 840 * MIB
    write(tmp_path, {f"sys/fs/cgroup/cpu,cpuacct/{inside}cpu.cfs_quota_us": -1})
    assert machine.available_cores(tmp_path) == 64


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    mounts = {"proc/self/mountinfo": V2.format(top="/").replace("/sys/fs", "/my\\040groups")}
    write(tmp_path, {**mounts, "proc/self/cgroup": "0::/", "my groups/cgroup/cpu.max": "200000 100000"})
    assert machine.available_cores(tmp_path) == 2


def pretend(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str) -> None:
    """Install a torch that says in version.py what it was built for."""
    write(folder, {"torch/__init__.py": "raise SystemExit('imported')", "torch/version.py": version})
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.delitem(sys.modules, "torch")


@pytest.mark.parametrize("version", ["cuda: Optional[str] = None\nhip: Optional[str] = None", "cuda = None"])
def test_a_torch_for_the_cpu_uses_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    pretend(monkeypatch, tmp_path, version)
    write(tmp_path, {"dev/nvidia0": "", "dev/nvidiactl": ""})
    monkeypatch.setattr(machine, "count_gpus", lambda allowed: pytest.fail("nothing to ask"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert machine.visible_gpus(tmp_path) == []


@pytest.mark.parametrize("allowed", ["0,1,2,3,4,5,6,7", "NoDevFiles", "", "-1", None])
def test_an_environment_variable_makes_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: str | None
) -> None:
    pretend(monkeypatch, tmp_path, "cuda: Optional[str] = '12.8'")
    monkeypatch.setattr(machine, "count_gpus", lambda allowed: pytest.fail("nothing to ask"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed or "")
    if allowed is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    write(tmp_path, {"dev/null": "", "dev/nvidiactl": ""})
    assert machine.visible_gpus(tmp_path) == []


def test_where_a_gpu_may_be_torch_decides_how_many_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, tmp_path, "cuda: str = '12.8'\nhip = None")
    write(tmp_path, {"dev/nvidia0": "", "dev/nvidia1": ""})
    counts = {None: 2, "1, 0": 2, "GPU-8f,9": 1, "NoDevFiles": 0}
    monkeypatch.setattr(machine, "count_gpus", lambda allowed: counts[allowed])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = [machine.visible_gpus(tmp_path)]
    for allowed in ("1, 0", "GPU-8f,9", "NoDevFiles"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
        found.append(machine.visible_gpus(tmp_path))
    assert found == [["0", "1"], ["1", "0"], ["GPU-8f"], []]


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert machine.count_gpus(None) == seen == len(machine.visible_gpus())


def test_a_torch_that_cannot_be_asked_is_no_machine_without_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"torch/__init__.py": "raise ImportError('libcudart.so is missing')"})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunError, match=r"torch could not be asked for its GPUs: ImportError: libcudart\.so is missing"):
        machine.count_gpus("broken")
