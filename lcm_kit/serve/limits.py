"""What a server takes at most, of one request and of all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Each is an option of `lcm-kit serve`, which says its range."""

    side: int = 1024  # pixels of a picture's width and height
    steps: int = 50
    count: int = 4  # pictures a request
    frames: int = 16  # of an edit that goes from one picture to another
    prompt: int = 2000  # characters
    body: int = 65_536  # bytes of a request
    upload: int = 8 * 2**20  # bytes of one with pictures
    seconds: float = 120.0  # from a request's first byte to its pictures
    queue: int = 64  # pictures that wait
    batch: int = 8  # pictures drawn at once
    window: float = 0.01  # seconds that a batch waits for company
    rate: float = 600.0  # requests a minute and client
    grace: float = 30.0  # seconds to finish in, once the server is told to stop
