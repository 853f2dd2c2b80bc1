"""The example in the README is run as it stands there, and does what the README says."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_runs_and_learns(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict = {"__name__": "example"}
    exec(compile(example, "README.md", "exec"), names)
    learned = names["accuracy_by_depth"](names["model"], names["task"], passes=2, examples=200)[1]
    assert learned.low > 3 * learned.majority
    assert "Accuracy(" in capsys.readouterr().out
