"""Methods from outside the package, as CONTRIBUTING shows them: from Python, from the command line, by entry point."""

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import moesaic
from conftest import QUICK, SMALL
from moesaic import InputError, registry
from moesaic.checkpoint.builtin import tiny_folder
from moesaic.partition import Partitioner

ROOT = Path(__file__).parent.parent
OUTSIDERS = {
    "partition": "EveryOther", "router": "Squared", "selection": "AboveMean", "recovery": "Rescale",
    "method": "OnlyShared", "format": "Qwen3Moe", "pruning": "Weighty", "cache": "Rarest",
}  # fmt: skip
SETTINGS = {"partition": "EveryOther", "router": "Squared", "selection": "AboveMean", "recovery": "Rescale"}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """CONTRIBUTING's code as the file that it tells to write, in the working folder."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    (tmp_path / "my_methods.py").write_text("\n\n".join(code[:-1]))  # the last is a family's row
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("my_methods", None)


@pytest.fixture
def mine(file):
    return importlib.import_module("my_methods")


def moesaic_command(*arguments):
    """The command line in a process of its own, which knows nothing of what this one has imported."""
    command = [sys.executable, "-m", "moesaic.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_objects_go_through_as_objects(mine):
    config = QUICK.model_copy(
        update={"partition": mine.EveryOther(), "router": mine.Squared(), "selection": mine.AboveMean(threshold=0.1),
                "recovery": mine.Rescale(), "plan": "S1A2E8"}
    )  # fmt: skip
    result = moesaic.convert("tiny", "out", config, force=True)
    assert result.partition == "my_methods:EveryOther"
    assert json.loads(Path("out/config.json").read_text())["router"] == "my_methods:Squared"
    assert json.loads(Path("out/config.json").read_text())["selection"] == "my_methods:AboveMean:threshold=0.1"
    model, _ = moesaic.load("out")
    gate = model.model.layers[0].mlp.gate
    assert isinstance(gate, mine.SquaredGate)
    assert gate.selection == mine.AboveMean(threshold=0.1)
    tuned = moesaic.finetune(
        "out", "tuned", moesaic.FinetuneConfig(method=mine.OnlyShared(), steps=2, samples=16, window=64, held_out=4)
    )
    assert (tuned.method, list(tuned.trainable_parameters)) == ("my_methods:OnlyShared", ["shared"])


def test_a_format_of_ones_own_is_read_back(mine, folders):
    config = QUICK.model_copy(update={"partition": "specialists", "plan": "S0A1E4", "format": mine.Qwen3Moe()})
    result = moesaic.convert(folders("qwen3"), "out", config)
    assert (result.format, result.check.median_difference < 1e-4) == ("qwen3_moe", True)
    assert type(AutoModelForCausalLM.from_pretrained("out")).__name__ == "Qwen3MoeForCausalLM"
    again = moesaic.export("out", "moesaic", "moesaic")
    assert again.target == "moesaic"
    few = moesaic.FinetuneConfig(steps=2, samples=16, window=64, held_out=4, teacher=str(folders("qwen3")))
    tuned = moesaic.finetune("out", "tuned", few)
    assert tuned.format == "qwen3_moe"
    with pytest.raises(InputError, match="it has no shared expert"):
        moesaic.convert(folders("qwen3"), "no", config.model_copy(update={"plan": "S1A1E4"}))


def test_the_command_line_takes_module_and_class(file):
    chosen = [part for stage, name in SETTINGS.items() for part in (f"--{stage}", f"my_methods:{name}")]
    small = ["--plan", "S1A2E8", "--tokens", "1024", "--window", "64", "--force"]
    done = moesaic_command("convert", "tiny", "out", *chosen, *small, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["partition"] == "my_methods:EveryOther"
    refused = moesaic_command("generate", "out", "The first")
    assert refused.returncode == 2
    assert "--import my_methods" in refused.stderr
    assert (
        moesaic_command("--import", "my_methods", "generate", "out", "The first", "--max-new-tokens", 2).returncode == 0
    )
    tuned = moesaic_command("--import", "my_methods", "finetune", "out", "tuned", "--method", "my_methods:OnlyShared",
                            "--steps", 2, "--samples", 16, "--window", 64)  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr


@pytest.mark.parametrize("stage", OUTSIDERS)
def test_an_entry_point_makes_the_name_enough(mine, file, stage):
    about = file / "mine-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[moesaic.{stage}]\nof-mine = my_methods:{OUTSIDERS[stage]}\n")
    assert "of-mine" in registry.names(stage)
    assert isinstance(registry.build(stage, "of-mine"), getattr(mine, OUTSIDERS[stage]))


@pytest.mark.parametrize("stage", OUTSIDERS)
def test_an_outsiders_text_makes_it_again(mine, stage):
    method = getattr(mine, OUTSIDERS[stage])()
    assert registry.build(stage, registry.spec(method)) == method


@dataclass(frozen=True, kw_only=True)
class Demanding(Partitioner):
    """Has an option without a default and one that holds commas."""

    width: int
    sizes: tuple[int, ...] = (1, 2)

    def split(self, sample, plan, generator):
        raise AssertionError("not called")


def test_text_of_options_without_default_or_with_commas_makes_it_again():
    method = Demanding(width=3, sizes=(4, 5, 6))
    text = registry.spec(method)
    assert text == f"{__name__}:Demanding:width=3,sizes=(4, 5, 6)"
    assert registry.build("partition", text) == method
    with pytest.raises(InputError, match=r"option width of partition .*required"):
        registry.build("partition", f"{__name__}:Demanding")


def test_rank_is_an_option_of_a_method_of_ones_own(mine):
    with pytest.raises(InputError, match="'my_methods:OnlyShared' has no option 'rank'"):
        moesaic.FinetuneConfig.read(None, {"method": "my_methods:OnlyShared", "rank": 4})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no_such_file:Mine", "cannot import 'no_such_file'"),
        ("my_methods:EveryOhter", "has no 'EveryOhter' Did you mean 'EveryOther'"),
        ("my_methods:Squared", "expected a dataclass that derives from Partitioner"),
        ("my_methods:EveryOther:width=3", "has no option 'width'"),
    ],
)
def test_what_is_no_method_is_refused(file, text, says):
    with pytest.raises(InputError, match=says):
        registry.build("partition", text)


def test_a_checkpoint_does_not_import_anything(file):
    """A name that stands in a checkpoint must not run a file."""
    (file / "evil.py").write_text("raise SystemExit('imported')")
    with pytest.raises(InputError, match="if you trust it, import evil first"):
        registry.build("selection", "evil:Selection", imported_only=True)


class OtherNamesConfig(LlamaConfig):
    model_type = "other-names"


class OtherNamesMLP(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = (config.hidden_size, config.intermediate_size)
        self.wi_0, self.wi_1 = (torch.nn.Linear(*sizes, bias=False) for _ in range(2))
        self.wo = torch.nn.Linear(*reversed(sizes), bias=False)
        self.act = torch.nn.SiLU()

    def forward(self, x):
        return self.wo(self.act(self.wi_0(x)) * self.wi_1(x))


class OtherNamesForCausalLM(LlamaForCausalLM):
    config_class = OtherNamesConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OtherNamesMLP(config)
        self.post_init()


def test_a_family_with_other_names_is_one_row(tmp_path, monkeypatch):
    from moesaic.models import families

    AutoConfig.register("other-names", OtherNamesConfig, exist_ok=True)
    AutoModelForCausalLM.register(OtherNamesConfig, OtherNamesForCausalLM, exist_ok=True)
    torch.manual_seed(0)
    OtherNamesForCausalLM(OtherNamesConfig(**SMALL)).save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(tiny_folder()).save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="has no dense gated FFN"):
        moesaic.convert(tmp_path / "dense", tmp_path / "out", QUICK)
    monkeypatch.setattr(families, "FFN_LAYOUTS", [*families.FFN_LAYOUTS])
    row = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[-1]
    exec(compile(row, "CONTRIBUTING.md", "exec"), {})
    moesaic.convert(tmp_path / "dense", tmp_path / "out", QUICK.model_copy(update={"format": "moesaic"}), force=True)
    model, _ = moesaic.load(tmp_path / "out")
    assert type(model).__name__ == "MoesaicOtherNamesForCausalLM"


def test_a_cache_policy_of_ones_own_chooses(file):
    from moesaic.store.policies.base import CacheSize, ExpertKey

    cache = registry.build("cache", "my_methods:Rarest").cache(CacheSize(2, 1, 4))
    for key in (ExpertKey(0, 0), ExpertKey(0, 1)):
        cache.admit(key)
        cache.use(key)
    cache.use(ExpertKey(0, 0))
    assert cache.victim(ExpertKey(0, 2), set()) == ExpertKey(0, 1)
    assert cache.victim(ExpertKey(0, 2), {ExpertKey(0, 1)}) == ExpertKey(0, 0)
    assert cache.victim(ExpertKey(0, 2), set(cache.resident)) is None
