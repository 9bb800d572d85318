"""Jobs, as the scheduler sees them: a request's images, and what is left of each. Pure Python.

A job has a task for each image. A step of a task takes one forward row, or two with guidance, which may fall into
different passes.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import inf

from service.engine.costs import Costs


class Task:
    """One image of a job.

    Attributes:
        steps_left: sampler steps still to take.
        forwards_per_step: forward rows of each step, 1 or 2.
        due: those of the present step that have not run.
        started: whether it ever ran.
    """

    __slots__ = ("due", "forwards_per_step", "group", "index", "job", "started", "steps_left")

    def __init__(self, job: "Job", index: int, group: "_Group", steps: int, forwards_per_step: int) -> None:
        self.job = job
        self.index = index
        self.group = group
        self.steps_left = steps
        self.forwards_per_step = forwards_per_step
        self.due = forwards_per_step
        self.started = False

    @property
    def branches(self) -> range:
        """Those of the present step that have not run."""
        return range(self.forwards_per_step - self.due, self.forwards_per_step)


Batch = list[tuple[Task, int]]  # the forward rows of a pass: task and branch


class _Group:
    """Tasks of a job that step together, as many as fill a pass.

    Attributes:
        tasks: those that are not done.
        at_once: the forward rows of a step of all of them.
        left: their forward rows still to run.
        seconds: at least what they take alone, at speed 1.
    """

    __slots__ = ("at_once", "left", "seconds", "tasks")

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.at_once = self.left = 0
        self.seconds = 0.0

    def add(self, task: Task) -> None:
        self.tasks.append(task)
        self.at_once += task.forwards_per_step
        self.left += task.steps_left * task.forwards_per_step

    def count(self, task: Task) -> None:
        """Count a forward row of a task."""
        self.left -= 1
        task.due -= 1
        if task.due == 0:
            task.steps_left -= 1
            task.due = task.forwards_per_step
            if task.steps_left == 0:
                self.tasks.remove(task)
                self.at_once -= task.forwards_per_step

    def weigh(self, costs: Costs) -> None:
        """Add up what the steps cost that the tasks have left, those that are furthest behind first."""
        if len(self.tasks) == 1:  # the same sum, for the most common group
            [task] = self.tasks
            self.seconds = costs.rounds(task.due) + (task.steps_left - 1) * costs.rounds(task.forwards_per_step)
            return
        self.seconds, rows = 0.0, 0
        levels = sorted({task.steps_left for task in self.tasks}, reverse=True)
        for level, below in pairwise([*levels, 0]):
            here = [task for task in self.tasks if task.steps_left == level]
            self.seconds += costs.rounds(rows + sum(task.due for task in here))
            rows += sum(task.forwards_per_step for task in here)
            self.seconds += (level - below - 1) * costs.rounds(rows)


class Job:
    """A request's images.

    Args:
        images: the steps of each image, and the forward rows of each of its steps.
        costs: of passes.
        decoded: whether each image is decoded when its steps are done.

    Attributes:
        tasks: of images that have steps left.
        undecoded: images that are still to be decoded, also those that have steps left.
        promise: the time by which all of them will be.
        number: in the order of arrival.
        size: the forward rows of all of it.
        left: those still to run.
        steps: the most steps that one of its images has left.
        seconds: at least what it takes alone, at speed 1, in groups that fill a pass, one after the other.
    """

    __slots__ = ("_groups", "left", "number", "promise", "seconds", "size", "steps", "tasks", "undecoded")

    def __init__(self, images: Iterable[tuple[int, int]], costs: Costs, decoded: bool = False) -> None:
        self.promise = inf
        self.number = 0
        self.tasks: list[Task] = []
        self._groups: list[_Group] = []
        images = list(images)
        together = max(1, costs.width // max(forwards_per_step for _, forwards_per_step in images))
        for index, (steps, forwards_per_step) in enumerate(images):
            if index % together == 0:
                self._groups.append(_Group())
            self.tasks.append(Task(self, index, self._groups[-1], steps, forwards_per_step))
            self._groups[-1].add(self.tasks[-1])
        self.undecoded = len(images) if decoded else 0
        self.size = self.left = sum(task.steps_left * task.forwards_per_step for task in self.tasks)
        self.weigh(costs)

    @property
    def groups(self) -> list[tuple[int, int, int]]:
        """Of the images that step together: how many, the forward rows of a step, and those still to run."""
        return [(len(group.tasks), group.at_once, group.left) for group in self._groups]

    def behind_first(self) -> Iterable[Task]:
        """Tasks with something left: group after group, of a group those first that are furthest behind."""
        for group in self._groups:
            yield from sorted(group.tasks, key=lambda task: -task.steps_left)

    def furthest_behind(self) -> list[Task]:
        """Of the first group, the tasks that have the most steps left."""
        tasks = self._groups[0].tasks
        most = max(task.steps_left for task in tasks)
        return [task for task in tasks if task.steps_left == most]

    def count(self, tasks: Sequence[Task], costs: Costs) -> None:
        """Count a forward row of each of these tasks; of a task that is here twice, two."""
        self.left -= len(tasks)
        groups: dict[_Group, None] = {}
        for task in tasks:
            task.group.count(task)
            groups[task.group] = None
        for group in groups:
            group.weigh(costs)
        self._add_up()

    def weigh(self, costs: Costs) -> None:
        """Compute `seconds` again, after costs have changed."""
        for group in self._groups:
            group.weigh(costs)
        self._add_up()

    def _add_up(self) -> None:
        if not all(group.tasks for group in self._groups):
            self._groups = [group for group in self._groups if group.tasks]
        self.seconds = sum(group.seconds for group in self._groups)
        self.steps = max((task.steps_left for group in self._groups for task in group.tasks), default=0)
