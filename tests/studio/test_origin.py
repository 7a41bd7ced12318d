"""Requests of other pages are not answered, by whatever name and whatever way they come."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from tfmq.studio.origin import OwnPageOnly, allowed


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"host": "127.0.0.1:7860"}, True),
        ({"host": "localhost"}, True),
        ({"host": "LOCALHOST:9000", "origin": "http://LOCALHOST:9000"}, True),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}, True),
        ({}, False),
        ({"host": ""}, False),
        ({"host": "evil.example"}, False),
        ({"host": "evil.example:7860", "origin": "http://evil.example:7860"}, False),
        ({"host": "127.0.0.1.evil.example:7860"}, False),
        ({"host": "localhost@evil.example"}, False),
        ({"host": "evil.example@localhost"}, False),
        ({"host": "[::1"}, False),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:3000"}, False),
        ({"host": "127.0.0.1:7860", "origin": "http://localhost:7860"}, False),
        ({"host": "127.0.0.1:7860", "origin": "https://evil.example"}, False),
        ({"host": "127.0.0.1:7860", "origin": "null"}, False),
        ({"host": "127.0.0.1:7860", "origin": ""}, False),
    ],
)
def test_names_of_this_machine_alone(headers: Mapping[str, str], expected: bool) -> None:
    assert allowed(headers) is expected


def answers(kind: str, *headers: tuple[bytes, bytes]) -> list[dict[str, Any]]:
    """Return what the middleware sends; the page in it says that it was reached."""
    sent: list[Any] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "reached"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read of what is refused")

    asyncio.run(OwnPageOnly(page)({"type": kind, "headers": headers}, receive, send))
    return sent


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_page_is_not_reached_by_others(kind: str) -> None:
    good, evil = (b"Host", b"127.0.0.1:7860"), (b"host", b"evil.example:7860")
    assert answers(kind, good) == [{"type": "reached"}]
    for headers in ([evil], [good, evil], [good, (b"origin", b"http://evil.example")], []):
        first = answers(kind, *headers)[0]
        assert first.get("status") == 403 or first["type"] == "websocket.close"


def test_the_start_of_the_server_passes() -> None:
    assert answers("lifespan") == [{"type": "reached"}]
