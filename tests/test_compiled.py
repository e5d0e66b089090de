"""Compiled blocks give what the plain ones give, share their pieces, and ask for a compiler in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hartist.errors import UserError
from hartist.generation.pipeline import Pipeline
from hartist.transformer.compiled import compile_blocks
from small import random_transformer


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("model", ["text", "class with residual tokens"])
def test_compiled_blocks_draw_the_same_pictures(model: str) -> None:
    script = Path(__file__).with_name("compiled.py")
    result = subprocess.run([sys.executable, str(script), model], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    # Two pieces and the residual MLP, for all blocks and scales; some once more for a single row, or for few.
    assert int(result.stdout) <= 9


def test_without_a_compiler_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no no-such-compiler; install one, or leave --compile out"):
        compile_blocks(random_transformer())


def test_eight_bits_are_not_compiled_and_nothing_is_loaded_for_it(tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained()
    with pytest.raises(UserError, match=r"leave --int8 or --compile out"):
        pipe.speed_up(int8=True, compile=True)
    assert not pipe.int8
    with pytest.raises(UserError, match=r"leave --int8 or --compile out"):
        Pipeline.from_pretrained(tmp_path / "none", int8=True, compile=True)
