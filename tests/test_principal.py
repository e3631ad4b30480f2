"""The encoder of tiny-sd's VAE is a linear map: principal components of patches, whatever the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lcm_kit.tiny import models, principal, studio


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    rng = np.random.default_rng(2)
    drawn = np.stack([np.asarray(studio.studio_picture(rng)) for _ in range(40)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2) / 127.5 - 1


def test_components_are_those_of_a_singular_value_decomposition(images: torch.Tensor) -> None:
    found = principal.components(images, 6)
    cut = images.reshape(40, 3, 16, 4, 16, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 48).double().numpy()
    _, values, vectors = np.linalg.svd(cut - cut.mean(0), full_matrices=False)
    deviation = values[:6] / len(cut) ** 0.5
    own = found.rows.double().numpy() * deviation[:, None]
    assert np.allclose(np.abs(own @ vectors[:6].T), np.eye(6), atol=1e-4)
    latents = principal.encode(found, images).permute(0, 2, 3, 1).reshape(-1, 6)
    assert latents.mean(0).abs().max() < 1e-4
    assert np.allclose(latents.std(0).numpy(), 1, rtol=1e-3)


def test_the_same_components_whatever_sign_the_library_gives(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, eigh = principal.components(images, 24), torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: (eigh(x)[0], -eigh(x)[1]))
    assert torch.allclose(principal.components(images, 24).rows, plain.rows)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 0.01), (torch.float16, 0.05)])
def test_the_encoder_gives_what_the_map_gives(images: torch.Tensor, dtype: torch.dtype, near: float) -> None:
    found = principal.components(images, models.LATENT)
    vae = models.build_vae().eval()
    principal.set_encoder(vae, found)
    with torch.no_grad():
        posterior = vae.to(dtype).encode(images[:8].to(dtype)).latent_dist
    assert (posterior.mean.float() - principal.encode(found, images[:8])).abs().max() < near
    assert posterior.std.max() < 0.01


def test_the_encoder_tells_its_components(images: torch.Tensor) -> None:
    found = principal.components(images, models.LATENT)
    vae = models.build_vae().eval()
    principal.set_encoder(vae, found)
    told = principal.of_encoder(vae)
    assert torch.allclose(told.rows, found.rows, atol=1e-3 * found.rows.abs().max().item())
    assert (principal.encode(told, images) - principal.encode(found, images)).abs().max() < 0.02
    assert torch.allclose(told.deviations, found.deviations, rtol=2e-3)


def test_more_components_than_there_is_room_for_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="25 components do not fit; the encoder has room for 24"):
        principal.set_encoder(models.build_vae(), principal.components(images, 25))
