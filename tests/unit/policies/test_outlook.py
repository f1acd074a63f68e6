"""What workers say of experts on hosts: it survives the wire but for rounding, adds up, and fades."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cluster.errors import InvalidRequest
from cluster.policies.outlook import ByteShare, ExpertOutlook, JoinedOutlook, decode_outlook, encode_outlook

finite = st.floats(-1e6, 1e6, width=32)


@st.composite
def outlooks(draw: Any) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    size = draw(st.integers(1, 40))
    of_host = draw(hnp.arrays(np.bool_, size))
    values = draw(st.none() | hnp.arrays(np.float32, size, elements=finite))
    ahead = draw(st.none() | hnp.arrays(np.float32, size, elements=st.floats(0, 1, width=32, allow_subnormal=False)))
    return of_host, values, ahead


@given(outlooks())
def test_what_arrives_is_what_was_said_of_the_host_but_for_rounding(
    said: tuple[np.ndarray, np.ndarray | None, np.ndarray | None],
) -> None:
    of_host, values, ahead = said

    heard = decode_outlook(encode_outlook(of_host, values, ahead), len(of_host))

    if values is None or not of_host.any():
        assert heard.values is None
    else:
        assert heard.values is not None
        step = float(np.ptp(values[of_host])) / 255
        assert np.allclose(heard.values[of_host], values[of_host], atol=step * 0.51 + 1e-3)
        assert not heard.values[~of_host].any()
    if ahead is None:
        assert heard.ahead is None
    else:
        assert heard.ahead is not None
        assert ((heard.ahead > 0) == (of_host & (ahead > 0))).all(), "who is wanted is wanted, however little"
        assert np.allclose(heard.ahead[of_host], ahead[of_host], atol=1 / 250)


@given(st.binary(max_size=200), st.integers(1, 64))
def test_bytes_that_are_no_outlook_are_refused(data: bytes, size: int) -> None:
    for garbage in (data, b"\xe0" + data, b"\xe0\x03" + data):
        try:
            heard = decode_outlook(garbage, size)
        except InvalidRequest:
            continue
        for part in (heard.values, heard.ahead):
            assert part is None or (len(part) == size and np.isfinite(part).all())


def test_outlook_on_another_model_is_refused() -> None:
    data = encode_outlook(np.ones(80, np.bool_), np.arange(80.0), None)

    with pytest.raises(InvalidRequest, match="90 experts"):
        decode_outlook(data, 90)


def test_expected_uses_of_several_workers_add_up_and_fade() -> None:
    joined = JoinedOutlook(2, half_life_s=1.0)
    one, two = np.array([1.0, 0.0], np.float32), np.array([0.0, 4.0], np.float32)

    joined.hear("a", ExpertOutlook(one, two), 10.0)
    joined.hear("b", ExpertOutlook(two, None), 11.0)

    values, ahead = joined.at(11.0)
    assert values.tolist() == [0.5, 4.0]
    assert ahead.tolist() == [0.0, 2.0]
    joined.hear("b", ExpertOutlook(None, one), 12.0)  # the value is as old as before
    values, ahead = joined.at(12.0)
    assert values.tolist() == [0.25, 2.0]
    assert ahead.tolist() == [1.0, 1.0]


def test_the_silent_and_the_gone_are_forgotten() -> None:
    joined = JoinedOutlook(1, half_life_s=1.0)
    for worker in "ab":
        joined.hear(worker, ExpertOutlook(np.ones(1, np.float32), np.ones(1, np.float32)), 0.0)

    joined.forget("a")
    assert joined.at(0.0)[0].tolist() == [1.0]
    assert joined.at(100.0)[1].tolist() == [0.0]
    assert joined.num_speakers == 0


def test_workers_are_not_remembered_without_a_bound() -> None:
    joined = JoinedOutlook(1)
    for worker in range(2000):
        joined.hear(worker, ExpertOutlook(np.ones(1, np.float32), None), 0.0)

    assert joined.num_speakers <= 512


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 500)), max_size=50))
def test_outlooks_never_take_more_than_their_share(turns: list[tuple[int, int]]) -> None:
    share = ByteShare(0.03)
    for frame_bytes, outlook_bytes in turns:
        share.note_frames(frame_bytes)
        share.take(outlook_bytes)
        assert share.taken_bytes <= 0.03 * share.frame_bytes
