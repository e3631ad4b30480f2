"""From a trained run to files that other programs load; each is reloaded and compared before it is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lcm_kit import adapter
from lcm_kit.errors import UserError
from lcm_kit.export import diffusers_format, verify
from lcm_kit.files import atomic_write

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder


def export_run(run: Path, dtype: str = "float32") -> Path:
    """Write `run/export/pytorch_lora_weights.safetensors` for `load_lora_weights` and return its path.

    `dtype` is the weights' in the file: float32 (exact), float16 or bfloat16. The file is loaded by plain
    diffusers onto the run's base first; `verify.check` says what must agree. Prints the error measured.
    Raises `UserError`, and leaves no new file behind, if there is no finished adapter or anything disagrees.
    """
    if dtype not in verify.TOLERANCE:
        raise UserError(f"dtype {dtype!r} cannot be exported; choose one of {', '.join(verify.TOLERANCE)}")
    trained, path = run / "adapter", run / "export" / FILE
    facts = adapter.read_facts(trained)
    with tempfile.TemporaryDirectory(prefix="lcm-kit-export-") as folder:
        written = diffusers_format.write(trained, Path(folder), dtype)
        error = verify.check(written, trained, facts["base"], dtype)
        atomic_write(path, written.read_bytes())
    print(f"exported {path} ({dtype}), relative error {error:.1e} against the trained adapter")
    return path
