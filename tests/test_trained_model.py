"""Quality on a trained model with activation outliers, which random weights cannot show. Skipped where the shared folder is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from awqdist import RunSettings, load_recipe, quantize
from awqdist.cli.evaluate import evaluate
from awqdist.run.verify import verify

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "wikillama-8m-outliers"

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not MODEL.is_dir(), reason="the trained models are not beside the repository"),
]


@pytest.mark.parametrize(("recipe", "largest_kl"), [("default", 0.00012), ("awq", 0.00085)])
def test_the_quantized_model_predicts_nearly_as_the_float_model(recipe: str, largest_kl: float, tmp_path: Path) -> None:
    settings = RunSettings(MODEL, tmp_path / "output", num_samples=64, sequence_length=256)
    quantize(load_recipe(recipe), settings, SHARED / "text" / "calibration.txt")
    assert verify(settings.output, MODEL).ok
    result = evaluate(str(settings.output), SHARED / "text" / "eval.txt", against=str(MODEL))
    assert result.kl is not None
    assert result.kl <= largest_kl
