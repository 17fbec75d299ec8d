from __future__ import annotations

import logging

from vring_serial.ratelimit import LogBudget, RateLimitedLog, cut

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


def test_a_budget_is_for_all_kinds_together(caplog):
    now = 100.0
    budget = LogBudget(burst=5, rate=1, resume=3, clock=lambda: now)
    kinds = [
        RateLimitedLog(log, burst=4, seconds=5, budget=budget, clock=lambda: now) for _ in range(10)
    ]
    with caplog.at_level(logging.INFO, "test.ratelimit"):
        for number, kind in enumerate(kinds):
            kind.warning("number %d", number)
        now += 2.9
        kinds[0].warning("not enough saved up")
        now += 0.1
        kinds[0].warning("again")
    assert [record.message for record in caplog.records] == [
        *(f"number {number}" for number in range(5)),
        "6 lines were left out of the log",
        "again",
    ]


def test_a_budget_bounds_what_is_logged_in_a_day():
    now = 0.0
    budget = LogBudget(burst=1000, rate=2, resume=100, clock=lambda: now)
    passed = 0
    for now in range(0, 86400, 10):  # noqa: B007 - the clock
        passed += sum(budget.admits() for _ in range(511))
        budget.take_left_out()
    assert 2 * 86400 - 1000 < passed < 2 * 86400 + 2000


def test_lists_are_cut_with_a_count():
    assert cut(["a", "b"], 2) == ["a", "b"]
    assert cut(["a", "b", "c", "d"], 2) == ["a", "b", "(2 more)"]
