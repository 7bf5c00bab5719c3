"""What the claims share: the table they print, and the closing line of JSON."""

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Bar:
    """A figure that must lie in `[low, high]`.

    Attributes:
        value: what was measured.
        low, high: the bounds, either may be None.
        paper: what the paper or the other libraries report, as text.
    """

    value: float
    low: float | None = None
    high: float | None = None
    paper: str = ""

    @property
    def holds(self) -> bool:
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def text(self) -> str:
        parts = [
            f">= {self.low:g}" if self.low is not None else "",
            f"<= {self.high:g}" if self.high is not None else "",
        ]
        return " and ".join(filter(None, parts))


def conclude(system: str, bars: dict[str, Bar], extra: dict[str, Any] | None = None) -> int:
    """Prints figures beside their bars, then one line of JSON; returns the exit code."""
    table = Table(title=f"{system}: measured against its bars")
    for column in ("figure", "measured", "bar", "elsewhere", ""):
        table.add_column(column)
    for name, bar in bars.items():
        table.add_row(name, f"{bar.value:.4g}", bar.text, bar.paper, "holds" if bar.holds else "MISSED")
    Console(width=120).print(table)
    passed = all(bar.holds for bar in bars.values())
    figures = {name: bar.value for name, bar in bars.items()} | (extra or {})
    limits = {name: bar.text for name, bar in bars.items()}
    print(json.dumps({"system": system, "figures": figures, "bars": limits, "pass": passed}))
    return 0 if passed else 1
