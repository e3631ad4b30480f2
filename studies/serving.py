"""What `lcm-kit serve` adds to the drawing itself, and whether its memory stays what it was.

    OMP_NUM_THREADS=1 python -m studies.serving draw
    OMP_NUM_THREADS=1 python -m studies.serving load [SECONDS]
    OMP_NUM_THREADS=1 python -m studies.serving memory [REQUESTS] [SIDES]

With tiny-sd and its LCM-LoRA. The limit is what nobody can be faster than: 4 bare calls of the UNet with the
LoRA in its weights and one decode. `draw`: processor seconds of it, and of what the server's thread does for
the same number of pictures, in turns, in this process. The others start a real server and send it requests
over HTTP. `load`: 1, 4 and 16 clients, each of which asks for its next picture of 4 steps when it has the
last one; the limit is that of as many pictures as the server drew at once, timed in this process before and
after each round, while the server rests. `memory`: requests of one step that differ in seed, count, prompt,
adapter weights and size, with so many different sides (1 to 4), some of them given up by their client or
refused. The figures stand in docs/benchmarks.md.
"""

from __future__ import annotations

import http.client
import itertools
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import psutil
import torch

from lcm_kit import sample
from lcm_kit.config.schema import Base
from lcm_kit.drawing import vae
from lcm_kit.serve.adapters import Served
from lcm_kit.serve.asked import Key
from lcm_kit.serve.drawer import Drawer, Piece

BASE, ADAPTER = "asset:tiny-sd", "asset:tiny-lcm-lora"
STEPS, CLIENTS = 4, (1, 4, 16)
WARM, ROUNDS = 1.5, 6  # seconds of load before it counts; times that it is measured
PROMPTS = ("a red circle", "a blue square on a striped ground", "two green triangles", "a yellow star")


@contextmanager
def serving(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A server that is ready: its process, and where it listens."""
    command = [sys.executable, "-m", "lcm_kit", "serve", "--base", BASE, "--adapter", ADAPTER, "--port", "0"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = [json.loads(line) for line in _until_ready(process.stderr)]
        where = next(line["url"] for line in lines if line["event"] == "listening")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or its pipe is full one day
        host, _, port = where.removeprefix("http://").rpartition(":")
        yield process, host, int(port)
    finally:
        process.terminate()
        process.wait()


def _until_ready(lines: Any) -> Iterator[str]:
    for line in lines:
        if line.startswith("{"):
            yield line
            if json.loads(line)["event"] == "ready":
                return
    raise SystemExit("the server did not start; run lcm-kit serve and see what it says")


class Client:
    """One connection that is kept."""

    def __init__(self, host: str, port: int) -> None:  # noqa: D107
        self._where = host, port
        self._connection = http.client.HTTPConnection(*self._where, timeout=600)

    def ask(self, **asked: Any) -> int:
        """The status of an answer that was read to its end."""
        headers = {"Content-Type": "application/json", "Accept": "image/png, application/json;q=0.5"}
        if asked.get("count", 1) > 1:
            headers["Accept"] = "application/json"
        self._connection.request("POST", "/v1/pictures", json.dumps(asked), headers)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status

    def give_up(self, **asked: Any) -> None:
        """Ask, and hang up before there is an answer."""
        connection = http.client.HTTPConnection(*self._where, timeout=600)
        connection.request("POST", "/v1/pictures", json.dumps(asked), {"Content-Type": "application/json"})
        connection.close()


def _at_once(clients: int, work: Callable[[int], None]) -> None:
    """Do the work of each in a thread of its own; what one raises ends the study."""
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))


# -- Load ----------------------------------------------------------------------------------------------------


def bare() -> Callable[[int], None]:
    """4 UNet calls and a decode of so many pictures."""
    pipe = sample.adapted(BASE, ADAPTER)
    unet, side = pipe.unet, pipe.unet.config.sample_size
    width = unet.config.cross_attention_dim

    @torch.no_grad()
    def draw(count: int) -> None:
        latents = torch.randn(count, unet.config.in_channels, side, side)
        told = torch.randn(count, 77, width)
        for step in range(STEPS):
            latents = unet(latents, torch.tensor(999 - 250 * step), encoder_hidden_states=told).sample
        vae.decode(pipe.vae, latents)

    return draw


def limit() -> Callable[[int], float]:
    """How many seconds that takes, for a number of pictures."""
    draw = bare()

    def once(count: int) -> float:
        began = time.perf_counter()
        draw(count)
        return time.perf_counter() - began

    def seconds(count: int) -> float:
        once(count)
        return median(once(count) for _ in range(max(5, 20 // count)))

    return seconds


def drawing(rounds: int = 20) -> None:
    """Print a line for 1 and for 8 pictures at once: the medians over rounds."""
    served = Served.of(Base(path=BASE), [ADAPTER])
    drawer, draw = Drawer(served, 8), bare()
    drawer.open()
    use, side = served.settings(served.adapters[0]), served.base.resolution
    name = served.adapters[0].name
    key = Key(side, side, use.sampler, STEPS, use.guidance_scale, None, ((name, served.adapters[0].weight),))

    def spent(what: Callable[..., Any], *given: Any) -> float:
        began = time.process_time()
        what(*given)
        return 1000 * (time.process_time() - began)

    print("at once  limit ms  drawn ms  share of the limit", flush=True)
    for count in (1, 8):
        least, taken = [], []
        for number in range(rounds):
            pieces = [Piece(PROMPTS[k % len(PROMPTS)], number, k) for k in range(count)]
            least.append(spent(draw, count))
            taken.append(spent(drawer.draw, key, pieces, lambda *_: None))
        shares = [a / b for a, b in zip(least[2:], taken[2:], strict=True)]  # the first are slower
        print(f"{count:7}  {median(least):8.0f}  {median(taken):8.0f}  {median(shares):18.2f}", flush=True)


def measured(host: str, port: int, clients: int, seconds: float) -> list[float]:
    """Latencies in seconds of so many clients at once, over that time."""
    until = time.perf_counter() + WARM + seconds
    taken: list[tuple[float, float]] = []  # when it was there, and how long it took

    def work(number: int) -> None:
        client = Client(host, port)
        for k in itertools.count():
            began = time.perf_counter()
            if began > until:
                return
            asked = {
                "prompt": PROMPTS[(number + k) % len(PROMPTS)],
                "seed": 1000 * number + k,
                "steps": STEPS,
            }
            status = client.ask(**asked)
            if status != 200:
                raise SystemExit(f"a request was answered by {status}")
            taken.append((time.perf_counter(), time.perf_counter() - began))

    _at_once(clients, work)
    return [each for at, each in taken if until - seconds <= at <= until]


def _figure(host: str, port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + " ")), 0.0)


def load(seconds: float) -> None:
    """Print a line for each number of clients: of `ROUNDS` of load, each between two timings of the limit.

    A machine is not equally fast all the time, so a share is of one round; told are the median and the range.
    """
    fastest = limit()
    print("clients  at once  p50 ms  p95 ms  p99 ms  pictures/s  limit ms  share of the limit", flush=True)
    names = "lcm_kit_batch_pictures_sum", "lcm_kit_batch_pictures_count"
    with serving("--rate", "1000000", "--batch", str(max(CLIENTS))) as (_, host, port):
        for clients in CLIENTS:
            taken: list[float] = []
            together = clients
            rates, limits, shares = [], [], []
            for _ in range(ROUNDS):
                first, before = fastest(together), [_figure(host, port, name) for name in names]
                some = measured(host, port, clients, seconds / ROUNDS)
                drawn, batches = (
                    _figure(host, port, name) - was for name, was in zip(names, before, strict=True)
                )
                if round(drawn / batches) != together:  # the first round shows how many are drawn at once
                    together = round(drawn / batches)
                    first = fastest(together)
                limits.append((first + fastest(together)) / 2)
                rates.append(len(some) / (seconds / ROUNDS))
                shares.append(rates[-1] * limits[-1] / together)
                taken += some
            cuts = [1000 * each for each in quantiles(taken, n=100)]
            print(
                f"{clients:7}  {together:7}  {cuts[49]:6.0f}  {cuts[94]:6.0f}  {cuts[98]:6.0f}  "
                f"{median(rates):10.2f}  {1000 * median(limits):8.0f}  {median(shares):.2f} "
                f"[{min(shares):.2f}, {max(shares):.2f}]",
                flush=True,
            )


# -- Memory --------------------------------------------------------------------------------------------------


def memory(requests: int, sides: int = 4) -> None:
    """Print the server's own memory after each tenth of the requests, and its growth in the second half."""
    told = 10
    print("requests  own MiB", flush=True)
    with serving("--rate", "1000000", "--queue", "256") as (process, host, port):
        held, done = [], 0
        for part in range(told):
            until = (part + 1) * requests // told
            _ask_for(host, port, range(done, until), sides)
            done = until
            held.append(psutil.Process(process.pid).memory_info().rss / 2**20)
            print(f"{done:8}  {held[-1]:7.1f}", flush=True)
    half = held[told // 2 :]
    print(f"growth in the last {len(half) - 1} parts: {half[-1] - half[0]:+.1f} MiB")


def _ask_for(host: str, port: int, numbers: range, sides: int, clients: int = 8) -> None:
    left = iter(numbers)
    taking = threading.Lock()

    def work(_: int) -> None:
        client = Client(host, port)
        while True:
            with taking:
                number = next(left, None)
            if number is None:
                return
            asked = request(number, sides)
            if number % 25 == 0:
                client.give_up(**asked)
                continue
            status, refused = client.ask(**asked), number % 40 == 1
            if status != (422 if refused else 200):
                raise SystemExit(f"request {number} was answered by {status}")

    _at_once(clients, work)


def request(number: int, sides: int) -> dict[str, Any]:
    """One of many: nearly each has another prompt and seed, one in forty is wrong."""
    all_sides = 32, 40, 48, 64
    asked: dict[str, Any] = {
        "prompt": f"{PROMPTS[number % len(PROMPTS)]} number {number}", "seed": number, "steps": 1,
        "width": all_sides[number // 64 % sides], "height": all_sides[number // 256 % sides],
        "count": 1 + (number % 50 == 7),
    }  # fmt: skip
    if number // 512 % 4 == 1:
        asked["adapters"] = {"tiny-lcm-lora": 0.25 * (1 + number // 2048 % 4)}
    if number % 40 == 1:
        asked["steps"] = 1000
    return asked


def main() -> None:
    """One of the studies."""
    studies: dict[str, tuple[Callable[..., None], list[int]]] = {
        "draw": (drawing, []),
        "load": (load, [36]),
        "memory": (memory, [10_000, 4]),
    }
    name, *given = sys.argv[1:] or [""]
    if name not in studies or len(given) > len(studies[name][1]):
        raise SystemExit(__doc__)
    study, usual = studies[name]
    study(*map(int, given), *usual[len(given) :])


if __name__ == "__main__":
    main()
