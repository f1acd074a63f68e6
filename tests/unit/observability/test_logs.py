from __future__ import annotations

import io
import logging

from cluster.logs import KeyValueFormatter, log_event


def test_one_line_of_key_value_pairs():
    stream = io.StringIO()
    output = logging.StreamHandler(stream)
    output.setFormatter(KeyValueFormatter())
    logger = logging.Logger("moesaic.test")
    logger.addHandler(output)
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        log_event(logger, logging.INFO, "request done", error=error, request_id="r-1", path='a "b"', wait_s=0.25)
    line = stream.getvalue().removesuffix("\n")
    assert "\n" not in line
    assert 'level=info logger=moesaic.test event="request done" request_id=r-1 path="a \\"b\\"" wait_s=0.25' in line
    assert "ValueError" in line
