from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from gptlab.cli import main


@pytest.fixture
def run(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; return its exit code, standard output and standard error.

    A module whose ``COMMAND`` names a subcommand need not repeat it.
    """
    before = getattr(request.module, "COMMAND", ())

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gptlab", *before, *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capfd.readouterr()  # type: ignore[return-value]

    return command
