"""An epsilon base at zero terminal SNR is refused with its reason, before anything is encoded or trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from lcm_kit.cli.check import check
from lcm_kit.config import schema
from lcm_kit.data import encoding, images
from lcm_kit.errors import UserError
from tests.bases import build_sd


def test_encode_and_check_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_sd(tmp_path / "base", "epsilon", rescale_betas_zero_snr=True)
    config = schema.Distill(
        recipe="train/distill", output=str(tmp_path / "run"), base=schema.Base(path=str(base)),
        data=schema.Data(path="asset:brand", cache=str(tmp_path / "cache")),
    )  # fmt: skip
    monkeypatch.setattr(encoding, "write_shard", lambda *a: pytest.fail("something was encoded"))
    for refuse in (lambda: images.encode(config, progress=False), lambda: check(config)):
        with pytest.raises(UserError, match="predicts epsilon on a schedule with zero terminal SNR"):
            refuse()
    v = build_sd(tmp_path / "v", "v_prediction", rescale_betas_zero_snr=True)
    told = check(schema.Distill(**{**vars(config), "base": schema.Base(path=str(v))}))  # type: ignore[arg-type]
    assert any("sd, v_prediction prediction" in line for line in told)
