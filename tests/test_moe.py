"""The block: all experts on equals dense, fast paths equal the naive one, compilation does not break."""

import copy

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig
from transformers.activations import ACT2FN

import moesaic
from conftest import QUICK, SMALL, block_for, random_sample
from moesaic import InputError, Plan, registry
from moesaic.calibration.layers import AttentionTape, calibrate, residual_stream_error
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.conversion.prepare import prepare
from moesaic.evaluation.cost import active_block_weights
from moesaic.models.moe_block import MoEBlock, Routing
from moesaic.moe import kernels
from moesaic.moe.kernels import column_major, down_product, is_column_major, lay_down_column_major, rows_product
from moesaic.routing.selection.top_p import TopP
from moesaic.serving.loading import choose_experts


def has_own_gate(name):
    router = registry.build("router", name)
    return router.gate_name == name and router.scope == "layer"


ROUTED = [n for n in registry.names("partition") if not registry.method_class("partition", n).static]
DISJOINT = [n for n in ROUTED if not registry.method_class("partition", n).overlapping]


@pytest.mark.parametrize("name", DISJOINT)
@torch.no_grad()
def test_all_on_equals_dense_for_every_family(folders, family, name):
    conversion = prepare(folders(family), QUICK.model_copy(update={"partition": name, "plan": "S1A2E8"}))
    conversion.layerwise.load_embeddings_and_head()
    hidden = conversion.layerwise.embed(conversion.tokens.calibration_NL)
    with conversion.layerwise.layer(1) as layer:
        sample = calibrate(conversion.layerwise, 1, layer, hidden, conversion.tokens.domain_N)
        partition = conversion.partitioner.split(sample, conversion.plan, torch.Generator().manual_seed(0))
    moe = block_for(sample, conversion.plan, conversion.router.gate_name)
    moe.load_dense(
        sample.ffn,
        partition.shared,
        partition.experts,
        conversion.router.fit(sample, partition, conversion.plan.num_experts_per_tok),
    )
    torch.testing.assert_close(moe.forward_all_experts(sample.input_TD), sample.output_TD, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokens_count_relative_to_their_output():
    conversion = prepare("tiny", QUICK)
    conversion.layerwise.load_embeddings_and_head()
    with conversion.layerwise.layer(0) as layer:
        sample = calibrate(
            conversion.layerwise,
            0,
            layer,
            conversion.layerwise.embed(conversion.tokens.calibration_NL),
            conversion.tokens.domain_N,
        )
    norm = sample.output_TD.float().norm(dim=1)
    relative = sample.weight_T * norm.clamp(min=norm.median() / 20)
    torch.testing.assert_close(relative, relative[0].expand_as(relative))
    torch.testing.assert_close(sample.weight_T.mean(), torch.tensor(1.0))


@torch.no_grad()
def test_attention_runs_once_and_is_played_again_in_every_family(folders, family):
    conversion = prepare(folders(family), QUICK)
    conversion.layerwise.load_embeddings_and_head()
    hidden = conversion.layerwise.embed(conversion.tokens.calibration_NL)
    runs = []
    with conversion.layerwise.layer(0) as layer:
        layer.self_attn.o_proj.register_forward_hook(lambda *_: runs.append(1))
        tape = AttentionTape(layer)
        with tape.recording():
            once = conversion.layerwise.run(0, layer, hidden)
        batches = len(runs)
        assert batches == len(tape.outputs) > 0
        with tape.playing():
            assert torch.equal(conversion.layerwise.run(0, layer, hidden), once)
        assert len(runs) == batches
        assert not tape.outputs
        assert torch.equal(conversion.layerwise.run(0, layer, hidden), once)
        assert len(runs) == 2 * batches


def test_drift_tells_the_stream_and_its_sinks():
    dense = torch.ones(2, 5, 4)
    assert residual_stream_error(dense, 1.5 * dense) == (pytest.approx(0.5), None)
    dense[0, 0] = 100
    converted = dense.clone()
    converted[0, 0] = 80
    assert residual_stream_error(dense, converted) == pytest.approx((0.02, 0.8))


def filled(plan, gate="linear", dtype=torch.float32, name="random"):
    sample = random_sample(dtype=dtype)
    partition = registry.build("partition", name).split(sample, plan, torch.Generator().manual_seed(0))
    moe = block_for(sample, plan, gate)
    g = torch.Generator().manual_seed(2)
    weights = {n: torch.randn(p.shape, generator=g) for n, p in moe.gate.named_parameters()} if moe.gate else {}
    moe.load_dense(sample.ffn, partition.shared, partition.experts, weights)
    return moe, sample, partition


def test_k_equals_e_equals_dense():
    moe, sample, _ = filled(Plan(1, 3, 4, 12))
    torch.testing.assert_close(moe(sample.input_TD), sample.output_TD)


def test_one_specialist_of_full_width_is_dense():
    moe, sample, _ = filled(Plan(0, 1, 1, 48), name="specialists")
    torch.testing.assert_close(moe(sample.input_TD), sample.output_TD)


@pytest.mark.parametrize("plan", [Plan(1, 2, 4, 12), Plan(0, 1, 4, 12), Plan(2, 0, 4, 12)])
def test_block_equals_masking_the_dense_activations(plan):
    moe, sample, partition = filled(plan)
    x, ffn = sample.input_TD, sample.ffn
    mask = torch.zeros(len(x), 48)
    mask[:, partition.shared] = 1
    if moe.gate is not None:
        index, _ = moe.gate(x, moe.experts)
        for k in range(plan.num_experts_per_tok):
            mask.scatter_(1, partition.experts[index[:, k]], 1.0)
    torch.testing.assert_close(moe(x), linear(mask * ffn.hidden(x), ffn.down_DF))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "moesaic"])
def test_experts_implementations_equal_the_naive_loop(implementation, dtype):
    moe, sample, _ = filled(Plan(0, 2, 3, 16), dtype=dtype)
    naive = moe(sample.input_TD)
    moe.experts.config._experts_implementation = implementation
    torch.testing.assert_close(moe(sample.input_TD), naive)


@pytest.fixture
def poisoned():
    """Memory that nothing has written to is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 9, 200])
@pytest.mark.parametrize("choice", ["all to one", "none", "some none", "random", "few to some"])
@pytest.mark.parametrize("few", [1, 8])
def test_our_experts_equal_the_naive_loop_for_any_choice(poisoned, tokens, choice, turn, few, monkeypatch):
    moe, sample, _ = filled(Plan(0, 2, 4, 12))
    moe.requires_grad_(False)
    monkeypatch.setattr(kernels, "FEW_TOKENS", few)
    if turn:
        lay_down_column_major(moe)
    x = sample.input_TD[:tokens]
    g = torch.Generator().manual_seed(0)
    index = {
        "all to one": torch.tensor([[2, 2]]).expand(tokens, 2),
        "none": torch.full((tokens, 2), 4),
        "some none": torch.randint(0, 6, (tokens, 2), generator=g),
        "random": torch.randint(0, 4, (tokens, 2), generator=g),
        "few to some": torch.cat([torch.tensor([[3, 1]]), torch.tensor([[0, 2]]).expand(tokens - 1, 2)]),
    }[choice]
    weights = torch.rand(tokens, 2, generator=g)
    expected = moe.experts(x, index, weights)
    moe.experts.config._experts_implementation = "moesaic"
    torch.testing.assert_close(moe.experts(x, index, weights), expected)
    torch.testing.assert_close(moe.experts(x.T.contiguous().T, index, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 5, 40])
def test_a_product_with_turned_weights_is_the_product(dtype, tokens, monkeypatch):
    """Of few tokens it is a sum of columns, of more a product: `h Wd^T` either way."""
    g = torch.Generator().manual_seed(0)
    down_EDI, hidden_CI = torch.randn(3, 32, 12, generator=g).to(dtype), torch.randn(tokens, 12, generator=g).to(dtype)
    laid = column_major(down_EDI)
    assert is_column_major(laid)
    assert not is_column_major(down_EDI)
    assert torch.equal(laid, down_EDI)
    expected = hidden_CI.double() @ down_EDI[1].double().T
    exact = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(down_product(hidden_CI, laid[1]).double(), expected, rtol=exact, atol=exact)
    expert_C = torch.arange(tokens) % 3
    each = torch.stack([h.double() @ down_EDI[e].double().T for h, e in zip(hidden_CI, expert_C, strict=True)])
    torch.testing.assert_close(rows_product(hidden_CI, laid, expert_C).double(), each, rtol=exact, atol=exact)
    for piece in (6, 5, 3, 1):  # in two pieces, in two, in four, in four: the same but for rounding
        monkeypatch.setattr(kernels, "PIECE", piece)
        torch.testing.assert_close(rows_product(hidden_CI, laid, expert_C).double(), each, rtol=exact, atol=exact)


def test_a_loaded_model_is_turned_and_saves_what_it_was(tmp_path):
    model, _ = moesaic.load("tiny-moe", device="cpu")
    downs = [name for name, _ in model.named_parameters() if name.endswith("down_proj")]
    assert downs
    assert all(is_column_major(model.get_parameter(name)) for name in downs)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=model.dtype)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
        assert parameter.is_contiguous()


def test_gradients_reach_turned_experts():
    moe, sample, _ = filled(Plan(0, 2, 4, 12))
    moe.requires_grad_(True)
    moe.experts.config._experts_implementation = "moesaic"
    grads = []
    for turn in (False, True):
        if turn:
            lay_down_column_major(moe)
        for tokens in (1, 7):
            moe.zero_grad()
            moe(sample.input_TD[:tokens]).square().sum().backward()
            grads.append({n: p.grad.clone() for n, p in moe.experts.named_parameters()})
    for plain, laid in zip(grads[:2], grads[2:], strict=True):
        for name in plain:
            torch.testing.assert_close(laid[name], plain[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act_fn", [torch.nn.SiLU(), ACT2FN["gelu_pytorch_tanh"]])
@pytest.mark.parametrize("tokens", [1, 5])
def test_triton_kernels_equal_the_naive_loop(poisoned, tokens, act_fn, dtype):
    kernels = pytest.importorskip("moesaic.moe.triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moe, sample, _ = filled(Plan(0, 2, 4, 12), dtype=dtype)
    moe.to(device).experts.act_fn = act_fn
    x = sample.input_TD[:tokens].to(device)
    g = torch.Generator().manual_seed(0)
    index = torch.randint(0, 6, (tokens, 2), generator=g).to(device)  # 4 and 5 are no experts
    weights = torch.rand(tokens, 2, generator=g).to(device, dtype)
    expected = copy.deepcopy(moe.experts).float()(x.float(), index, weights.float())
    assert kernels.supports(moe.experts)
    moe.experts.config._experts_implementation = "moesaic_triton"
    with torch.no_grad():
        ours = moe.experts(x.T.contiguous().T, index, weights)
    assert ours.dtype == dtype
    # rounded to bfloat16 twice, where the naive loop rounds five times
    assert (ours - expected).norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-6) * expected.norm()


@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_flops_are_those_of_the_active_neurons(tokens):
    moe, sample, _ = filled(Plan(1, 2, 4, 12))
    moe.experts.config._experts_implementation = "moesaic"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe(sample.input_TD[:tokens])
    assert counter.get_total_flops() == 2 * tokens * active_block_weights(moe) - 2 * tokens * 3  # selection biases


def test_gradients_flow_through_our_experts():
    moe, sample, _ = filled(Plan(0, 2, 4, 12))
    moe.requires_grad_(True)
    grads = []
    for implementation in ("eager", "moesaic"):
        moe.experts.config._experts_implementation = implementation
        moe.zero_grad()
        moe(sample.input_TD).square().sum().backward()
        grads.append([p.grad.clone() for p in moe.experts.parameters()])
    for ours, naive in zip(*grads, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-4)


def test_indices_beyond_the_experts_stand_for_none():
    moe, sample, _ = filled(Plan(0, 2, 4, 12))
    index = torch.full((len(sample.input_TD), 2), 4)
    assert moe.experts(sample.input_TD, index, torch.ones(len(index), 2)).abs().max() == 0


def test_oracle_takes_the_experts_of_largest_output():
    moe, sample, _ = filled(Plan(0, 2, 4, 12), gate="oracle")
    moe.gate.e_score_correction_bias.zero_()
    x = sample.input_TD
    norms = torch.stack([linear(moe.experts.hidden(x, e), moe.experts.down_proj[e]).norm(dim=1) for e in range(4)], 1)
    index, weights = moe.gate(x, moe.experts)
    assert torch.equal(index, norms.topk(2).indices)
    assert (weights == 1).all()


def test_representative_gate_is_cmoes():
    moe, sample, _ = filled(Plan(0, 2, 4, 12), gate="representative")
    gate, x = moe.gate, sample.input_TD
    scores = (torch.nn.functional.silu(x @ gate.gate_proj.T) * (x @ gate.up_proj.T)).abs()
    gate.e_score_correction_bias.zero_()
    index, weights = gate(x, moe.experts)
    assert torch.equal(index, scores.topk(2).indices)
    torch.testing.assert_close(weights, (1 + scores.softmax(1) * gate.scale).gather(1, index))
    gate.e_score_correction_bias[3] = 1e6  # load balancing changes who is chosen, not the weight
    index, weights = gate(x, moe.experts)
    assert (index[:, 0] == 3).all()
    torch.testing.assert_close(weights, (1 + scores.softmax(1) * gate.scale).gather(1, index))


@pytest.mark.parametrize("gate", [name for name in registry.names("router") if has_own_gate(name)])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "moesaic"])
def test_the_block_compiles_without_graph_breaks(gate, implementation):
    moe, sample, _ = filled(Plan(1, 2, 4, 12), gate)
    if gate == "oracle":
        moe.gate.e_score_correction_bias.zero_()
    moe.experts.config._experts_implementation = implementation
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(sample.input_TD), moe(sample.input_TD))


@pytest.mark.parametrize(("at_most", "slots"), [(2, 2), (0, 6)])
def test_a_compiled_rule_has_as_many_slots_as_a_token_may_run(at_most, slots, monkeypatch):
    moe, sample, _ = filled(Plan(2, 2, 8, 6))
    moe.gate.selection = TopP(p=0.6, at_most=at_most)
    torch._dynamo.reset()
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(sample.input_TD), moe(sample.input_TD))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert moe.gate(sample.input_TD, moe.experts).top_k_index.shape[1] == slots


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "moesaic"])
def test_no_expert_from_outside_is_no_expert_in_any_implementation(implementation):
    moe, sample, _ = filled(Plan(1, 2, 4, 12), "linear")
    moe.config._experts_implementation = moe.experts.config._experts_implementation = implementation
    x_TD = sample.input_TD[:6]
    nothing = Routing(torch.full((6, 2), 3), torch.zeros(6, 2))  # three routed experts: 3 is none
    torch.testing.assert_close(moe(x_TD, nothing), moe.shared_experts(x_TD))
    block = MoEBlock(moe, moe.gate, moe.experts)
    with block.routed_by(nothing):
        torch.testing.assert_close(moe(x_TD), moe.shared_experts(x_TD))


def test_models_of_other_makers_run_our_experts_unless_asked_otherwise(tmp_path):
    torch.manual_seed(0)
    sizes = {name: SMALL[name] for name in SMALL if name != "initializer_range"}
    config = Qwen3MoeConfig(**sizes, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=2, head_dim=16)
    stock = AutoModelForCausalLM.from_config(config).eval()
    stock.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(tmp_path)
    tokens = torch.arange(40)[None]
    for name in (None, "eager", "grouped_mm", "moesaic_triton"):
        model, _ = moesaic.load(tmp_path, experts=name)
        assert model.config._experts_implementation == (name or "moesaic")
        torch.testing.assert_close(model(input_ids=tokens).logits, stock(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)
    stock.config.quantization_config = {"quant_method": "fp8"}
    choose_experts(stock, None)
    assert stock.config._experts_implementation != "moesaic"
    with pytest.raises(InputError, match=r"moesaik is not one of eager, .*moesaic"):
        moesaic.load(tmp_path, experts="moesaik")
    with pytest.raises(InputError, match="'llama' is dense"):
        moesaic.load("tiny", experts="eager")
