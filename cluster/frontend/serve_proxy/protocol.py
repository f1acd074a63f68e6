"""HTTP/1.1 for clients that offer to speak HTTP/2: uvicorn's protocol, without the offer.

`Connection: Upgrade, HTTP2-Settings` and `Upgrade: h2c` (every first request of a JDK client) may be ignored, by RFC
9110 7.8. uvicorn ignores the offer but its parser takes what follows the head for the other protocol, so that the body
is lost. Here the request is parsed again without it.
"""

from __future__ import annotations

from typing import Any, cast

import httptools
import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def install_protocol() -> None:
    """From now on servers of this process that leave the choice to uvicorn have this protocol."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:OfferIgnoringProtocol"


class OfferIgnoringProtocol(HttpToolsProtocol):
    """uvicorn's own protocol for everything else, WebSockets included."""

    _plain_head: bytes | None = None  # of a request that came with an offer

    def data_received(self, data: bytes) -> None:
        """Parse; what follows the head of a request with an offer is its body."""
        self._unset_keepalive_if_required()
        while data:
            self._plain_head = None
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserError:
                message = "Invalid HTTP request received."
                self.logger.warning(message)
                self.send_400_response(message)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._plain_head is None:
                    self.handle_websocket_upgrade()
                    return
                rest = data[int(upgrade.args[0]) :]
                self.parser = cast("Any", httptools.HttpRequestParser)(self)
                data = self._plain_head + rest

    def on_headers_complete(self) -> None:
        """Begin to answer, unless the request is to be parsed again."""
        if self.parser.should_upgrade() and not self._should_upgrade():
            self._plain_head = self._head_without_offer()
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._plain_head is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a request."""
        if self._plain_head is None:
            super().on_message_complete()

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        for name, value in self.headers:
            if name in (b"upgrade", b"http2-settings"):
                continue
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(t for t in tokens if t.lower() not in (b"upgrade", b"http2-settings"))
            lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])
