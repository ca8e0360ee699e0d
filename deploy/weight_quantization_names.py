"""The names of weight formats, for settings, which import no torch."""

from __future__ import annotations

from typing import Literal

WeightQuantization = Literal["none", "int8"]
