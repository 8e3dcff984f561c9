"""Where a server answers, and to whom."""

from __future__ import annotations

import socket

from gptlab.errors import GptlabError
from gptlab.serving.http import is_loopback


def check_access(host: str, api_key: str | None) -> None:
    """Refuse to answer other machines without a key.

    Raises:
        GptlabError: an address that is not loopback, and no key, or an empty one.
    """
    if api_key is not None and not api_key.strip():
        raise GptlabError("the API key is empty; give one, or leave it out")
    if api_key is None and not is_loopback(host):
        raise GptlabError(
            f"{host} can be reached from other machines, which needs a key: --api-key KEY, or GPTLAB_API_KEY in the"
            " environment; or leave --host out"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any that is free.

    Raises:
        GptlabError: the address is not this machine's, or the port is taken or not allowed.
    """
    if not 0 <= port < 2**16:
        raise GptlabError(f"a port is 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise GptlabError(
            f"{host} port {port} cannot be listened on: {error.strerror or error}; choose another --port, or --host"
        ) from None
    return listening
