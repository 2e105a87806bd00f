"""Tiny dense models of every family, made from configurations; nothing is downloaded."""

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # pytest-xdist runs a worker a core
if os.environ.get("MOESAIC_TEST_GPU") != "1":  # what tests compare with lies on the CPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # our kernels' logic on CPUs; Triton reads it when it is imported

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from moesaic.calibration.activations import LayerActivations
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.config import ConvertConfig
from moesaic.models.families import GatedFFN

FAMILIES = {
    "llama": (LlamaConfig, {}),
    "llama3-rope": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": (MistralConfig, {"head_dim": 24, "sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "gemma2": (Gemma2Config, {"head_dim": 16, "sliding_window": 16}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"}),
    "phi3": (Phi3Config, {}),
    "olmo2": (Olmo2Config, {}),
    "granite": (GraniteConfig, {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
}  # fmt: skip
SMALL = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": 0.1,
}  # fmt: skip
QUICK = ConvertConfig(partition="coactivation", tokens=1_024, window=64, held_out_tokens=256)


def small_model(family):
    config_class, extra = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**(SMALL | extra))).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # so that a forgotten norm shows
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def save_smaller(folder, seed=0, tokenizer=None, **fields):
    """Save a model of `tiny`'s family with half of its layers and narrower FFNs, at random; returns its folder."""
    config = AutoConfig.from_pretrained(tiny_folder())
    for name, value in ({"num_hidden_layers": 2, "intermediate_size": 128} | fields).items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    (tokenizer or AutoTokenizer.from_pretrained(tiny_folder())).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """family -> folder of a tiny dense checkpoint with a tokenizer, made when first asked for."""
    made = {}

    def get(family, **save):
        key = (family, *save.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            small_model(family).save_pretrained(folder, **save)
            AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return get


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line here: (exit code, standard output, standard error)."""
    from moesaic import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moesaic", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call


def random_sample(tokens=200, hidden=16, neurons=48, seed=0, dtype=torch.float32):
    """A layer sample with random weights and token weights that differ."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((neurons, hidden), (neurons, hidden), (hidden, neurons))
    gate, up, down = (torch.randn(*shape, generator=g) / shape[1] ** 0.5 for shape in shapes)
    ffn = GatedFFN(gate.to(dtype), up.to(dtype), down.to(dtype), torch.nn.SiLU())
    x = torch.randn(tokens, hidden, generator=g).to(dtype)
    weight, domain = 0.5 + torch.rand(tokens, generator=g), torch.arange(tokens) % 4
    return LayerActivations(ffn=ffn, input_TD=x, output_TD=ffn(x), weight_T=weight, domain_T=domain)


def whole(partition):
    """Whether a partition's experts are whole FFNs, which have tests of their own."""
    from moesaic import registry

    return registry.method_class("partition", partition).whole_experts


def default_selection(router):
    from moesaic import registry

    return registry.method_class("router", router).default_selection


def block_for(sample, plan, gate="linear", bias=False, selection=None):
    """An unfilled MoE block for a sample and a plan."""
    from types import SimpleNamespace

    from moesaic.moe.block import MoE

    config = SimpleNamespace(
        hidden_size=sample.input_TD.shape[1], num_experts=plan.num_experts,
        num_experts_per_tok=plan.num_experts_per_tok, moe_intermediate_size=plan.width,
        shared_expert_intermediate_size=plan.shared_width, shared_expert_bias=bias,
        router=gate, router_hidden_size=16, norm_topk_prob=True, selection=selection or default_selection(gate),
        _experts_implementation="eager",
    )  # fmt: skip
    return MoE(config, sample.ffn.act_fn).to(sample.input_TD.dtype).requires_grad_(False)
