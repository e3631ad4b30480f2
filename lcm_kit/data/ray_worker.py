"""What runs on a machine of a Ray cluster: it makes the parts of source shards, and tells what came of each.

All that it is given and all that it answers is plain data, and every model is loaded where it runs. A
`UserError` is an answer like any other, so that it reaches the terminal as the sentence that it is.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lcm_kit.config.load import parse
from lcm_kit.config.schema import Training
from lcm_kit.data import shards, stream_images, vae_precision
from lcm_kit.data.encoder import usable_base
from lcm_kit.data.parts import PartMaker
from lcm_kit.data.ray_tries import MOST
from lcm_kit.data.streams import SourceShard, source_shards
from lcm_kit.errors import UserError
from lcm_kit.io.files import refusal_of
from lcm_kit.quiet import quiet


@dataclass(frozen=True)
class Job:
    """What a worker has to know."""

    config: str  # as `dump` writes it
    cwd: str  # the driver's, in which its relative paths begin
    mark: str  # a file that the driver keeps in the cache: who does not see it would write elsewhere
    settings: Mapping[str, Any] | None = None  # of the parts, as the driver will look for them
    tries: Any = None  # Ray's handle of a `Tries`


class Worker:
    """Makes parts, one after the other; the models are loaded with the first."""

    def __init__(self, job: Job) -> None:  # noqa: D107
        self.job = job
        self._maker: PartMaker | None = None
        self._sources: dict[str, SourceShard] = {}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """Make the part of the shard `batch["source"][0]`; the answer is that of `answer`, as a batch."""
        source, identity = str(batch["source"][0]), str(batch["identity"][0])
        return {"answer": [answer(lambda: self._make(source, identity))]}

    def _make(self, name: str, identity: str) -> None:
        self._require_hope(name)
        maker, source = self._ready(name, identity)
        maker.make(source)

    def _require_hope(self, name: str) -> None:
        import ray

        if self.job.tries and not ray.get(self.job.tries.begin.remote(name)):
            raise UserError(
                f"the worker that encoded {name} died, {MOST} times; its node may lack memory (give fewer "
                "workers, or a smaller data.batch_size), or look into Ray's logs; what is done is kept"
            )

    def _ready(self, name: str, identity: str) -> tuple[PartMaker, SourceShard]:
        """What makes the part, and what of. Raises `UserError` naming the node if the driver means others."""
        with at_node():
            if self._maker is None:
                config = config_of(self.job)
                assert self.job.settings is not None
                precision = vae_precision.of(self.job.settings)
                # before a byte of the cache is written
                here = shards.settings(usable_base(config), config.data, precision)
                if other := shards.differences(self.job.settings, here):
                    raise UserError(
                        f"it would make other parts than the driver looks for: {'; '.join(other)}; give all "
                        "nodes the same base and version of the kit"
                    )
                self._sources = {source.name: source for source in source_shards(config.data)}
                self._maker = stream_images.part_maker(config, precision)
            source = self._sources.get(name)
            if source is None or (identity and source.identity() != identity):
                raise UserError(
                    f"{name} of data.path is {'not there' if source is None else 'another file there'}; put "
                    "the set into a folder that all nodes share, or at an address (s3://...)"
                )
            return self._maker, source


def tried_precision(job: Job) -> str:
    """`answer` with the precision that this machine's device proves for the VAE."""

    def find() -> str:
        with at_node():
            config = config_of(job)
            sources = source_shards(config.data)
            return stream_images.try_precision(usable_base(config), config.data, sources)

    return answer(find)


def config_of(job: Job) -> Training:
    """The config of a job, in whose cache the driver's mark is seen. Raises `UserError` where it is not."""
    with contextlib.suppress(OSError):  # relative paths are not found then
        os.chdir(job.cwd)
    config = parse(job.config)
    assert isinstance(config, Training)
    folder = stream_images.folder_of(config.data)
    if folder.size(job.mark) is None:
        raise UserError(
            f"data.cache {folder.shown} is not the driver's there; put it into a folder that all nodes share "
            "under that path, or at an address (s3://...)"
        )
    return config


@contextlib.contextmanager
def at_node() -> Iterator[None]:
    """Name the node in a `UserError` of the block: it tells of a machine that the user does not sit at."""
    try:
        yield
    except UserError as error:
        sentence, items = error.args
        raise UserError(f"Ray node {socket.gethostname()}: {sentence}", items) from error


def answer(do: Callable[[], Any]) -> str:
    """What came of `do`, as JSON text: its value or its error, the node, and what was printed meanwhile.

    Raises what is no error of the user's.
    """
    import ray

    said = io.StringIO()
    told: dict[str, Any] = {"node": ray.get_runtime_context().get_node_id()}
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        quiet()
        try:
            told["value"] = do()
        except UserError as error:
            told["error"] = error.args
        except Exception as error:
            if (refusal := refusal_of(error)) is None:
                raise
            told["error"] = refusal.args
    return json.dumps({**told, "said": [line for line in said.getvalue().splitlines() if line.strip()]})
