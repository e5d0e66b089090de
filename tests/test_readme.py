"""Every runnable block of the README runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hartist.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [body for language, body in BLOCKS if language == "python"]
COMMANDS = [
    line for language, body in BLOCKS if language == "sh" for line in body.splitlines() if line.startswith("hartist ")
]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which the README's relative paths exist and outputs do no harm."""
    for name in ("docs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_is_something_to_run() -> None:
    assert PYTHON
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("code", PYTHON)
def test_python_block(code: str, checkout: Path) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert (checkout / "apple.png").stat().st_size > 0


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line: str, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.strip()


def test_pictures_exist() -> None:
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
