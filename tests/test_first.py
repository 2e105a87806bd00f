"""Tokens that open a text: alone they are what they are in it, and recovery brings them back to the dense stream."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from conftest import QUICK, block_for, random_sample
from moesaic import InputError, Plan, convert, registry
from moesaic.calibration.layers import replaced_ffn
from moesaic.calibration.sinks import CHAT_SHARE, SHARE, ffn_factor, opening_targets, opening_tokens
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.conversion.layer import convert_layer
from moesaic.conversion.prepare import prepare
from moesaic.conversion.states import embed
from moesaic.models.layerwise import LayerwiseModel
from moesaic.recovery.closed_form import ClosedForm

CPU = torch.device("cpu")
NORM_BEHIND = {"gemma2", "gemma3", "olmo2"}


@pytest.fixture
def no_bos():
    """The tiny model's tokenizer as one that puts nothing before a text, as Qwen's do."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    tokenizer._tokenizer.post_processor = None
    assert tokenizer("a")["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer


def test_openings_are_spread_over_the_text_and_some_open_a_chat(no_bos):
    tokens = torch.arange(2, 2 + 128).view(2, 64)
    assert opening_tokens(tokens, no_bos, None).tolist() == [[2 + SHARE * i] for i in range(128 // SHARE)]
    assert len(opening_tokens(tokens, no_bos, 0)) == 0
    assert opening_tokens(tokens, no_bos, 10_000).flatten().equal(tokens.flatten())
    no_bos.chat_template = "Q: {{ messages[0].content }}"
    opened = opening_tokens(tokens, no_bos, None).flatten()
    assert set(opened[::CHAT_SHARE].tolist()) == {no_bos("Q")["input_ids"][0]}
    assert opened[1].item() == 2 + SHARE
    no_bos.chat_template = "{{ raise_exception('a system message first') }}"
    assert opening_tokens(tokens, no_bos, None)[0].item() == 2


def test_a_tokenizer_with_a_bos_needs_none():
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    assert opening_tokens(torch.arange(64).view(1, 64), tokenizer, None).shape == (0, 1)
    with pytest.raises(InputError, match="--first-tokens 8 has no use"):
        opening_tokens(torch.arange(64).view(1, 64), tokenizer, 8)


def first_layer(folder):
    """(stream, hidden states of texts of 9 tokens and of their first tokens alone)."""
    stream = LayerwiseModel(folder, torch.float32, CPU)
    stream.load_embeddings_and_head()
    tokens = torch.randint(2, 1024, (5, 9), generator=torch.Generator().manual_seed(0))
    return stream, stream.embed(tokens), stream.embed(tokens[:, :1])


def test_a_first_token_alone_is_what_it_is_in_its_text(folders, family):
    stream, hidden, first = first_layer(folders(family))
    for index in range(len(stream.layers)):
        with stream.layer(index) as layer:
            hidden, first = (stream.run(index, layer, states) for states in (hidden, first))
    torch.testing.assert_close(first, hidden[:, :1], rtol=1e-4, atol=1e-4)


def test_with_the_target_as_ffn_output_the_layer_gives_the_dense_stream(folders, family):
    stream, _, dense = first_layer(folders(family))
    moved = dense + 0.3 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    with stream.layer(1) as layer:
        expected = stream.run(1, layer, dense)
        expected_factor = 0 if family in NORM_BEHIND else {"granite": 0.5}.get(family, 1)
        assert ffn_factor(stream, 1, layer, dense[:1]) == pytest.approx(expected_factor, abs=1e-5)
        _, target, after = opening_targets(stream, 1, layer, moved, dense)
        torch.testing.assert_close(after, expected)
        if family in NORM_BEHIND:
            return

        class Target(torch.nn.Module):
            def forward(self, hidden_states):
                return target.view_as(hidden_states)

        with replaced_ffn(layer, Target()):
            torch.testing.assert_close(stream.run(1, layer, moved), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "plan"), [("specialists", Plan(1, 1, 4, 12)), ("random", Plan(1, 2, 4, 12))])
def test_recovery_fits_openings_as_so_many_more_rows(name, plan):
    """Equals numpy.linalg.lstsq over the rows of both, each opening with its own target and weight."""
    sample, other = random_sample(tokens=400), random_sample(tokens=60, seed=1)
    opening = replace(other, ffn=sample.ffn, output_TD=2 * sample.ffn(other.input_TD))
    partitioner = registry.build("partition", name)
    partition = partitioner.split(sample, plan, torch.Generator().manual_seed(0))
    moe = block_for(sample, plan)
    gate = registry.build("router", partitioner.default_router).fit(sample, partition, plan.num_experts_per_tok)
    moe.load_dense(sample.ffn, partition.shared, partition.experts, gate)
    blocks = [partition.shared, *partition.experts]

    def rows(part):
        on = torch.zeros(part.tokens, len(blocks)).index_fill_(1, torch.tensor(0), 1)
        on[:, 1:].scatter_(1, moe.gate(part.input_TD, moe.experts)[0], 1)
        h = part.ffn.hidden(part.input_TD)
        z = torch.cat([h[:, block] * on[:, i : i + 1] for i, block in enumerate(blocks)], 1)
        return z * part.weight_T[:, None], part.output_TD * part.weight_T[:, None]

    (z, y), (z_first, y_first) = rows(sample), rows(opening)
    expected = np.linalg.lstsq(torch.cat([z, z_first]).numpy(), torch.cat([y, y_first]).numpy(), rcond=None)[0]
    ClosedForm(ridge=0).recover(moe, replace(sample, opening=opening), partition)
    found = torch.cat([down.T for *_, down in moe.parts(partition.shared, partition.experts)])
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=2e-2, atol=2e-3)


@pytest.fixture
def no_bos_folder(folders, no_bos, tmp_path):
    """A tiny Qwen2 whose tokenizer puts nothing before a text."""
    folder = shutil.copytree(folders("qwen2"), tmp_path / "model")
    no_bos.save_pretrained(folder)
    return folder


def test_a_converted_layer_loses_less_of_first_tokens(no_bos_folder):
    errors = {}
    for count in (0, 256):
        conversion = prepare(
            no_bos_folder, QUICK.model_copy(update={"partition": "specialists", "active": 0.5, "first_tokens": count})
        )
        assert len(conversion.tokens.opening_M1) == count
        conversion.layerwise.load_embeddings_and_head()
        states = embed(conversion.layerwise, conversion.tokens)
        for index in range(2):
            _, states, _ = convert_layer(conversion, index, states)
        dense, ours = states.dense[:, 0], states.converted[:, 0]
        errors[count] = ((ours - dense).norm(dim=1) / dense.norm(dim=1)).mean().item()
    assert errors[256] < errors[0]


def test_a_stopped_conversion_goes_on_with_its_first_tokens(no_bos_folder, tmp_path):
    def stop(done, count, record):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(no_bos_folder, tmp_path / "stopped", QUICK, progress=stop)
    resumed = convert(no_bos_folder, tmp_path / "stopped", QUICK)
    assert resumed.perplexity == convert(no_bos_folder, tmp_path / "whole", QUICK).perplexity
