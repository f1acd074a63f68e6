"""What is shipped: a wheel carries packages, kernels and the embedded model, and finds the model from there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from dockerfile import copy_sources


@pytest.mark.slow
def test_an_installed_wheel_finds_its_embedded_model_away_from_the_checkout(tmp_path: Path) -> None:
    source, wheels, prefix, elsewhere = (tmp_path / n for n in ("source", "wheels", "prefix", "elsewhere"))
    source.mkdir()
    copy_sources(source)  # what the image is built from is enough
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(wheels), str(source)], check=True, timeout=280)
    (wheel,) = wheels.glob("moesaic-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    subprocess.run(
        [*pip, "install", "--ignore-installed", "--no-deps", "--prefix", str(prefix), str(wheel)],
        check=True,
        timeout=120,
    )
    (packages,) = prefix.glob("lib/python*/site-packages")

    code = (
        "import cluster, actors, cluster.model.info as m;"
        "info = m.load_model_info('moesaic-demo'); print(cluster.__file__, actors.__file__, info.path)"
    )
    # The checkout must not be on the path: an editable install hides every shipping mistake.
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={"PYTHONPATH": str(packages)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()

    assert all(Path(path).is_relative_to(prefix) for path in found), found
    assert (prefix / "share/moesaic/models/prompts.jsonl").is_file()
    assert any(name.startswith("actors/kernels/_native") for name in names)
    assert not any(name.startswith(("tests/", "proto/", "benchmarks/")) for name in names)
