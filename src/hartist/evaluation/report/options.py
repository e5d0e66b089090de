"""What a report shows, as its command was asked"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hartist.evaluation.report.intervals import Resampling


@dataclass(frozen=True)
class Options:
    resampling: Resampling = field(default_factory=Resampling)
    title: str | None = None
    samples: int = 24
    """Pictures at random, of a single run."""
    training: Path | None = None
    network: str | None = None
    """Whose features tell near pictures; None is the first that the runs have features of."""
    cache: Path | None = None
    """Where features of the training pictures are kept."""
