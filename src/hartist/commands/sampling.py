"""What the flags of sampling ask for"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from hartist.generation.pipeline import override
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import FAST


def chosen_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingSettings that the flags change. Raises UserError for values outside their range, before
    a model is loaded."""
    names = [field.name for field in dataclasses.fields(SamplingSettings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    changes = {**(FAST if args.preset == "fast" else {}), **given}
    override(SamplingSettings(), **changes)
    return changes
