from __future__ import annotations

import logging

from vring_serial.ratelimit import RateLimitedLog

log = logging.getLogger("test.ratelimit")


def test_a_burst_passes_and_the_rest_is_counted(caplog):
    now = 100.0
    limited = RateLimitedLog(log, burst=3, seconds=5, clock=lambda: now)
    with caplog.at_level(logging.INFO, "test.ratelimit"):
        for number in range(10):
            limited.warning("number %d", number)
        now += 4.9
        limited.log(logging.WARNING, "still quiet")
        now += 0.1
        limited.log(logging.INFO, "next")
        now += 5
        limited.log(logging.INFO, "and next")
    assert [record.message for record in caplog.records] == [
        "number 0",
        "number 1",
        "number 2",
        "8 more messages like this",
        "next",
        "and next",
    ]
