"""Architectures that neither transformers nor awqdist knows, registered with transformers' Auto classes as a user's own code would be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from support.tiny_models import VOCABULARY, randomize, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


class RenamedLlamaConfig(LlamaConfig):
    model_type = "renamed_llama"


class RenamedLlamaForCausalLM(LlamaForCausalLM):
    """Llama under another name."""

    config_class = RenamedLlamaConfig


class CausalMean(nn.Module):
    """Attention that gives every earlier token the same weight. Its grouped values are repeated over the query heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.wq = nn.Linear(64, 64, bias=False)  # read, but of no effect on the weights of the mean
        self.wv = nn.Linear(64, 32, bias=True)
        self.wo = nn.Linear(64, 64, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        values = self.wv(hidden).view(batch, length, 2, 1, 16).expand(-1, -1, -1, 2, -1).reshape(batch, length, 64)
        mean = values.cumsum(1) / torch.arange(1, length + 1, device=hidden.device).view(1, -1, 1)
        return self.wo(mean * torch.sigmoid(self.wq(hidden)))


class GatedMLP(nn.Module):
    """w2(silu(w1 x) · limit(w3 x))."""

    def __init__(self, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.w1 = nn.Linear(64, 128, bias=False)
        self.w3 = nn.Linear(64, 128, bias=True)
        self.w2 = nn.Linear(128, 64, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        up = self.w3(hidden)
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        return self.w2(nn.functional.silu(self.w1(hidden)) * up)


class OddLayer(LlamaDecoderLayer):
    """Own names, own attention, own MLP."""

    limit: float | None = None

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.norm_1 = LlamaRMSNorm(config.hidden_size)
        self.mix = CausalMean(config)
        self.norm_2 = LlamaRMSNorm(config.hidden_size)
        self.ffn = GatedMLP(self.limit)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        hidden_states = hidden_states + self.mix(self.norm_1(hidden_states))
        return hidden_states + self.ffn(self.norm_2(hidden_states))


class ClampedLayer(OddLayer):
    limit = 30.0  # far above what random weights give: only large factors meet it


class PostNormLayer(OddLayer):
    """The norms' outputs are the residual stream as well."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.norm_1(hidden_states)
        normed = self.norm_2(normed + self.mix(normed))
        return normed + self.ffn(normed)


class HopelessLayer(OddLayer):
    """A norm that is the residual stream as well, and tanh between its only linears."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.norm = LlamaRMSNorm(config.hidden_size)
        self.first = nn.Linear(64, 128, bias=False)
        self.second = nn.Linear(128, 64, bias=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed = self.norm(hidden_states)
        return normed + self.second(torch.tanh(self.first(normed)))


class RoutedLayer(OddLayer):
    """Two experts that are modules of their own, and run on those tokens only that go to them."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.norm = LlamaRMSNorm(config.hidden_size)
        self.router = nn.Linear(64, 2, bias=False)
        self.experts = nn.ModuleList([GatedMLP(None), GatedMLP(None)])

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        normed, output = self.norm(hidden_states), hidden_states.clone()
        chosen = self.router(normed).argmax(-1)
        for number, expert in enumerate(self.experts):
            tokens = torch.where(chosen == number)
            output[tokens] += expert(normed[tokens])
        return output


def odd_checkpoint(kind: type[Any], folder: Path, **sizes: Any) -> Path:
    """A random checkpoint of a model class, and a tokenizer. sizes: of its configuration, beside SIZES."""
    model = kind(kind.config_class(**SIZES, **sizes)).eval()
    randomize(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _register(name: str, layer: Callable[[LlamaConfig, int], OddLayer]) -> type[LlamaForCausalLM]:
    """A causal model class `name` with the decoder layers that `layer` makes."""
    config = type(f"{name}Config", (LlamaConfig,), {"model_type": name.lower()})

    def init(self: LlamaForCausalLM, config: LlamaConfig) -> None:
        LlamaForCausalLM.__init__(self, config)
        self.model.layers = nn.ModuleList(layer(config, i) for i in range(config.num_hidden_layers))

    members = {"__init__": init, "config_class": config, "__module__": __name__}
    model = type(f"{name}ForCausalLM", (LlamaForCausalLM,), members)
    AutoConfig.register(name.lower(), config)
    AutoModelForCausalLM.register(config, model)
    return model


OddForCausalLM = _register("Odd", OddLayer)
ClampedForCausalLM = _register("Clamped", ClampedLayer)
PostNormForCausalLM = _register("PostNorm", PostNormLayer)
HopelessForCausalLM = _register("Hopeless", HopelessLayer)
RoutedForCausalLM = _register("Routed", RoutedLayer)
MixedForCausalLM = _register("Mixed", lambda config, i: (OddLayer if i == 0 else ClampedLayer)(config, i))
AutoConfig.register("renamed_llama", RenamedLlamaConfig)
AutoModelForCausalLM.register(RenamedLlamaConfig, RenamedLlamaForCausalLM)
