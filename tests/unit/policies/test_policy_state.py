"""Files and shares of policy state: what comes back, what is refused, what a failed save leaves behind."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ConfigError
from cluster.policies import policy_state
from cluster.policies.policy_state import (
    Groups,
    check_policy_state,
    load_policy_state,
    num_learned,
    pack_share,
    save_policy_state,
    unpack_share,
)


def _groups(value: float = 0.1) -> Groups:
    return {
        "maps": {"maps": np.full((40, 4, 8), value, np.float16), "num_learned": np.array(40)},
        "next_use": {"weights": np.full((2000,), value, np.float32), "rate": np.array([value]), "steps": np.array(7)},
    }


@contextmanager
def _full_disk() -> Iterator[None]:
    """No file may become longer than a few bytes: a write fails in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_gives_back_every_array_exactly(tmp_path: Path) -> None:
    path, groups = tmp_path / "learned.npz", _groups()
    save_policy_state(path, "aaaa", _groups(9))
    save_policy_state(path, "aaaa", groups)
    check_policy_state(path, "aaaa")

    loaded = load_policy_state(path, "aaaa")

    assert {name: set(arrays) for name, arrays in loaded.items()} == {n: set(arrays) for n, arrays in groups.items()}
    for name, arrays in groups.items():
        for field, array in arrays.items():
            np.testing.assert_array_equal(loaded[name][field], array, strict=True)
    assert (num_learned(loaded["maps"]), num_learned(loaded["next_use"])) == (40, 0)
    assert [file.name for file in tmp_path.iterdir()] == ["learned.npz"]


def test_another_model_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    save_policy_state(tmp_path / "l", "aaaa", _groups())
    for refuse in (load_policy_state, check_policy_state):
        with pytest.raises(ConfigError, match=r"model aaaa, the model here is bbbb.*experts\.policy_state"):
            refuse(tmp_path / "l", "bbbb")
    with pytest.raises(ConfigError, match=r"model aaaa, the model here is bbbb"):
        unpack_share(pack_share("aaaa", "maps", _groups()["maps"]), "bbbb", "maps")


def test_another_version_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_state, "POLICY_STATE_VERSION", 7)
    save_policy_state(tmp_path / "l", "aaaa", _groups())
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"version 7, this program has 1"):
        load_policy_state(tmp_path / "l", "aaaa")


def test_damaged_files_are_never_anything_but_an_error(tmp_path: Path) -> None:
    """Truncated anywhere, or with bytes changed; what lies between the arrays may be changed without harm."""
    path, rng, num_refused = tmp_path / "l", random.Random(0), 0
    save_policy_state(path, "aaaa", _groups())
    whole = path.read_bytes()
    for trial in range(300):
        damaged = bytearray(whole)
        if trial % 2:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.randint(1, 8)):
                damaged[-rng.randrange(1, 900 if trial % 4 else len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load_policy_state(path, "aaaa")
        except ConfigError as error:
            num_refused += 1
            assert str(path) in error.message and "experts.policy_state" in error.message
    assert num_refused > 250


@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY\x01\x00"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l").write_bytes(content)
    with pytest.raises(ConfigError, match=r"not a file of policy state.*experts\.policy_state"):
        load_policy_state(tmp_path / "l", "aaaa")


def test_paths_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_policy_state(tmp_path, "aaaa")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        check_policy_state(tmp_path, "aaaa")
    missing = tmp_path / "none" / "l"
    with pytest.raises(ConfigError, match=rf"{missing} cannot be saved.*make it, or name another"):
        check_policy_state(missing, "aaaa")
    check_policy_state(tmp_path / "new", "aaaa")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "l"
    save_policy_state(path, "aaaa", _groups(1))
    with _full_disk(), pytest.raises(OSError, match="too large"):
        save_policy_state(path, "aaaa", _groups(2))

    assert load_policy_state(path, "aaaa")["maps"]["maps"][0, 0, 0] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["l"]


def test_shares_are_small_and_nearly_exact() -> None:
    arrays = {
        "weights": np.linspace(-3, 1e6, 5000, dtype=np.float32),
        "rate": np.array([0.123456789]),
        "ids": np.arange(5000) * 1000,
    }
    blob = pack_share("aaaa", "next_use", arrays)
    shared = unpack_share(blob, "aaaa", "next_use")

    assert len(blob) < sum(array.nbytes for array in arrays.values()) / 2
    np.testing.assert_allclose(shared["weights"], np.minimum(arrays["weights"], 65504), rtol=1e-3)
    np.testing.assert_array_equal(shared["rate"], arrays["rate"], strict=True)
    np.testing.assert_array_equal(shared["ids"], arrays["ids"], strict=True)
    with pytest.raises(ConfigError, match="has next_use instead"):
        unpack_share(blob, "aaaa", "maps")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_in_files_and_shares(tmp_path: Path, value: float) -> None:
    path, groups = tmp_path / "learned.npz", _groups()
    groups["next_use"]["weights"][17] = value
    save_policy_state(path, "aaaa", groups)

    with pytest.raises(ConfigError, match="next_use: weights has numbers that are not finite; delete it"):
        load_policy_state(path, "aaaa")
    if np.isnan(value):  # an infinite one is cut to the largest there is
        with pytest.raises(ConfigError, match="not finite"):
            unpack_share(pack_share("aaaa", "next_use", groups["next_use"]), "aaaa", "next_use")
    with pytest.raises(ConfigError, match="not finite"):
        unpack_share(pack_share("aaaa", "maps", {"maps": np.full(3, value)}), "aaaa", "maps")
