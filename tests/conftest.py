"""Shared by all tests: shapes are checked at every call, and runs are small enough for one thread."""

from __future__ import annotations

from jaxtyping import install_import_hook

# Before anything imports hartist: only modules imported afterwards are checked.
install_import_hook("hartist", "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)

# A busy machine is no failure.
settings.register_profile("hartist", deadline=None)
settings.load_profile("hartist")


@pytest.fixture(autouse=True)
def same_random_numbers_every_time() -> None:
    """Tolerances are met or missed by the code, not by luck."""
    torch.manual_seed(0)
