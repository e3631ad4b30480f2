"""Less noise from the libraries on the command line."""

from __future__ import annotations


def quiet() -> None:
    """Turn off the bars of the libraries that load models: they break ours. Their warnings stay.

    But for three that a user can do nothing with: that an image processor, which this kit does not use, would
    rather have torchvision, that a UNet holds more than one adapter, as with a styled teacher it must, and
    that bitsandbytes, which peft imports, has not downloaded a faster kernel for inference in 4 bits.
    """
    import logging
    import warnings

    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")

    unused = logging.getLogger("transformers.utils.import_utils")
    unused.addFilter(lambda record: "requires torchvision" not in record.getMessage())
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(lambda record: "CPU gemm_4bit_forward" not in record.getMessage())
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
