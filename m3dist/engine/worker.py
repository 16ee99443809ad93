"""What the ranks other than 0 do: the steps that rank 0 tells them, in its order."""

import base64

from m3dist.cluster.channel import Message
from m3dist.engine.control import Rank0
from m3dist.engine.pace import Pace
from m3dist.engine.runner import Pending, Runner
from m3dist.engine.scheduler import Step
from m3dist.rank import STEP_LIMIT
from m3dist.watchdog import Watchdog


class Worker:
    """The loop of any rank but 0."""

    def __init__(self, runner: Runner, rank_0: Rank0, watchdog: Watchdog):
        self.runner, self.rank_0, self.watchdog, self.pace = runner, rank_0, watchdog, Pace()
        self._under_way: Pending | None = None

    def run(self) -> None:
        """Until rank 0 says that it is over. Raises CommunicationError where the ranks' results differ."""
        while "end" not in (message := self._hear()):
            self.watchdog.progress(f"step {self.pace.steps}", STEP_LIMIT)
            if "measure" in message:
                self._finish()
                self.pace.sum_seconds = self.runner.time_sum()
            else:
                self._compute(Step.from_json(message["step"]))
            if self.pace.due:
                self.rank_0.report(self.pace.report())
        self._finish()

    def _hear(self) -> Message:
        """Rank 0 is the one that must go on: whether it does, others see to."""
        self.watchdog.stop()
        with self.pace.waiting():
            return self.rank_0.hear()

    def _compute(self, step: Step) -> None:
        """As Leader._compute."""
        forward, masks = self.runner.forward(step), {}
        if self.runner.waits_for_masks(step):
            told = self.rank_0.hear()["masks"]
            masks = {int(row): base64.b64decode(mask) for row, mask in told.items()}
        pending = self.runner.sample(forward, masks)
        self._finish()
        self._under_way = pending

    def _finish(self) -> None:
        """Wait for the step that is under way: no rank gets further ahead than one."""
        if self._under_way:
            self._under_way.read()
            self._under_way = None
            self.pace.step()
