"""The command line of plmcc where every network connection fails."""

from __future__ import annotations

import socket
import sys
from typing import NoReturn

from plmcc.cli.app import main


def refuse(*_: object, **__: object) -> NoReturn:
    """Be no connection."""
    raise AssertionError("plmcc opened a network connection")


if __name__ == "__main__":
    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.create_connection = socket.getaddrinfo = refuse
    sys.argv[0] = "plmcc"
    main()
