"""The demo model: a small Llama that lies in the package, so that everything can be tried without a download.

The folder holds a complete model of the ``transformers`` library, and beside it two texts: one to calibrate
on and one to measure on. No part of the second was seen in training. ``awqdist.demo.train`` made all of it,
and tells how. Importing this module imports neither torch nor transformers.
"""

from pathlib import Path

__all__ = ["calibration_text", "demo_folder", "evaluation_text"]


def demo_folder() -> Path:
    """Return the folder of the stored model, as ``from_pretrained`` takes it."""
    return Path(__file__).resolve().parent / "model"


def calibration_text() -> Path:
    """Return the text file to calibrate on: a part of what the model was trained on."""
    return demo_folder() / "calibration.txt"


def evaluation_text() -> Path:
    """Return the text file to measure perplexity on: held out of the training."""
    return demo_folder() / "evaluation.txt"
