"""The live line: one line on a terminal, some lines elsewhere, never an error of its own."""

import copy
import io
import pickle
import sys

import pytest
import torch
from rich.console import Console

import midflight as mf

NUMBERS = {
    "value/lr": 0.00123456,
    "value/weight_decay": 0.01,
    "valid_loss": 0.25,
    "restored": 1.0,
    "cost": 0.2,
}


def shown(terminal, hypersteps, prints=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, legacy_windows=False)
    line = mf.LiveLine(200, console)
    for n in range(1, hypersteps + 1):
        line(20 * n, NUMBERS)
        if prints:
            print(f"the loop prints {n}")
    line.close()
    return console.file.getvalue()


def test_elsewhere_than_on_a_terminal_it_writes_a_line_at_powers_of_two():
    lines = shown(False, 9).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 20/200",
        "step 40/200",
        "step 80/200",
        "step 160/200",
    ]
    assert lines[0] == "step 20/200 | lr 0.001235 | weight_decay 0.01 | valid loss 0.25 | restored 1"


def test_on_a_terminal_it_is_one_line_below_what_the_loop_prints_and_the_cursor_comes_back():
    written = shown(True, 3, prints=True)
    assert [written.count(f"step {n}/200") for n in (20, 40, 60)] >= [1, 1, 1]
    assert written.count("\x1b[2K") >= 3  # the line before is erased
    assert written.index("step 20/200") < written.index("the loop prints 1") < written.rindex("step 20/200")
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_an_object_that_is_forgotten_gives_the_cursor_back():
    console = Console(file=io.StringIO(), force_terminal=True)
    line = mf.LiveLine(console=console)
    line(1, NUMBERS)
    del line
    assert "\x1b[?25h" in console.file.getvalue()


def test_an_output_that_fails_ends_the_line_and_not_the_run():
    class Closed(io.StringIO):
        def write(self, _):
            raise OSError("gone")

    for terminal in (True, False):
        line = mf.LiveLine(console=Console(file=Closed(), force_terminal=terminal))
        with pytest.warns(UserWarning, match="live line ends"):
            line(1, NUMBERS)
        line(2, NUMBERS)


def test_copies_and_pickles_begin_anew(capsys):
    line = mf.LiveLine(200, Console(file=io.StringIO()))
    line(1, NUMBERS)
    for other in (copy.deepcopy(line), pickle.loads(pickle.dumps(line))):
        other(1, NUMBERS)
        assert capsys.readouterr().out.startswith("step 1/200 | lr")


def test_without_rich_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("midflight.errors.find_spec", lambda name: None)
    with pytest.raises(mf.errors.MissingExtra, match="rich must be installed"):
        mf.LiveLine()


def test_a_tuner_calls_it_and_shows_its_card_in_a_notebook(capsys):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    space = mf.Space(lr=mf.Float(1e-3, 1.0, log=True, init=0.1))
    loss_fn = lambda model, batch: (model(batch) - 1).square().mean()  # noqa: E731
    data, held_out = [torch.randn(8, 2)], [torch.randn(8, 2)]
    options = {"schedule": 2, "total_steps": 10, "on_hyperstep": mf.LiveLine(10)}
    with mf.Tuner(model, optimizer, space, loss_fn, data, held_out, **options) as tuner:
        for _ in range(10):
            optimizer.zero_grad()
            loss_fn(model, data[0]).backward()
            optimizer.step()
    assert "/10 | lr 0." in capsys.readouterr().out
    assert tuner._repr_html_().startswith("<pre>step 10 of 10")
    assert "<pre>" not in tuner._repr_html_()[5:]


class Gone(io.StringIO):
    """A terminal that is closed after the first lines."""

    def __init__(self, error):
        super().__init__()
        self.error, self.writes = error, 0

    def write(self, text):
        self.writes += 1
        if self.writes > 5:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError("gone"), BrokenPipeError(), ValueError("closed file")])
def test_a_terminal_that_goes_away_ends_the_line_and_gives_standard_output_back(error):
    before = sys.stdout
    line = mf.LiveLine(console=Console(file=Gone(error), force_terminal=True, legacy_windows=False))

    def run():
        for n in range(20):
            line(n, NUMBERS)

    with pytest.warns(UserWarning, match="the live line ends"):
        run()
    assert sys.stdout is before
    line.close()
