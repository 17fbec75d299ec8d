"""A shelf: what a predecessor kept is found by its role, wherever it died."""

from __future__ import annotations

import os

import pytest

from tests.support.leaks import held
from tests.support.shelves import ShelfKeeper
from vring_serial.errors import StateError
from vring_serial.service.descriptor_store import Notifier
from vring_serial.service.shelf import open_shelf


@pytest.fixture
def keeper():
    keeper = ShelfKeeper()
    yield keeper
    keeper.close()


def pipe_with(data):
    reader, writer = os.pipe()
    os.write(writer, data)
    os.close(writer)
    return reader


def content(fd):
    data = os.read(fd, 99)
    os.close(fd)
    return data


def keep(shelf, role, data):
    fd = pipe_with(data)
    shelf.keep(role, fd)
    os.close(fd)


def test_a_successor_takes_each_role_once(keeper):
    before = held()
    shelf = keeper.begin()
    keep(shelf, "a", b"first")
    keep(shelf, "a", b"second")
    keep(shelf.scoped("x").scoped("y"), "a", b"scoped")
    keep(shelf, "gone", b"")
    shelf.drop("gone")
    shelf.drop("never there")
    shelf.scoped("x").write("state", b"of x")
    shelf = keeper.begin()
    assert content(shelf.take("a")) == b"second"
    assert shelf.take("a") is None
    assert shelf.take("gone") is None
    assert content(shelf.scoped("x").take("y/a")) == b"scoped"
    assert shelf.read("x/state") == b"of x"
    assert shelf.read("y/state") is None
    keep(shelf, "a", b"third")
    shelf = keeper.begin()
    assert content(shelf.take("a")) == b"third"
    assert shelf.drop_untaken() == ["x/y/a"]
    assert keeper.begin().take("x/y/a") is None
    keeper.forget()
    assert held() == before


def test_of_two_in_one_role_the_later_counts(keeper):
    """A worker stored one, and died before it removed the one before."""
    keep(keeper.begin(), "a", b"first")
    notifier = Notifier(keeper.worker)
    fd = pipe_with(b"second")
    notifier.store("a#11", fd)
    os.close(fd)
    shelf = keeper.begin()
    assert content(shelf.take("a")) == b"second"
    keep(shelf, "b", b"the next one")
    shelf = keeper.begin()
    assert list(keeper.store.descriptors) == ["a#11", "b#12"]
    shelf.close()


def test_one_that_is_kept_anew_is_not_dropped_with_what_nobody_took(keeper):
    before = held()
    keep(keeper.begin(), "a", b"first")
    shelf = keeper.begin()
    keep(shelf, "a", b"second")
    assert shelf.drop_untaken() == []
    assert content(keeper.begin().take("a")) == b"second"
    keeper.forget()
    assert held() == before


def test_without_its_keeper_nothing_is_kept_and_nothing_fails(keeper):
    shelf = keeper.begin()
    keep(shelf, "a", b"")
    keep(shelf, "b", b"")
    keeper.end.close()
    keep(shelf, "a", b"again")
    keep(shelf, "c", b"")
    shelf.drop("b")
    shelf.write("state", b"of this process")
    shelf.serving()


@pytest.mark.parametrize("name", ["nobody's", "a#", "a#x", "#3x"])
def test_names_that_nobody_knows_are_dropped(keeper, name):
    before = held()
    notifier = Notifier(keeper.worker)
    notifier.store(name, keeper.journal)
    keeper.begin().close()
    keeper.begin().close()
    assert not keeper.store.descriptors
    keeper.wait_closed()
    assert held() == before


def test_a_journal_in_use_or_damaged_is_an_error_and_nothing_stays_open(keeper):
    before = held()
    os.pwrite(keeper.journal, b"X", 0)
    with pytest.raises(StateError, match="does not begin as one"):
        open_shelf(keeper.journal, Notifier(keeper.worker), {"a#1": [os.dup(0)]})
    assert held() == before
