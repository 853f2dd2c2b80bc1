"""The example in the README is run as it stands there, and does what the README says; what it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs_and_learns(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {"__name__": "example"}
    exec(compile(example, "README.md", "exec"), names)
    learned = names["accuracy_by_depth"](names["model"], names["task"], passes=2, examples=200)[1]
    assert learned.low > 3 * learned.majority
    assert "Accuracy(" in capsys.readouterr().out


def test_every_file_and_folder_that_it_names_is_there():
    named = re.findall(r"`([\w.]+/[\w./]*)`", README)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []
