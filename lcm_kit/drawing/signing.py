"""Content credentials (C2PA) of drawn pictures: a signed manifest in the file that says a model made it.

The public library `c2pa-python` signs, with a key and certificates of the user's own, and asks no server.
What is said: that it was created by a trained model (`c2pa.created`, IPTC's digital source type), with what
version of the kit, of which base and LoRA, and how; the prompt only where somebody asks for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lcm_kit import __version__
from lcm_kit.drawing.made import base_name
from lcm_kit.errors import UserError, first_line
from lcm_kit.io.files import sha256_file
from lcm_kit.lora.locate import adapter_file

LABEL = "lcm-kit.drawing"  # of the assertion with base, LoRA and settings
_IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DRAWN, SHEET = f"{_IPTC}trainedAlgorithmicMedia", f"{_IPTC}compositeSynthetic"
EDITED = f"{_IPTC}compositeWithTrainedAlgorithmicMedia"  # part of it is somebody's own picture
_TOLD = ("sampler", "steps", "guidance_scale", "lora_weight", "seed")
_LONGEST = 300  # characters of the library's own words
_KINDS = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".mp4": "video/mp4"}
_ALGORITHMS = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}


Sign = Callable[[str, str | None, bytes], bytes]
"""(name, prompt, content) -> the file that is written; without a prompt it is the contact sheet."""


def unsigned(name: str, prompt: str | None, content: bytes) -> bytes:
    """The file as it is."""
    return content


@dataclass(frozen=True)
class Signer:
    """A key and its certificates, that one first and then those that vouch for it."""

    algorithm: bytes
    certificates: bytes = field(repr=False)
    _key: bytes = field(repr=False)
    with_prompt: bool = False

    @staticmethod
    def load(key: Path, certificates: Path, *, with_prompt: bool = False) -> Signer:
        """From PEM files, tried on a picture of one pixel, so that nothing is drawn that cannot be signed.

        Raises `UserError` if the extra is not installed, a file is not what it should be, the two do not
        belong together, or the library refuses them.
        """
        _library()
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization

        try:
            private = serialization.load_pem_private_key(_read(key, "--sign"), password=None)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--sign {key} is no private key in PEM without a password ({first_line(error)}); give "
                "one as openssl writes it, of an elliptic curve, RSA or Ed25519"
            ) from error
        chain = _read(certificates, "--cert")
        try:
            own = x509.load_pem_x509_certificates(chain)[0]
        except ValueError as error:
            raise UserError(
                f"--cert {certificates} holds no certificate in PEM ({first_line(error)}); give the key's "
                "own, then those that vouch for it"
            ) from error
        spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        if private.public_key().public_bytes(*spki) != own.public_key().public_bytes(*spki):
            raise UserError(
                f"the first certificate of --cert {certificates} is not that of --sign {key}; give its own, "
                "then those that vouch for it"
            )
        plain = private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        found = Signer(_algorithm(private, key), chain, plain, with_prompt)
        pixel = io.BytesIO()
        Image.new("RGB", (1, 1)).save(pixel, "PNG")
        found.signed(pixel.getvalue(), found.manifest("a try", "", {}, None, None))
        return found

    def of_drawing(self, base: str, settings: Mapping[str, Any], source: str = DRAWN) -> Sign:
        """What signs the pictures of a drawing, of which `manifest` says the rest; `source`: its kind."""
        given, adapter = settings.get("adapter"), None
        if given is not None:
            file = adapter_file(given)
            adapter = {"name": file.name, "sha256": sha256_file(file)}  # once: it may have hundreds of MB

        def sign(name: str, prompt: str | None, content: bytes) -> bytes:
            return self.signed(content, self.manifest(name, base, settings, adapter, prompt, source))

        return sign

    def signed(self, content: bytes, manifest: Mapping[str, Any]) -> bytes:
        """A file's content with the manifest in it, whose title's suffix says of what kind it is, else PNG.

        Raises `UserError` if the library does not sign.
        """
        c2pa = _library()
        made, kind = io.BytesIO(), _KINDS.get(Path(manifest["title"]).suffix.lower(), _KINDS[".png"])
        try:
            info = c2pa.C2paSignerInfo(
                alg=self.algorithm, sign_cert=self.certificates, private_key=self._key, ta_url=None
            )
            with c2pa.Signer.from_info(info) as signer, c2pa.Builder(dict(manifest)) as builder:
                builder.sign(signer, kind, io.BytesIO(content), made)
        except c2pa.C2paError as error:
            reason = " ".join(str(error).split())[:_LONGEST]
            raise UserError(
                f"the pictures cannot be signed with --sign and --cert ({reason}); C2PA wants a "
                "certificate for signing (extended key usage emailProtection or documentSigning, not "
                "self-signed), and in --cert all that vouch for it but the root"
            ) from error
        return made.getvalue()

    def manifest(
        self,
        title: str,
        base: str,
        settings: Mapping[str, Any],
        adapter: Mapping[str, str] | None,
        prompt: str | None,
        source: str = DRAWN,
    ) -> dict[str, Any]:
        """What is said of a picture `title`; without `prompt` it is the contact sheet.

        `settings` are those of `sample.draw_images`, `adapter` the LoRA's `name` and `sha256`. Of what lies
        in a folder the name alone is said.
        """
        told: dict[str, Any] = {"base": base_name(base)}
        told |= {name: settings[name] for name in _TOLD if settings.get(name) is not None}
        if adapter is not None:
            told["adapter"] = dict(adapter)
        if prompt is not None and self.with_prompt:
            told["prompt"] = prompt
        kit = {"name": "lcm-kit", "version": __version__}
        action = {
            "action": "c2pa.created",
            "digitalSourceType": SHEET if prompt is None else source,
            "softwareAgent": kit,
        }
        return {
            "title": title,
            "claim_generator_info": [kit],
            "assertions": [
                {"label": "c2pa.actions.v2", "data": {"actions": [action]}},
                {"label": LABEL, "data": told},
            ],
        }


def _library() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise UserError(
            "--sign needs the library c2pa; install it with `pip install 'lcm-kit[c2pa]'`"
        ) from error
    return c2pa


def _read(file: Path, option: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{option} {file} cannot be read ({error.strerror}); check the path") from error


def _algorithm(key: Any, file: Path) -> bytes:
    """C2PA's name of the algorithm that a key signs by."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _ALGORITHMS:
        return _ALGORITHMS[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey):
        return b"ps256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    raise UserError(
        f"--sign {file} is a key of a kind that C2PA does not know; give one of P-256, P-384, P-521, RSA or "
        "Ed25519"
    )
