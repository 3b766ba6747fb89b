"""Usable cores: CPU affinity, cgroup quotas, and every place that uses their number."""

import os
from pathlib import Path

import pytest
import torch

from benchmarks import learning
from pipelines import machine
from pipelines.machine import sizing, usable_cores
from tools import packing, verify
from train import distributed, rundir

CPU = torch.device("cpu")
V1 = "5:memory:/job\n4:cpuset,cpu:/job/part\n"


def cgroups(root: Path, membership: str, **texts: str) -> Path:
    """Write below `root` a /proc/self/cgroup with `membership`, and the named files of /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in texts.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cores", "membership", "texts"),
    [
        (8, "0::/\n", {}),
        (8, "0::/\n", {"cpu.max": "max 100000\n"}),
        (3, "0::/\n", {"cpu.max": "300000 100000\n"}),
        (8, "0::/\n", {"cpu.max": "6400000 100000\n"}),
        (1, "0::/\n", {"cpu.max": "150000 100000\n"}),
        (1, "0::/\n", {"cpu.max": "50000 100000\n"}),
        (2, "0::/a/b\n", {"a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}),
        (4, "0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "400000 100000\n"}),
        (3, "0::/host/path\n", {"cpu.max": "300000 100000\n"}),
        (2, V1, {"cpu/job/cpu.cfs_quota_us": "200000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}),
        (8, V1, {"cpu/job/cpu.cfs_quota_us": "-1\n", "cpu/job/cpu.cfs_period_us": "100000\n"}),
        (5, V1, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "50000\n"}),
        (8, V1, {"memory/job/cpu.cfs_quota_us": "1\n", "cpu/job/cpu.cfs_quota_us": "nonsense"}),
    ],
)
def test_cores_are_the_smaller_of_affinity_and_quota(cores, membership, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cores(cgroups(tmp_path, membership, **texts)) == cores


def test_without_cgroups_cores_are_the_affinity(tmp_path):
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_every_number_of_cores_follows_the_quota(tmp_path, monkeypatch):
    root = cgroups(tmp_path, "0::/\n", **{"cpu.max": "600000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for user in (
        machine,
        packing,
        verify,
        distributed,
        rundir,
        learning,
    ):
        monkeypatch.setattr(user, "usable_cores", lambda: usable_cores(root))
    assert packing.PackOptions().processes == 6
    assert distributed.torch_threads(distributed.World(0, 1, CPU)) == 6
    assert rundir.environment()["cpus"] == 6
    assert sizing(CPU).threads == 6
    assert verify.decoder.__wrapped__().num_threads == 6
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.distributed.run.run", lambda _: None)
    with pytest.raises(SystemExit):
        distributed.launch(2, 0)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_learning_benchmarks_use_as_many_cores_as_the_quota_allows(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(learning, "usable_cores", lambda: 2)
    used: set[int] = set()
    monkeypatch.setattr(learning, "run_on", lambda core, _: used.add(core))
    learning.run_all([["a"] * 50] * 50)
    assert used <= {0, 1}
