"""What rank 0 does beside computing: hears the gateway, plans the steps, tells the workers, gives the tokens back.

One step ahead: the next step is planned, told and started before this one's tokens are read. Nothing here waits for
anything else while there is something to compute; with nothing to compute it waits for the gateway, at no cost.
"""

import base64
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from m3dist.engine.control import Workers
from m3dist.engine.grammar import GrammarError, Matcher
from m3dist.engine.link import Gateway
from m3dist.engine.pace import Pace
from m3dist.engine.reception import Cancelled, Heard, Refused, Stop, Submitted
from m3dist.engine.request import RequestError
from m3dist.engine.runner import Pending, Runner, Token
from m3dist.engine.scheduler import Ended, Event, Scheduler, Started, Step
from m3dist.model.fusion import on_gpu
from m3dist.rank import STEP_LIMIT
from m3dist.watchdog import Watchdog

MEASURE = 10.0  # seconds between measurements of a sum, which hold up what is being computed for as long as it takes


class Leader:
    """Rank 0's loop."""

    def __init__(self, runner: Runner, scheduler: Scheduler, gateway: Gateway, workers: Workers, watchdog: Watchdog):
        self.runner, self.scheduler, self.gateway, self.workers = runner, scheduler, gateway, workers
        self.watchdog, self.pace = watchdog, Pace()
        self._matchers: dict[int, Matcher] = {}  # of the requests that have a grammar
        self._under_way: tuple[Step, Pending] | None = None
        self._idle, self._stopped, self._measured = True, False, time.monotonic()

    def run(self) -> None:
        """Until the gateway says that it is over. Raises CommunicationError where a rank or the gateway is gone."""
        while not self._stopped:
            self._hear()
            if step := self.scheduler.plan():
                self._compute(step)
            elif self._under_way:
                self._finish()
            else:
                self._tell(self.scheduler.drain_events(), {})
                self._idle = True
            if self.pace.due:
                self._report()
        self._finish()
        self.workers.end()

    # -----------------------------------------------------------------------------------------------------------------
    # The gateway

    def _hear(self) -> None:
        """Take in all that the gateway has said; with nothing to compute, wait for it to say something."""
        if self._idle:
            self._report()
            self.watchdog.stop()
        with self.pace.waiting():
            heard = self.gateway.hear(wait=self._idle)
        self._idle = False
        while heard is not None:
            self._act(heard)
            heard = self.gateway.hear(wait=False)

    def _act(self, heard: Heard) -> None:
        if isinstance(heard, Submitted):
            try:
                self.scheduler.submit(heard.request)
            except RequestError as error:
                heard = Refused(heard.request.id, str(error))
            else:
                if heard.matcher:
                    self._matchers[heard.request.id] = heard.matcher
        if isinstance(heard, Refused):
            self.gateway.tell({"ended": heard.id, "reason": "error", "message": heard.why})
        elif isinstance(heard, Cancelled):
            self.scheduler.cancel(heard.id)
            self._matchers.pop(heard.id, None)
        elif isinstance(heard, Stop):
            self._stopped = True

    def _tell(self, events: list[Event], tokens: Mapping[int, Token]) -> None:
        """What happened: all tokens of a step in one message."""
        taken = [event for event in events if not isinstance(event, Started | Ended)]
        for event in events:
            if isinstance(event, Started):
                self.gateway.tell({"started": event.id, "cached": event.cached})
        if taken:
            self.gateway.tell({"tokens": [_as_json(event.id, tokens[event.id]) for event in taken]})
        for event in events:
            if isinstance(event, Ended):
                self._matchers.pop(event.id, None)
                self.gateway.tell({"ended": event.id, "reason": event.reason})
        for event in taken:
            with self._refusing(event.id):
                if event.id in self._matchers:
                    self._matchers[event.id].took(event.token)

    @contextmanager
    def _refusing(self, id: int) -> Iterator[None]:
        """Where its grammar cannot be followed any further, the request ends, and no other."""
        try:
            yield
        except GrammarError as error:
            self._act(Cancelled(id))
            self._act(Refused(id, str(error)))

    def _report(self) -> None:
        """About a second's work."""
        if time.monotonic() - self._measured >= MEASURE or self.pace.sum_seconds is None:
            self._measure()
        self.workers.reports[0] = self.pace.report()
        self.gateway.tell({"stats": self.scheduler.stats() | {"ranks": self.workers.reports}})

    def _measure(self) -> None:
        self._finish()
        self.watchdog.progress("measuring a sum", STEP_LIMIT)
        self.workers.tell({"measure": True})
        self.pace.sum_seconds, self._measured = self.runner.time_sum(), time.monotonic()

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def _compute(self, step: Step) -> None:
        """Start `step`, and read the one before it: as late as can be, but for what this one has to wait for."""
        self.watchdog.progress(f"step {self.pace.steps}", STEP_LIMIT)
        self.workers.tell({"step": step.to_json()})
        if step.prefill or not on_gpu():
            self._finish()  # else its tokens would come late: a prefill is waited for, and on the CPU all that starts
        forward = self.runner.forward(step)
        masks = {}
        if self.runner.waits_for_masks(step):
            self._finish()
            masks = self._masks(step)
            self.workers.tell({"masks": {row: base64.b64encode(mask).decode() for row, mask in masks.items()}})
        pending = self.runner.sample(forward, masks)
        self._finish()
        self._under_way = step, pending

    def _masks(self, step: Step) -> dict[int, bytes]:
        """Of the rows that have a grammar: the tokens that it allows next."""
        masks = {}
        for row in step.sampled:
            with self._refusing(row):
                if row in self._matchers:
                    masks[row] = self._matchers[row].mask()
        return masks

    def _finish(self) -> None:
        """Read the tokens of the step that is under way, if one is."""
        if self._under_way is None:
            return
        (step, pending), self._under_way = self._under_way, None
        tokens = pending.read()
        self.pace.step()
        self._tell(self.scheduler.took(step, {row: token.id for row, token in tokens.items()}), tokens)


def _as_json(row: int, token: Token) -> list:
    return [row, token.id] if token.logprob is None else [row, token.id, token.logprob, token.top]
