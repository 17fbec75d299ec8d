"""QMP as it is on the wire: requests out of a stream, and lines of replies."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vring_serial.proto.qmp import (
    DEPTH_MAX,
    REQUEST_MAX,
    ErrorClass,
    Negotiation,
    QmpError,
    RequestParser,
    error_reply,
    event,
    greeting,
    parse_request,
    reply,
)


def parsed(*pieces):
    parser = RequestParser()
    return [request for piece in pieces for request in parser.feed(piece)]


def why(text):
    (request,) = parsed(text)
    assert request.error is not None
    return request.error.desc


def test_a_request_has_a_command_arguments_and_an_id():
    (request,) = parsed(b'{"execute": "x", "arguments": {"a": [1, {"b": "}"}]}, "id": null}\n')
    assert request.command == "x"
    assert request.arguments == {"a": [1, {"b": "}"}]}
    assert request.has_id
    assert request.id is None
    assert request.error is None


def test_requests_need_no_line_of_their_own():
    found = parsed(b'{"execute":"a"}{"execute":"b"} \r\n\t {"execute":"c"}')
    assert [request.command for request in found] == ["a", "b", "c"]


@given(
    st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4),
    st.lists(st.integers(0, 200), max_size=8),
)
def test_how_the_stream_is_cut_does_not_matter(requests, cuts):
    stream = b"".join(
        json.dumps({"execute": name, "id": id}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        for name, id in requests
    )
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    found = parsed(*(stream[a:b] for a, b in itertools.pairwise(edges)))
    assert [(r.command, r.id) for r in found] == requests


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        (b"[1]", "QMP input must be a JSON object"),
        (b"42 ", "QMP input must be a JSON object"),
        (b'{"a":1}', "QMP input member 'a' is unexpected"),
        (b'{"execute":1}', "QMP input member 'execute' must be a string"),
        (b'{"execute":"x","arguments":[]}', "QMP input member 'arguments' must be an object"),
        (b"{}", "QMP input lacks member 'execute'"),
    ],
)
def test_what_is_no_request_is_refused_as_qemu_does(text, desc):
    assert why(text) == desc


@pytest.mark.parametrize(
    "text", [b"foo ", b'{"execute": }', b"}", b'{"a":NaN}', b'{"a":"\xff"}', b"{]", b'{"a":1e}']
)
def test_what_is_no_json_is_refused_and_the_next_line_is_heard(text):
    bad, good = parsed(text + b"\n", b'{"execute":"x"}\n')
    assert bad.error is not None
    assert "JSON parse error" in bad.error.desc
    assert good.command == "x"


def test_an_error_repeats_the_id():
    (request,) = parsed(b'{"execute":"x","foo":1,"id":3}')
    assert request.error is not None
    line = json.loads(error_reply(request, request.error))
    assert line["id"] == 3
    assert line["error"]["class"] == "GenericError"


def test_a_request_is_bounded_in_size_and_depth():
    parser = RequestParser()
    piece = b'{"execute": "' + b"x" * 65536
    found = []
    for _ in range(REQUEST_MAX // 65536 + 1):
        found += parser.feed(piece)
        piece = b"x" * 65536
    assert ["larger than" in str(request.error) for request in found] == [True]
    assert "nested too deep" in why(b"[" * (DEPTH_MAX + 1))
    deep = b'{"execute":"x","arguments":{"a":' + b"[" * (DEPTH_MAX - 2) + b"]" * (DEPTH_MAX - 2)
    (request,) = parsed(deep + b"}}")
    assert request.error is None


def test_nothing_comes_before_the_negotiation_and_it_comes_once():
    negotiation = Negotiation()
    known = ("qmp_capabilities", "query-name")
    with pytest.raises(QmpError, match="Expecting capabilities negotiation") as caught:
        negotiation.check(parse_request(b'{"execute":"query-name"}'), known)
    assert caught.value.error_class is ErrorClass.COMMAND_NOT_FOUND
    negotiation.check(parse_request(b'{"execute":"qmp_capabilities"}'), known)
    negotiation.done = True
    negotiation.check(parse_request(b'{"execute":"query-name"}'), known)
    with pytest.raises(QmpError, match="already complete"):
        negotiation.check(parse_request(b'{"execute":"qmp_capabilities"}'), known)
    with pytest.raises(QmpError, match="The command foo has not been found"):
        negotiation.check(parse_request(b'{"execute":"foo"}'), known)


def test_lines_are_qemus():
    request = parse_request(b'{"execute":"x","id":"a"}')
    assert reply(request, {}) == b'{"return": {}, "id": "a"}\r\n'
    hello = json.loads(greeting("vring 1"))
    assert hello["QMP"]["version"]["package"] == "vring 1"
    assert hello["QMP"]["capabilities"] == []
    told = json.loads(event("E", {"a": 1}, 1_500_000))
    assert told == {
        "timestamp": {"seconds": 1, "microseconds": 500_000},
        "event": "E",
        "data": {"a": 1},
    }
