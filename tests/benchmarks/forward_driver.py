"""What every quantizer that calibrates does at least: loads the model with transformers, and runs the tokens through its decoder once.

python forward_driver.py MODEL TOKENS.json
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

MODEL, TOKENS = sys.argv[1:]
SAMPLES_AT_A_TIME = 8

decoder = AutoModelForCausalLM.from_pretrained(MODEL).get_decoder()
tokens = torch.tensor(json.loads(Path(TOKENS).read_text()))
with torch.no_grad():
    for chunk in tokens.split(SAMPLES_AT_A_TIME):
        decoder(chunk, use_cache=False)
