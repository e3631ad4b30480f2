"""Content credentials of drawn pictures: signed with a test key, read back by the library."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lcm_kit import __version__, assets
from lcm_kit.cli.main import app
from lcm_kit.drawing import signing
from lcm_kit.drawing.animations import Animation
from lcm_kit.drawing.signing import LABEL, Signer
from lcm_kit.errors import UserError
from lcm_kit.io.files import sha256_file

SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def test_without_the_extra_a_sentence_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "c2pa", None)
    with pytest.raises(UserError, match=r"pip install 'lcm-kit\[c2pa\]'"):
        Signer.load(tmp_path / "key.pem", tmp_path / "cert.pem")


@pytest.mark.parametrize("options", [["--sign", "k.pem"], ["--cert", "c.pem"], ["--sign-prompt"]])
def test_half_of_the_options_is_refused(options: list[str]) -> None:
    done = CliRunner().invoke(app, ["sample", "--prompt", "a red circle", *options])
    assert done.exit_code and "--sign and --cert go together" in f"{done.output}{done.exception}"


@pytest.fixture(scope="module")
def c2pa() -> Any:
    pytest.importorskip("cryptography", reason="needs the extra `c2pa`")
    return pytest.importorskip("c2pa", reason="needs the extra `c2pa`")


@pytest.fixture(scope="module")
def pair(c2pa: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives.asymmetric import ec

    return keys(tmp_path_factory.mktemp("keys"), ec.generate_private_key(ec.SECP256R1()))


def keys(folder: Path, key: Any, usage: str = "1.3.6.1.5.5.7.3.4") -> tuple[Path, Path]:
    """A key, and its certificate with that of a root which vouches for it; `usage`: emailProtection."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    root = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)

    def named(name: str) -> x509.Name:
        kinds = x509.NameOID.COUNTRY_NAME, x509.NameOID.ORGANIZATION_NAME, x509.NameOID.COMMON_NAME
        return x509.Name(
            [x509.NameAttribute(k, v) for k, v in zip(kinds, ("DE", "Test Studio", name), strict=True)]
        )

    def certified(subject: str, own: Any, ca: bool) -> bytes:
        may = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        made = (
            x509.CertificateBuilder(named("root"), named(subject), own.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **may), critical=True
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(own.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), critical=False
            )
        )
        if not ca:
            made = made.add_extension(x509.ExtendedKeyUsage([x509.ObjectIdentifier(usage)]), critical=False)
        return made.sign(root, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    pem = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL
    if not hasattr(key, "curve") and not hasattr(key, "key_size"):
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(*pem, serialization.NoEncryption()))
    (folder / "cert.pem").write_bytes(certified("signer", key, False) + certified("root", root, True))
    return folder / "key.pem", folder / "cert.pem"


def told(c2pa: Any, content: bytes, kind: str = ".png") -> tuple[dict[str, Any], dict[str, Any]]:
    """What the library reads: the whole, and the picture's manifest with its assertions by label."""
    found = json.loads(c2pa.Reader(kind[1:], io.BytesIO(content)).json())
    manifest = found["manifests"][found["active_manifest"]]
    manifest["assertions"] = {each["label"]: each["data"] for each in manifest["assertions"]}
    return found, manifest


def test_signed_pictures_say_what_made_them_and_the_same_pixels(
    c2pa: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    lora = assets.path("tiny-lcm-lora") / "pytorch_lora_weights.safetensors"
    words = ["sample", "--prompt", "a red circle on a blue background", "--adapter", "asset:tiny-lcm-lora"]
    words += ["--base", "asset:tiny-sd", "--steps", "2", "--seed", "3", "--device", "cpu"]
    for folder, more in (("plain", []), ("signed", ["--sign", str(pair[0]), "--cert", str(pair[1])])):
        done = CliRunner().invoke(app, [*words, "--output", str(tmp_path / folder), *more])
        assert done.exit_code == 0, (done.output, done.exception)
    names = sorted(path.name for path in (tmp_path / "signed").glob("*.png"))
    assert len(names) == 2 and names == sorted(path.name for path in (tmp_path / "plain").glob("*.png"))
    for name in names:
        content = (tmp_path / "signed" / name).read_bytes()
        pixels = np.asarray(Image.open(io.BytesIO(content)))
        assert (pixels == np.asarray(Image.open(tmp_path / "plain" / name))).all()
        found, manifest = told(c2pa, content)
        assert found["validation_state"] == "Valid"
        assert {each["code"] for each in found["validation_status"]} == {"signingCredential.untrusted"}
        (action,) = manifest["assertions"]["c2pa.actions.v2"]["actions"]
        kind = "compositeSynthetic" if name == "contact-sheet.png" else "trainedAlgorithmicMedia"
        assert action["action"] == "c2pa.created" and action["digitalSourceType"] == SOURCE + kind
        assert action["softwareAgent"] == {"name": "lcm-kit", "version": __version__}
        assert manifest["assertions"][LABEL] == {
            "base": "asset:tiny-sd", "sampler": "lcm", "steps": 2, "guidance_scale": 1.0, "lora_weight": 1.0,
            "seed": 3, "adapter": {"name": lora.name, "sha256": sha256_file(lora)},
        }  # fmt: skip
        assert manifest["title"] == name and manifest["claim_generator_info"][0]["name"] == "lcm-kit"
        assert manifest["signature_info"]["issuer"] == "Test Studio"
        assert b"red circle" not in content and str(tmp_path).encode() not in content


@pytest.mark.parametrize("kind", [".gif", ".webp", ".mp4"])
def test_animations_are_signed_and_play_as_before(
    c2pa: Any, pair: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    """Byte by byte, so that a changed one shows; frames and times are those of the unsigned file."""
    av = pytest.importorskip("av", reason="needs the extra `video`") if kind == ".mp4" else None
    frames = [Image.effect_noise((64, 48), 10 * k + 5).convert("RGB") for k in range(3)]
    sign = Signer.load(*pair).of_drawing("hub/base", {"steps": 4}, signing.EDITED)
    plain, path = tmp_path / f"plain{kind}", tmp_path / f"clip{kind}"
    Animation(plain, fps=5).write(frames)
    Animation(path, fps=5).write(frames, lambda content: sign(path.name, "a red circle", content))
    content = path.read_bytes()
    found, manifest = told(c2pa, content, kind)
    (action,) = manifest["assertions"]["c2pa.actions.v2"]["actions"]
    assert found["validation_state"] == "Valid" and manifest["title"] == path.name
    assert action["digitalSourceType"] == SOURCE + "compositeWithTrainedAlgorithmicMedia"
    assert manifest["assertions"][LABEL] == {"base": "hub/base", "steps": 4}

    def shown(file: Path) -> list[Any]:
        if av is not None:
            with av.open(str(file)) as opened:
                return [
                    (frame.pts * frame.time_base, frame.to_ndarray().tobytes()) for frame in opened.decode()
                ]
        with Image.open(file) as opened:
            found = []
            for k in range(opened.n_frames):
                opened.seek(k)
                pixels = opened.convert("RGB").tobytes()
                found.append((opened.info["duration"], opened.info["loop"], pixels))
            return found

    assert shown(path) == shown(plain) and len(shown(path)) == 3
    changed = bytearray(content)
    changed[-9] ^= 1  # of the last frame
    assert told(c2pa, bytes(changed), kind)[0]["validation_state"] == "Invalid"


def test_a_changed_picture_is_no_longer_valid(c2pa: Any, pair: tuple[Path, Path]) -> None:
    content = bytearray(signed(Signer.load(*pair), "a.png"))
    assert told(c2pa, bytes(content))[0]["validation_state"] == "Valid"
    content[content.rfind(b"IDAT") + 8] ^= 1
    found, _ = told(c2pa, bytes(content))
    assert found["validation_state"] == "Invalid"
    assert "assertion.dataHash.mismatch" in {each["code"] for each in found["validation_status"]}


def signed(signer: Signer, name: str, prompt: str | None = "a red circle") -> bytes:
    png = io.BytesIO()
    Image.effect_noise((64, 48), 90).convert("RGB").save(png, "PNG")
    manifest = signer.manifest(name, "hub/base", {"steps": 4, "seed": 0, "size": None}, None, prompt)
    return signer.signed(png.getvalue(), manifest)


def test_the_prompt_is_said_only_where_asked(c2pa: Any, pair: tuple[Path, Path]) -> None:
    for asked in (False, True):
        _, manifest = told(c2pa, signed(Signer.load(*pair, with_prompt=asked), "a.png"))
        assert manifest["assertions"][LABEL] == {
            "base": "hub/base", "steps": 4, "seed": 0, **({"prompt": "a red circle"} if asked else {}),
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["p384", "p521", "rsa", "ed25519"])
def test_keys_of_every_kind_sign(c2pa: Any, tmp_path: Path, kind: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    key = {
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
    }[kind]()
    found, _ = told(c2pa, signed(Signer.load(*keys(tmp_path, key)), "a.png"))
    assert found["validation_state"] == "Valid"


def test_a_faulty_key_or_certificate_is_one_sentence_before_anything_is_drawn(
    c2pa: Any, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    key, cert = pair
    (tmp_path / "other").mkdir()
    (tmp_path / "web").mkdir()
    other, _ = keys(tmp_path / "other", ec.generate_private_key(ec.SECP256R1()))
    web = keys(tmp_path / "web", ec.generate_private_key(ec.SECP256R1()), "1.3.6.1.5.5.7.3.1")
    odd = tmp_path / "odd.pem"
    odd.write_text("no PEM")
    for one, two, said in (
        (tmp_path / "none.pem", cert, "cannot be read"), (odd, cert, "is no private key in PEM"),
        (key, odd, "holds no certificate"), (other, cert, "is not that of --sign"),
        (*web, "cannot be signed with --sign and --cert"),
    ):  # fmt: skip
        words = ["sample", "--prompt", "a red circle", "--base", "asset:tiny-sd", "--steps", "1"]
        output = ["--output", str(tmp_path / "out"), "--sign", str(one), "--cert", str(two)]
        done = CliRunner().invoke(app, [*words, *output])
        assert done.exit_code and said in " ".join(f"{done.output} {done.exception}".split())
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_signed_is_not_written(
    c2pa: Any, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcm_kit.sample import sample_to_folder

    signer = Signer.load(*pair)
    monkeypatch.setattr(signing, "LABEL", "")
    object.__setattr__(signer, "certificates", b"no more")
    with pytest.raises(UserError, match="cannot be signed"):
        sample_to_folder(
            "asset:tiny-sd", ["a red circle"], tmp_path, sign=signer.of_drawing("", {}), adapter=None,
            sampler="ddim", steps=1, guidance_scale=1.0, device="cpu",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
