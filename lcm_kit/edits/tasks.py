"""The tasks of an edit by name, for the command line too, which lists verbs without loading the rest."""

from __future__ import annotations

from typing import Literal

Task = Literal["inpaint", "outpaint", "colorize", "upscale", "sketch", "vary", "interpolate"]
