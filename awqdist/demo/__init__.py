"""The demo model: a small Llama inside the package, so that everything can be tried without a download.

The folder holds a complete model as the transformers library reads it, a text to calibrate on and a text to measure
perplexity on. No part of the second was seen in training. Importing this module imports neither torch nor transformers.
"""

from pathlib import Path

__all__ = ["calibration_text", "demo_folder", "evaluation_text"]


def demo_folder() -> Path:
    """Returns the folder of the model, as `from_pretrained` takes it."""
    return Path(__file__).resolve().parent / "model"


def calibration_text() -> Path:
    """Returns the text file to calibrate on, which is a part of the training text."""
    return demo_folder() / "calibration.txt"


def evaluation_text() -> Path:
    """Returns the text file to measure perplexity on, which was held out of the training."""
    return demo_folder() / "evaluation.txt"
