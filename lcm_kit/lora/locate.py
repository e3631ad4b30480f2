"""Where a LoRA lies that a config or a command names: a file, a run's folder, an asset or the hub."""

from __future__ import annotations

from pathlib import Path

from lcm_kit import assets
from lcm_kit.errors import UserError, first_line
from lcm_kit.lora import verified

NAME = "pytorch_lora_weights.safetensors"  # diffusers' name of a LoRA file, which the hub's have too
ADAPTER_FILE = f"export/{NAME}"  # within a run's folder
_ASSET, _HUB = "asset:", "hub:"


def named(text: str) -> bool:
    """Whether `text` names an asset or a LoRA on the hub, not a path."""
    return text.startswith((_ASSET, _HUB))


def called(adapter: str | Path) -> str:
    """What apps call the LoRA that `adapter` means: its file without the ending, else its run or asset."""
    text = str(adapter)
    path = Path(text.rpartition(":")[2]) if named(text) else Path(text)
    return path.stem if path.suffix == ".safetensors" else path.resolve().name


def adapter_file(adapter: str | Path) -> Path:
    """The LoRA file that `adapter` means.

    A `.safetensors` file itself; of a run's folder its export; of any other folder, as of an export or of
    `asset:NAME`, the file that diffusers would load. `hub:OWNER/NAME` is that file of a repository on the
    hub, `hub:OWNER/NAME/FILE` another one, downloaded once by huggingface_hub's own rules (HF_HOME,
    HF_HUB_OFFLINE, HF_TOKEN). Raises `UserError` if there is none.
    """
    text = str(adapter)
    if text.startswith(_HUB):
        return _downloaded(text)
    path = Path(assets.resolve(text))
    if path.is_dir() and not (path / NAME).is_file():
        trained, path = path / "adapter" / "lora.safetensors", path / ADAPTER_FILE
        if trained.is_file() and path.is_file() and not verified.is_made_from(path, trained):
            raise UserError(
                f"run {text!r} was trained on since its export; run `lcm-kit export {adapter}` again"
            )
        if not path.is_file():
            raise UserError(f"run {text!r} has no {ADAPTER_FILE}; run `lcm-kit export {adapter}` first")
    elif path.is_dir():
        path = path / NAME
    if not path.is_file() or path.suffix != ".safetensors":
        raise UserError(
            f"adapter {text!r} is not a run's folder or a .safetensors file; check the path (a LoRA on the "
            "hub is hub:OWNER/NAME)"
        )
    if verified.is_checked(path) is False:
        raise UserError(
            f"{path} is not the file that {verified.RECORD} beside it tells of; make it again, or move it "
            "elsewhere if it was changed on purpose"
        )
    return path


def _downloaded(text: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, _, rest = text.removeprefix(_HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository or (file and not file.endswith(".safetensors")):
        raise UserError(
            f"adapter {text!r} is not hub:OWNER/NAME or hub:OWNER/NAME/FILE.safetensors; write it so"
        )
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file or NAME))
    except Exception as error:  # the name, the network, permissions: the hub raises of all kinds
        reason = first_line(error)
        raise UserError(
            f"adapter {text!r} cannot be had from the hub ({reason}); check the name and the connection, or "
            "download the file and give its path"
        ) from error
