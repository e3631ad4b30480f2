"""What is swept: the adapters' files, whatever made them, and the base that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_kit import sample
from lcm_kit.adapter.folder import base_of, read_provenance
from lcm_kit.config.brand import Brand
from lcm_kit.config.sweep import Compose, GuidanceSweep
from lcm_kit.console import working
from lcm_kit.core.methods import DEFAULT, MethodInfo
from lcm_kit.errors import UserError
from lcm_kit.evaluation.recommended import method_of, weights_hash
from lcm_kit.io.files import sha256_file
from lcm_kit.lora import locate as lora_file
from lcm_kit.lora import untrusted, verify
from lcm_kit.lora.metadata_reading import provenance_from_header


@dataclass(frozen=True)
class SweptAdapter:
    """An adapter of the sweep."""

    name: str  # in the sweep: of its run, or of its file
    file: Path
    sha256: str  # of the file
    weights: str  # hash of what it does: tensors and strength
    layers: int  # modules that the file holds
    fault: str | None  # what diffusers would not load of it, or would load wrongly, in words
    method: MethodInfo = DEFAULT  # that made it

    def facts(self) -> dict[str, Any]:
        """What results.json says of it."""
        return {
            "name": self.name, "file": str(self.file), "sha256": self.sha256, "weights": self.weights,
            "layers": self.layers, "fault": self.fault,
        }  # fmt: skip


def base_keys(config: GuidanceSweep | Compose | Brand, adapter: str) -> dict[str, Any]:
    """`path`, `revision` and `variant` of the base: the config's, or what `adapter` was made on.

    Raises `UserError` if neither says.
    """
    if config.base is not None:
        return {"path": config.base, "revision": config.revision, "variant": config.variant}
    first = Path(adapter)
    if (first / "adapter").is_dir():
        return base_of(read_provenance(first / "adapter"))
    file = lora_file.adapter_file(first)
    path = provenance_from_header(untrusted.inspect(file).metadata, file.stem).base.path
    if path is None:
        raise UserError(f"{file} does not say which base it is for; give base=FOLDER, a hub id or asset:NAME")
    return {"path": path, "revision": config.revision, "variant": config.variant}


def swept_adapters(adapters: Sequence[str], against: verify.Against) -> list[SweptAdapter]:
    """Find each file and let diffusers load it. Raises `UserError` if one is not a LoRA at all."""
    files = [lora_file.adapter_file(path) for path in adapters]
    names = _names([Path(path) for path in adapters])
    return [_subject(name, file, against) for name, file in zip(names, files, strict=True)]


def require_whole(found: Sequence[SweptAdapter]) -> None:
    """Raise `UserError` for the first of them that does not load whole."""
    for each in found:
        if each.fault is not None:
            raise UserError(f"{each.file} does not load whole: {each.fault}; fix it with `lcm-kit convert`")


def _subject(name: str, file: Path, against: verify.Against) -> SweptAdapter:
    with working(f"checking {file}"):
        report = verify.verify(file, against, apps=("diffusers",), tolerance=verify.TOLERANCE["bfloat16"])
    (row,) = report.rows
    problems = [*report.file.problems, *([] if row.ok else [f"diffusers {row.verdict}"])]
    count, fault = len(report.file.lora.updates), "; ".join(problems) or None
    return SweptAdapter(name, file, sha256_file(file), weights_hash(file), count, fault, method_of(file))


def _names(paths: Sequence[Path]) -> list[str]:
    """A name for each: that of its run or file, with a number where two are the same."""
    names: list[str] = []
    for path in paths:
        plain = path.resolve().name if path.is_dir() else path.stem
        name, number = sample.slug(plain), 2
        while name in names:
            name, number = f"{sample.slug(plain)}-{number}", number + 1
        names.append(name)
    return names
