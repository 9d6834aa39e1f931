import os
import subprocess
import sys

import psutil
import pytest

from penstock.io.limits import available_cores, available_memory, peak_memory

MIB = 1 << 20


def write_tree(root, cgroup, files):
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def v2(group, limit, usage, file=0, high="max"):
    base = f"sys/fs/cgroup/{group}"
    stat = f"anon 1\nfile {file + 999}\nactive_file {file // 2}\ninactive_file {file - file // 2}\n"
    return {
        f"{base}/memory.max": f"{limit}\n",
        f"{base}/memory.high": f"{high}\n",
        f"{base}/memory.current": f"{usage}\n",
        f"{base}/memory.stat": stat,
    }


def test_file_pages_count_as_free(tmp_path):
    write_tree(tmp_path, "0::/app\n", v2("app", 100 * MIB, 70 * MIB, file=50 * MIB))
    assert available_memory(root=tmp_path) == 80 * MIB


def test_the_tightest_enclosing_group_counts(tmp_path):
    tree = v2("a/b", "max", 20 * MIB) | v2("a", 64 * MIB, 60 * MIB)
    write_tree(tmp_path, "0::/a/b\n", tree)
    assert available_memory(root=tmp_path) == 4 * MIB


def test_memory_high_is_a_limit_too(tmp_path):
    write_tree(tmp_path, "0::/\n", v2("", 100 * MIB, 10 * MIB, high=50 * MIB))
    assert available_memory(root=tmp_path) == 40 * MIB


def test_the_mount_is_looked_at_when_the_path_is_the_hosts(tmp_path):
    write_tree(tmp_path, "0::/kubepods/pod1/container2\n", v2("", 32 * MIB, 2 * MIB))
    assert available_memory(root=tmp_path) == 30 * MIB


def test_outside_the_cgroup_namespace(tmp_path):
    write_tree(tmp_path, "0::/../../other\n", v2("", 32 * MIB, 2 * MIB))
    assert available_memory(root=tmp_path) == 30 * MIB


def test_version_1(tmp_path):
    base = "sys/fs/cgroup/memory/docker/x"
    files = {
        f"{base}/memory.limit_in_bytes": f"{100 * MIB}\n",
        f"{base}/memory.usage_in_bytes": f"{90 * MIB}\n",
        f"{base}/memory.stat": f"active_file 1\ntotal_active_file {10 * MIB}\ntotal_inactive_file {MIB}\n",
    }
    write_tree(tmp_path, "9:name=systemd:/\n4:memory:/docker/x\n0::/\n", files)
    assert available_memory(root=tmp_path) == 21 * MIB


def test_over_the_limit_is_zero(tmp_path):
    write_tree(tmp_path, "0::/\n", v2("", MIB, 2 * MIB))
    assert available_memory(root=tmp_path) == 0


@pytest.mark.parametrize("cgroup", ["", "0::/\n", "4:memory:/\n"])
def test_without_limits_the_machine_decides(tmp_path, cgroup):
    write_tree(tmp_path, cgroup, {})
    assert 0 < available_memory(root=tmp_path) <= psutil.virtual_memory().total


def test_without_proc(tmp_path):
    assert available_memory(root=tmp_path) > 0


def test_here():
    assert 0 < available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 2),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 99),
        ("0::/a\n", {"a/cpu.max": "5000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "what"}, 99),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 3),
        ("4:cpu,cpuacct:/x\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": "-1\n"}, 99),
        ("4:memory:/x\n", {"memory/x/cpu.max": "100000 100000\n"}, 99),
        ("", {}, 99),
    ],
)
def test_a_control_group_may_allow_fewer_cores(tmp_path, monkeypatch, cgroup, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(99))
    write_tree(tmp_path, cgroup, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_cores(root=tmp_path) == cores


def test_what_a_process_has_held_is_its_own(tmp_path):
    """Not what the one had that started it."""
    held = bytearray(200 << 20)
    code = "from penstock.io.limits import peak_memory; print(peak_memory()); bytearray(64 << 20); print(peak_memory())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, said.split())
    assert before < 200 << 20 < peak_memory()
    assert after - before > 60 << 20
    del held
