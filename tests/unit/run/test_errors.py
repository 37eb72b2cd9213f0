"""What a command answers when it fails."""

import pytest

from geli.run.errors import UserError, run


def answer(error, capsys) -> str:
    """What is on stderr after a command raised `error`."""

    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_an_error_of_the_system_is_one_line_that_says_how_to_see_more(capsys, monkeypatch):
    monkeypatch.delenv("GELI_TRACEBACK", raising=False)
    said = answer(FileNotFoundError(2, "No such file", "x"), capsys)
    assert said.endswith(": error: [Errno 2] No such file: 'x' (GELI_TRACEBACK=1 shows where)\n")
    assert answer(UserError("--steps 0: expected more"), capsys).endswith(": error: --steps 0: expected more\n")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "x"), UserError("--steps 0: expected more")])
def test_the_traceback_is_shown_when_asked_for(error, capsys, monkeypatch):
    monkeypatch.setenv("GELI_TRACEBACK", "1")
    *trace, line = answer(error, capsys).splitlines()
    assert trace[0].startswith("Traceback") and any(__file__ in row for row in trace)
    assert line.endswith(f": error: {error}")
