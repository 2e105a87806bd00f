"""One view of every Mixture-of-Experts block of transformers, and of ours."""

import pytest
import torch
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    FlexOlmoConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from conftest import small_model
from moesaic import InputError, Plan, Routing, find_blocks, routed_by
from moesaic.evaluation.cost import active_block_weights
from moesaic.models.families import decoder_layers
from moesaic.moe.modeling import moesaic_config

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip
EXPERTS, CHOSEN, WIDTH = 6, 2, 24
MLA = {
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
STOCK = {
    "mixtral": (MixtralConfig, {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}, True, False),
    "qwen2-moe": (Qwen2MoeConfig, {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH,
                                   "shared_expert_intermediate_size": 16, "intermediate_size": 40}, False, True),
    "qwen3-moe": (Qwen3MoeConfig, {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH, "head_dim": 16,
                                   "norm_topk_prob": True}, True, False),
    "olmoe": (OlmoeConfig, {"num_experts": EXPERTS, "intermediate_size": WIDTH}, False, False),
    "glm4-moe": (Glm4MoeConfig, {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH, "n_shared_experts": 1,
                                 "first_k_dense_replace": 0, "head_dim": 16}, True, True),
    "granite-moe": (GraniteMoeConfig, {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}, True, False),
    "granite-moe-shared": (GraniteMoeSharedConfig, {"num_local_experts": EXPERTS, "intermediate_size": WIDTH,
                                                    "shared_intermediate_size": 16}, True, True),
    "deepseek-v2": (DeepseekV2Config, MLA | {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH,
                                             "n_shared_experts": 1, "first_k_dense_replace": 1}, False, True),
    "deepseek-v3": (DeepseekV3Config, MLA | {"n_routed_experts": EXPERTS, "moe_intermediate_size": WIDTH,
                                             "n_shared_experts": 1, "first_k_dense_replace": 1}, True, True),
    "phi-moe": (PhimoeConfig, {"num_local_experts": EXPERTS, "intermediate_size": WIDTH}, False, False),
    "flex-olmo": (FlexOlmoConfig, {"num_experts": EXPERTS, "intermediate_size": WIDTH}, False, False),
    "gpt-oss": (GptOssConfig, {"num_local_experts": EXPERTS, "intermediate_size": WIDTH, "head_dim": 16}, True, False),
    "llama4": (Llama4TextConfig, {"num_local_experts": EXPERTS, "intermediate_size": WIDTH,
                                  "intermediate_size_mlp": 40, "head_dim": 16}, False, True),
}  # fmt: skip
"""Configuration class, its fields, whether weights are renormalised, whether there are shared experts."""
TOKENS = torch.arange(24)[None] % 64


def stock(name):
    config_class, fields, *_ = STOCK[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**SIZES | fields | {"num_experts_per_tok": CHOSEN})).eval()
    for parameter in model.parameters():  # some architectures start experts or routers at zero
        parameter.data = torch.randn_like(parameter) * 0.1
    model.set_experts_implementation("eager") if model._can_set_experts_implementation() else None
    return model


def ours(selection="top-k"):
    torch.manual_seed(0)
    config = moesaic_config(small_model("llama").config, Plan(1, CHOSEN, EXPERTS + 1, 12), selection=selection)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1
    return model


@pytest.mark.parametrize("name", STOCK)
def test_a_block_tells_its_parts(name):
    *_, renormalised, shared = STOCK[name]
    model = stock(name)
    blocks = find_blocks(model)
    dense = 1 if name.startswith("deepseek") else 0
    assert [block.layer for block in blocks] == list(range(dense, 2))
    for block in blocks:
        assert (block.num_experts, block.num_experts_per_tok) == (EXPERTS, CHOSEN)
        assert (block.hidden_size, block.moe_intermediate_size) == (32, WIDTH)
        assert (block.shared_experts is not None) == shared
        assert block.norm_topk_prob() == renormalised
        layer = decoder_layers(model)[block.layer]
        assert all(layer.get_submodule(block.names[part]) is getattr(block, part) for part in ("router", "experts"))


def test_our_block_tells_its_parts():
    for block in find_blocks(ours()):
        assert (block.num_experts, block.num_experts_per_tok, block.hidden_size) == (EXPERTS, CHOSEN, 32)
        assert block.moe_intermediate_size == 12
        assert block.shared_experts is not None
        assert not block.norm_topk_prob()  # weights are 1, however many run


@pytest.mark.parametrize("name", [*STOCK, "ours"])
@torch.no_grad()
def test_its_own_decision_from_outside_changes_nothing(name):
    model = ours() if name == "ours" else stock(name)
    blocks, seen = find_blocks(model), []
    handles = [block.watch(lambda _, routing: seen.append(routing)) for block in blocks]
    expected = model(TOKENS).logits
    for handle in handles:
        handle.remove()
    assert len(seen) == len(blocks)
    assert all(routing.top_k_index.shape == (24, CHOSEN) for routing in seen)
    with routed_by(blocks, seen):
        torch.testing.assert_close(model(TOKENS).logits, expected)
    assert not any(block.router._forward_hooks for block in blocks)


def experts_one_by_one(block, x):
    """Every expert's output on all tokens, [E, T, D], by a loop over its weights."""
    experts, outputs = block.experts, []
    for e in range(block.num_experts):
        gate_up, down = experts.gate_up_proj[e], experts.down_proj[e]
        if block.is_transposed:  # gpt-oss, with biases
            gated = experts._apply_gate(x @ gate_up + experts.gate_up_proj_bias[e])
            outputs.append(gated @ down + experts.down_proj_bias[e])
        else:
            gate, up = linear(x, gate_up).chunk(2, -1)
            outputs.append(linear(experts.act_fn(gate) * up, down))
    return torch.stack(outputs)


@pytest.mark.parametrize("name", [*(name for name in STOCK if name != "llama4"), "ours"])
@torch.no_grad()
def test_a_decision_from_outside_is_what_runs(name):
    """The block's output moves by exactly the weighted sum of other experts; Llama-4 weighs what enters them."""
    block = find_blocks(ours() if name == "ours" else stock(name))[-1]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [5, 0], [3, 1]])
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))

    def output(factor):
        with block.routed_by(Routing(index, factor * weights)):
            found = block.module(x[None])
        return (found[0] if isinstance(found, tuple) else found).reshape(5, 32)

    each = experts_one_by_one(block, x)
    expected = (each[index, torch.arange(5)[:, None]] * weights[..., None]).sum(1)
    torch.testing.assert_close(output(1.0) - output(0.0), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_no_expert_in_a_slot_equals_weight_nothing():
    block = find_blocks(ours())[0]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    index, weights = torch.tensor([[0, 1]] * 4), torch.tensor([[1.0, 0.0]] * 4)
    without = block.module(x, Routing(index, weights))
    skipped = block.module(x, Routing(index.masked_fill(weights == 0, EXPERTS), weights))
    torch.testing.assert_close(skipped, without)


def test_a_decision_for_other_tokens_is_refused():
    model = ours()
    three = Routing(torch.zeros(3, 1).long(), torch.ones(3, 1))
    with find_blocks(model)[0].routed_by(three), pytest.raises(InputError, match="for 3 tokens, the block got 24"):
        model(TOKENS)


@pytest.mark.parametrize("name", ["qwen3-moe", "deepseek-v3", "granite-moe-shared"])
def test_what_a_token_reads_is_counted_in_models_of_other_makers(name):
    block = find_blocks(stock(name))[-1]
    each = sum(p.numel() for p in block.experts.parameters()) / EXPERTS
    total = sum(p.numel() for p in block.module.parameters())
    assert active_block_weights(block) == pytest.approx(total - (EXPERTS - CHOSEN) * each)
    assert active_block_weights(block, EXPERTS) == total
