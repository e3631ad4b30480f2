"""The queue and the one thread that draws: what waits and belongs together is drawn together.

The oldest picture that waits says what is drawn next, so nothing starves; those that have its key go with it,
up to a bound. A batch waits a moment for company only where there was company lately. A client that leaves
takes its pictures out of the queue, and a batch that nobody waits for ends at its next step.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, Protocol

from PIL.Image import Image

from lcm_kit.drawing.batches import AfterStep
from lcm_kit.errors import UserError
from lcm_kit.serve.asked import EditKey, Key, Order
from lcm_kit.serve.drawer import Piece
from lcm_kit.serve.limits import Limits

State = Literal["loading", "ready", "stopping", "stopped"]
Outcome = Literal["drawn", "stopped", "refused", "failed"]
_RECENT = 4  # batches whose size says how much company is to be expected


class Full(UserError):
    """The queue is full; its last argument says in how many seconds there may be room."""

    def __init__(self, sentence: str, seconds: int) -> None:  # noqa: D107
        super().__init__(sentence)
        self.seconds = seconds


class Closed(UserError):
    """Nothing is drawn: the engine is not ready yet, or no longer."""


class NoRoom(UserError):
    """Memory ran out, even for one picture."""


class _Stop(Exception):
    """Ends a batch at its next step."""


class Draws(Protocol):
    """What the engine asks of a `drawer.Drawer`."""

    def open(self) -> None:
        """Load everything."""

    def most(self, key: Key | EditKey) -> int:
        """Pictures at once."""

    def draw(self, key: Key | EditKey, pieces: Sequence[Piece], after_step: AfterStep) -> list[Image]:
        """Draw them."""


class Step(NamedTuple):
    """A batch that holds an order has taken a step. Where memory ran out it begins again."""

    step: int
    steps: int


class Drawn(NamedTuple):
    """A picture of an order is drawn."""

    number: int
    picture: Image


Heard = Step | Drawn


@dataclass(eq=False)
class Ticket:
    """A request on its way. `future` has its pictures, in order, or what went wrong.

    `hear` is called with what happens before that, in the thread that draws.
    """

    order: Order
    hear: Callable[[Heard], None]
    future: Future[list[Image]] = field(default_factory=Future)
    batches: list[int] = field(default_factory=list)  # how many pictures were drawn together, by batch
    gone: bool = False  # nobody waits for it
    pictures: dict[int, Image] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """What `Engine` tells of a batch."""

    size: int
    seconds: float
    outcome: Outcome


_Waiting = tuple[Ticket, int]  # and which of its pictures


class Engine:
    """Draws orders with one thread. `told` is called in that thread after each batch."""

    def __init__(self, drawer: Draws, limits: Limits, told: Callable[[Batch], None] = lambda _: None) -> None:  # noqa: D107
        self.limits = limits
        self.failure: BaseException | None = None  # why it could not be opened
        self._drawer, self._told = drawer, told
        self._changed = threading.Condition()
        self._waiting: deque[_Waiting] = deque()
        self._drawing: list[_Waiting] = []
        self._state: State = "loading"
        self._company: deque[int] = deque(maxlen=_RECENT)
        self._pace = 1.0  # seconds a picture, lately
        self._thread = threading.Thread(target=self._run, name="draws", daemon=True)

    # -- For clients, in any thread --------------------------------------------------------------------------

    def start(self) -> None:
        """Load in the thread that will draw; `state` says how far it is."""
        self._thread.start()

    @property
    def state(self) -> State:
        """What the engine is at."""
        return self._state

    @property
    def waiting(self) -> int:
        """Pictures that wait."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is drawn."""
        with self._changed:
            return not self._waiting and not self._drawing

    def submit_all(self, orders: Sequence[Order], hear: Callable[[int, Heard], None]) -> list[Ticket]:
        """Put all of these into the queue, or none. Raises `Full` and `Closed`.

        `hear` is told which of them something happens to, in the thread that draws.
        """
        count = sum(order.count for order in orders)
        with self._changed:
            if self._state != "ready":
                why = "it is still loading" if self._state == "loading" else "it is being stopped"
                raise Closed(f"this server draws nothing now: {why}; try again in a while")
            if len(self._waiting) + count > self.limits.queue:
                raise Full(
                    f"the queue is full: {len(self._waiting)} pictures wait, of {self.limits.queue}; try "
                    "again in a while", max(1, math.ceil(self._pace * len(self._waiting))),
                )  # fmt: skip
            tickets = [Ticket(order, partial(hear, which)) for which, order in enumerate(orders)]
            for ticket in tickets:
                ticket.future.set_running_or_notify_cancel()  # it is left, not cancelled
                self._waiting.extend((ticket, index) for index in range(ticket.order.count))
            self._changed.notify_all()
            return tickets

    def leave(self, ticket: Ticket) -> None:
        """Nobody waits for this order any more, whether it is done or not."""
        with self._changed:
            ticket.gone = True
            ticket.pictures.clear()
            self._waiting = deque(each for each in self._waiting if each[0] is not ticket)
            self._changed.notify_all()

    def drain(self) -> None:
        """Take no more orders, and finish those that were taken."""
        with self._changed:
            if self._state in ("loading", "ready"):
                self._state = "stopping"
                self._changed.notify_all()

    def halt(self, seconds: float = 5.0) -> None:
        """Stop: what is being drawn ends at its next step, what waits is refused, the thread ends."""
        with self._changed:
            self._state = "stopped"
            left = dict.fromkeys(ticket for ticket, _ in (*self._waiting, *self._drawing))
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in left:
            self._fail(ticket, Closed("this server was stopped before the picture was drawn; try again"))
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    # -- The thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._drawer.open()
        except BaseException as error:  # told by whoever started the engine
            self.failure = error
            self.halt()
            return
        with self._changed:
            if self._state == "loading":
                self._state = "ready"
        while batch := self._next():
            self._draw(batch)

    def _next(self) -> list[_Waiting]:
        """What is drawn next, together; empty: nothing any more."""
        with self._changed:
            while True:
                while not self._waiting:
                    if self._state == "stopped":
                        return []
                    self._changed.wait()
                key = self._waiting[0][0].order.key
                most = self._drawer.most(key)
                self._wait_for_company(key, min(most, max(self._company, default=1)))
                if not self._waiting or self._waiting[0][0].order.key != key:
                    continue  # its client has left
                batch = [each for each in self._waiting if each[0].order.key == key][:most]
                chosen = set(batch)
                self._waiting = deque(each for each in self._waiting if each not in chosen)
                self._drawing = batch
                self._company.append(len(batch))
                return batch

    def _wait_for_company(self, key: Key | EditKey, expected: int) -> None:
        until = time.monotonic() + self.limits.window
        while (left := until - time.monotonic()) > 0 and self._state == "ready":
            if sum(ticket.order.key == key for ticket, _ in self._waiting) >= expected:
                return
            self._changed.wait(left)

    def _draw(self, batch: list[_Waiting]) -> None:
        key = batch[0][0].order.key
        pieces = [Piece(ticket.order.prompt, ticket.order.seed, index) for ticket, index in batch]

        def require_wanted() -> None:
            if self._state == "stopped" or all(ticket.gone for ticket, _ in batch):
                raise _Stop

        def after_step(places: Sequence[int], step: int, steps: int) -> None:
            require_wanted()
            for ticket in dict.fromkeys(batch[place][0] for place in places):
                ticket.hear(Step(step, steps))

        began = time.monotonic()
        outcome: Outcome = "drawn"
        fault: BaseException | None = None
        drawn: list[Image] = []
        try:
            require_wanted()
            drawn = self._drawer.draw(key, pieces, after_step)
        except _Stop:
            outcome = "stopped"
        except UserError as error:
            outcome, fault = "refused", NoRoom(*error.args)
        except Exception as error:  # a bug: of these clients, not of the server
            outcome, fault = "failed", error
        seconds = time.monotonic() - began
        if drawn:
            self._pace += 0.2 * (seconds / len(drawn) - self._pace)
        # told first: who has its answer finds it in the figures
        self._told(Batch(len(batch), seconds, outcome))
        with self._changed:
            self._drawing = []
            for (ticket, index), picture in zip(batch, drawn, strict=False):
                self._take(ticket, index, picture, len(batch))
        if fault is not None:
            for ticket in dict.fromkeys(ticket for ticket, _ in batch):
                self._fail(ticket, fault)

    def _take(self, ticket: Ticket, index: int, picture: Image, size: int) -> None:
        if ticket.gone:
            return
        ticket.pictures[index] = picture
        ticket.batches.append(size)
        ticket.hear(Drawn(index, picture))
        if len(ticket.pictures) == ticket.order.count and not ticket.future.done():
            ticket.future.set_result([ticket.pictures[k] for k in range(ticket.order.count)])

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        with self._changed:
            self._waiting = deque(each for each in self._waiting if each[0] is not ticket)
            if not ticket.future.done():
                ticket.future.set_exception(error)
