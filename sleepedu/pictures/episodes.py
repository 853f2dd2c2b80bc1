"""An example of a task as a picture: what is asked, the way to the answer, and what a model answered."""

from functools import singledispatch
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from sleepedu.pictures import figures
from sleepedu.tasks import CellularAutomaton, Episode, GraphRetrieval, MathReasoning, Task
from sleepedu.tasks.cellular_automaton import space_time
from sleepedu.tasks.math_reasoning import derive


def draw_episode(task: Task, episode: Episode, index: int = 0, answers: Tensor | None = None, **how: Any) -> Figure:
    """Draw one example of a task, with given answers (p,) beside the right ones where there are any.

    Of a graph's questions it shows the first, or number ``query=``. Raises NotImplementedError for a task that has no
    picture (``task.text`` always works) and ValueError for an episode that is not of the task.
    """
    wanted = (task.windows, task.window, task.prompt_length)
    found = (*episode.windows.shape[1:], episode.prompt.shape[1])
    if found != wanted:
        sizes = "{} windows of {} tokens and a prompt of {}"
        raise ValueError(f"the {task.name} task has {sizes.format(*wanted)}, the episode {sizes.format(*found)}")
    return _picture(task, episode.to("cpu"), index, answers, **how)


@singledispatch
def _picture(task: Task, episode: Episode, index: int, answers: Tensor | None) -> Figure:
    raise NotImplementedError(f"the {task.name} task has no picture: use text()")


@_picture.register
def _ring(task: GraphRetrieval, episode: Episode, index: int, answers: Tensor | None, query: int = 0) -> Figure:
    """Draw the ring with the walk of one question."""

    def spell(tokens: Tensor) -> str:
        return "".join(task.words[token] for token in tokens.tolist()).removesuffix("_") or "_"

    def question(tokens: Tensor) -> Tensor:
        return tokens.view(task.queries, -1)[query]

    following, names = task.successors(episode)[index].tolist(), list(task.names)
    walk = [names.index(spell(question(episode.prompt[index])[1 : 1 + task.name_tokens]))]
    for _ in range(int(question(episode.depth[index]).max())):
        walk.append(following[walk[-1]])
    if answers is None:
        return figures.ring(following, names, walk)
    answer = spell(question(answers)[question(episode.asked[index])])
    names.append(answer)  # a model may also answer what is no name
    return figures.ring(following, names, walk, names.index(answer))


@_picture.register
def _rows(task: CellularAutomaton, episode: Episode, index: int, answers: Tensor | None) -> Figure:
    """Draw the space-time diagram of the first row, and the bits that are asked for."""
    diagram = space_time(episode.windows[index, 0], task.rule, int(episode.depth[index, 0])).tolist()
    asked = range(task.cells if task.ask == "every" else 1)
    return figures.space_time(diagram, asked, None if answers is None else answers[: len(asked)].tolist())


@_picture.register
def _dials(task: MathReasoning, episode: Episode, index: int, answers: Tensor | None) -> Figure:
    """Draw what depends on what, by number of operations; when one dial is asked, only what its answer takes."""
    facts, asked = task.facts(episode, index), task.asked_dials(episode, index)
    shows, arrows = {}, {}
    for dial in facts if task.ask == "every" else derive(facts, next(iter(asked)), task.digits):
        number, form, sources = facts[dial]
        shows[dial] = str(derive(facts, dial, task.digits)[dial][0])
        arrows[dial] = dict.fromkeys(sources, {"more": f"+{number}", "less": f"−{number}"}.get(form, "+"))
    given = None if answers is None else {dial: task.words[int(answers[i])] for dial, i in asked.items()}
    return figures.dependencies(shows, arrows, list(asked), given)
