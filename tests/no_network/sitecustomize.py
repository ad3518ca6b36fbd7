"""Closes the network in this interpreter, all but loopback.

tests/conftest.py puts this folder on PYTHONPATH, so that the processes that tests start (the command line, spawned
workers) are closed too: Python imports a module of this name at every start.
"""

import sys
from typing import Any


def _is_loopback(host: str | bytes | None) -> bool:
    import ipaddress

    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False  # a name that would have to be looked up


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: sees every socket call of the interpreter, also of libraries, and cannot be taken off."""
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if not isinstance(address, tuple):  # a path: a Unix socket; None: already connected
            return
        host = address[0]
    else:
        return
    if not _is_loopback(host):
        raise PermissionError(f"A test reached for the network: {event} {host!r}. Tests use this machine only.")


sys.addaudithook(_refuse_network)
