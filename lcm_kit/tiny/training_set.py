"""What the embedded base is trained on: its scenes, the words at their captions' ends, and the pictures.

`train/pretrain_tiny.py` is the recipe. All of it follows from the config, so the captions of all training
pictures can be made again, to show that a held-out one is none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from lcm_kit.config.pretrain import PretrainTiny
from lcm_kit.io.files import atomic_file
from lcm_kit.tiny import manners, models, studio, world


def held_out(config: PretrainTiny) -> list[str]:
    """`config.prompts` full captions, in random order, that no training picture has."""
    attributes = (world.objects(), world.COLOURS, world.PATTERNS, world.SIZES, world.PLACES)
    every = sorted(world.Scene(*names).prompt for names in product(*attributes))
    order = np.random.default_rng((config.seed, 4)).permutation(every)
    return [str(prompt) for prompt in order[: config.prompts]]


def scenes(config: PretrainTiny) -> list[world.Scene]:
    """`renders + manners` random scenes, none of them held out."""
    kept, rng = set(held_out(config)), np.random.default_rng(config.seed)
    endless = (world.random_scene(rng) for _ in count())
    return list(islice((s for s in endless if s.prompt not in kept), config.renders + config.manners))


def words(config: PretrainTiny) -> list[str]:
    """The word at each scene's end: none, one that means nothing, or that of its manner for the last ones."""
    rng = np.random.default_rng((config.seed, 5))
    plain = [
        manners.empty_word(rng) if rng.uniform() < config.empty_words else "" for _ in range(config.renders)
    ]
    return plain + [str(rng.choice(list(manners.MANNERS))) for _ in range(config.manners)]


def drawn_once(path: Path, pictures: Iterator[Image.Image]) -> np.ndarray:
    """Pictures as uint8 [N, 64, 64, 3], kept in `path`."""
    if not path.exists():
        with atomic_file(path) as temporary, temporary.open("wb") as handle:
            np.save(handle, np.stack([np.asarray(picture) for picture in pictures]))
    return np.load(path)


def draw(config: PretrainTiny, work: Path, drawn: list[world.Scene], ends: list[str]) -> np.ndarray:
    """The training pictures, uint8 [N, 64, 64, 3]."""
    pictures = (
        manners.in_manner(world.render(scene), word) if word in manners.MANNERS else world.render(scene)
        for scene, word in zip(drawn, ends, strict=True)
    )
    return drawn_once(work / "renders.npy", pictures)


def draw_studio(config: PretrainTiny, work: Path) -> np.ndarray:
    """Pictures of the kinds that studios have, uint8 [N, 64, 64, 3]."""
    rng = np.random.default_rng((config.seed, 6))
    return drawn_once(work / "studio.npy", (studio.studio_picture(rng) for _ in range(config.studio)))


def captions(drawn: list[world.Scene], ends: list[str], tokenizer: Any) -> Tensor:
    """Token ids of each scene's four captions (size and place said or not): int64 [N, 4, TOKENS]."""
    texts = [
        manners.styled(text, word) if word else text
        for scene, word in zip(drawn, ends, strict=True)
        for size, place in ((scene.size, scene.place), ("", scene.place), (scene.size, ""), ("", ""))
        for text in (replace(scene, size=size, place=place).prompt,)
    ]
    return models.token_ids(tokenizer, texts).view(len(drawn), 4, models.TOKENS)
