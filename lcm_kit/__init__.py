"""Distils a Stable Diffusion base into a few-step LoRA, checks it and proves it on a picture."""

__version__ = "0.1.0"
