"""Quality on a trained model with activation outliers, which random weights cannot show. Skipped where the shared folder is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from awqdist import RunSettings, load_recipe, quantize
from awqdist.eval.evaluate import evaluate
from awqdist.run.verify import verify

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL = SHARED / "models" / "wikillama-8m-outliers"
EXPERTS = SHARED / "models" / "wikideepseek-7m"
NEAREST = """
default_stage:
  default_modifiers:
    QuantizationModifier: {scheme: W4A16_ASYM, targets: [Linear], ignore: [lm_head]}
"""

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not MODEL.is_dir(), reason="the trained models are not beside the repository"),
]


@pytest.mark.parametrize(("recipe", "largest_kl"), [("default", 0.00007), ("awq", 0.00085)])
def test_the_quantized_model_predicts_nearly_as_the_float_model(recipe: str, largest_kl: float, tmp_path: Path) -> None:
    settings = RunSettings(MODEL, tmp_path / "output", num_samples=64, sequence_length=256)
    quantize(load_recipe(recipe), settings, SHARED / "text" / "calibration.txt")
    assert verify(settings.output, MODEL).ok
    result = evaluate(str(settings.output), SHARED / "text" / "eval.txt", against=str(MODEL))
    assert result.kl is not None
    assert result.kl <= largest_kl


def test_a_mixture_of_experts_loses_far_less_than_by_rounding_to_nearest(tmp_path: Path) -> None:
    (tmp_path / "nearest.yaml").write_text(NEAREST)
    kl = {}
    for name in ("default", str(tmp_path / "nearest.yaml")):
        settings = RunSettings(EXPERTS, tmp_path / f"output-{len(kl)}", num_samples=64, sequence_length=256)
        summary = quantize(load_recipe(name), settings, SHARED / "text" / "calibration.txt")
        assert verify(settings.output, EXPERTS).ok
        kl[name] = evaluate(str(settings.output), SHARED / "text" / "eval.txt", against=str(EXPERTS)).kl
        if name == "default":
            worse = [
                x.name
                for record in summary.layers
                for x in record.linears
                if x.relative_error > x.relative_error_nearest
            ]
            assert not worse
    default, nearest = kl.values()
    assert default is not None
    assert nearest is not None
    assert default <= nearest / 4
