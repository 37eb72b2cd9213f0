"""Addresses that servers listen on."""

import ipaddress
import socket

from geli.run.errors import UserError


def is_loopback(host: str | None) -> bool:
    """Whether an address, of a server or of a request's sender, is of this machine alone."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int, backlog: int | None = None) -> socket.socket:
    """A socket that listens at an address.

    Args:
        port: 0: a free one. backlog: connections that may wait; None: as many as the system likes.

    Raises:
        UserError: if that is not possible.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=backlog)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; name another") from None
