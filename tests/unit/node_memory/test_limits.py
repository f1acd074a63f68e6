"""Free memory by the kernel's files, as machines and containers have them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.node_memory.limits import control_group, filled_bytes, memory_levels, started_ticks
from cluster.node_memory.share import unpromised_bytes

MIB = 2**20


def root_with(tmp_path: Path, files: Mapping[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:    1024000 kB\n", **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def free(root: Path) -> int:
    return unpromised_bytes(memory_levels(root), ())


def test_without_groups_it_is_what_the_kernel_says(tmp_path: Path) -> None:
    assert free(root_with(tmp_path, {})) == 1000 * MIB
    assert control_group(tmp_path) == "/"


def test_a_v2_limit_counts_without_the_page_cache(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/pod/x"
    files = {
        "proc/self/cgroup": "0::/pod/x\n",
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": f"{300 * MIB}\n",
        "sys/fs/cgroup/pod/memory.max": f"{400 * MIB}\n",
        "sys/fs/cgroup/pod/memory.high": "max\n",
        "sys/fs/cgroup/pod/memory.current": f"{390 * MIB}\n",
        "sys/fs/cgroup/pod/memory.stat": f"anon 5\ninactive_file {80 * MIB}\nactive_file {20 * MIB}\n",
    }

    root = root_with(tmp_path, files)

    assert free(root) == 110 * MIB, "the limit is the one above this process's own group"
    assert control_group(root) == "/pod/x"


@pytest.mark.parametrize("path", ["/docker/abc", "/"])
def test_a_v1_limit_counts_also_where_the_group_is_mounted_as_the_root(tmp_path: Path, path: str) -> None:
    files = {
        "proc/self/cgroup": f"5:cpu:/\n4:memory:{path}\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{500 * MIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{450 * MIB}\n",
        "sys/fs/cgroup/memory/memory.stat": f"cache 1\ntotal_inactive_file {50 * MIB}\n",
    }

    assert free(root_with(tmp_path, files)) == 100 * MIB


def test_a_v1_group_without_a_limit_and_one_out_of_sight_say_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/../../other\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "5\n",
    }

    assert free(root_with(tmp_path, files)) == 1000 * MIB


def test_a_process_is_known_by_its_number_and_its_start() -> None:
    pid = os.getpid()

    assert (filled_bytes(pid, started_ticks(pid)) or 0) > MIB
    assert filled_bytes(pid, started_ticks(pid) - 1) is None, "another one had the number before"
