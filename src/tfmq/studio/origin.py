"""Who may talk to the page: this machine's browser that opened it, under a name of this machine.

The page answers on the loopback address alone, but a page of anybody's can make the user's browser ask there:
by a form or a script, whose requests name their `Origin`, or by a name of its own that it lets point to
127.0.0.1 after a while (DNS rebinding), which the `Host` shows.
"""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

NAMES = ("127.0.0.1", "localhost")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Mapping[str, Any], Receive, Send], Awaitable[None]]


def allowed(headers: Mapping[str, str]) -> bool:
    """Whether a request with these headers, names in lower case, comes from the page itself.

    The `Host` must be a name of this machine, with any port, since a tunnel may have another; an `Origin`,
    where there is one, must be that host.

    >>> allowed({"host": "127.0.0.1:7860"}), allowed({"host": "evil.example:7860"})
    (True, False)
    >>> host = {"host": "localhost:7860"}
    >>> allowed({**host, "origin": "http://localhost:7860"}), allowed({**host, "origin": "null"})
    (True, False)
    """
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name in NAMES and "@" not in host and headers.get("origin", f"http://{host}") == f"http://{host}"


class OwnPageOnly:
    """ASGI middleware that answers every other request with 403 and closes every other web socket."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        pairs = [
            (name.decode("latin-1").lower(), value.decode("latin-1"))
            for name, value in scope.get("headers", ())
        ]
        twice = any([name for name, _ in pairs].count(wanted) > 1 for wanted in ("host", "origin"))
        if scope["type"] not in ("http", "websocket") or (not twice and allowed(dict(pairs))):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send(
                {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]}
            )
            await send(
                {
                    "type": "http.response.body",
                    "body": b"This page answers the browser of its own machine alone.\n",
                }
            )
