"""Less noise from the libraries on the command line."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

_IMAGES, _KERNELS = "transformers.utils.import_utils", "bitsandbytes.backends.cpu.ops"


def _of_use(record: logging.LogRecord) -> bool:
    """Whether a user can do something with a warning of these loggers."""
    message = record.getMessage()
    return "requires torchvision" not in message and "CPU gemm_4bit_forward" not in message


def quiet() -> None:
    """Turn off the bars of the libraries that load models: they break ours. Their warnings stay.

    But for three that a user can do nothing with: that an image processor, which this kit does not use, would
    rather have torchvision, that a UNet holds more than one adapter, as with a styled teacher it must, and
    that bitsandbytes, which peft imports, has not downloaded a faster kernel for inference in 4 bits.
    """
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    for name in (_IMAGES, _KERNELS):
        logging.getLogger(name).addFilter(_of_use)  # once, however often this is called
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """`quiet` within the block alone: the libraries' settings are the program's that calls the kit."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in (_IMAGES, _KERNELS)]
    filters = [list(logger.filters) for logger in loggers]
    bars = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    with warnings.catch_warnings():
        quiet()
        try:
            yield
        finally:
            for each in bars:
                each.enable_progress_bar()
            for logger, before in zip(loggers, filters, strict=True):
                logger.filters = before
