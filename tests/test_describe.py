"""`moesaic describe`: everything that can be set is named, with its default and what it means."""

import json
from dataclasses import dataclass, fields

import pytest

import moesaic
from moesaic import InputError, registry
from moesaic.config.describe import RECIPES, attribute_docs

METHODS = [(stage, name) for stage in registry.STAGES for name in registry.names(stage)]


@pytest.mark.parametrize("verb", RECIPES)
def test_every_setting_of_a_recipe_is_explained(verb):
    entries = moesaic.describe(verb).entries
    assert [e.name for e in entries] == list(RECIPES[verb].model_fields)
    assert [e.name for e in entries if len(e.meaning) < 10] == []


@pytest.mark.parametrize(("stage", "name"), METHODS)
def test_every_option_of_a_method_is_explained(stage, name):
    found = moesaic.describe(f"{stage}:{name}")
    assert len(found.summary) > 20
    assert [e.name for e in found.entries] == [f.name for f in fields(registry.method_class(stage, name)) if f.init]
    assert [e.name for e in found.entries if len(e.meaning) < 10] == []
    built = registry.build(stage, name)
    assert [e.default for e in found.entries] == [repr(getattr(built, e.name)) for e in found.entries]


def test_without_a_name_it_lists_recipes_and_stages():
    assert [e.name for e in moesaic.describe().entries] == [*RECIPES, *registry.STAGES]


def test_a_stage_lists_its_methods_with_their_sources():
    found = moesaic.describe("partition")
    assert [e.name for e in found.entries] == registry.names("partition")
    assert "2502.04416" in {e.name: e.meaning for e in found.entries}["cmoe"]
    assert "--partition" in found.summary
    caches = {e.name: e.meaning for e in moesaic.describe("cache").entries}
    assert [name for name, meaning in caches.items() if "simulations alone" in meaning] == ["belady"]


def test_words_that_a_setting_may_be_are_named():
    entries = {e.name: e for e in moesaic.describe("finetune").entries}
    assert entries["objective"].choices == ["lm", "distill", "both"]
    assert entries["balance"].choices == ["none", "bias", "loss"]
    assert entries["steps"].choices is None


def test_texts_below_attributes_are_read_of_base_classes_too():
    @dataclass
    class Base:
        kept: int = 1
        """Of the base,
        in two lines."""
        changed: int = 1
        """Of the base."""

    @dataclass
    class Derived(Base):
        changed: int = 2
        """Of its own."""
        silent: int = 3

    assert attribute_docs(Derived) == {"kept": "Of the base, in two lines.", "changed": "Of its own."}
    assert attribute_docs(type("Typed", (), {})) == {}


def test_a_method_of_ones_own_is_described(tmp_path, monkeypatch):
    (tmp_path / "my_rule.py").write_text(
        "from dataclasses import dataclass\nfrom moesaic.routing.selection.top_p import TopP\n\n"
        '@dataclass(frozen=True, kw_only=True)\nclass Mine(TopP):\n    """My own rule."""\n\n    odd: int = 3\n'
    )
    monkeypatch.chdir(tmp_path)
    found = moesaic.describe("selection:my_rule:Mine")
    assert found.summary == "My own rule."
    assert {e.name: e.default for e in found.entries} == {"at_least": "1", "at_most": "0", "p": "0.8", "odd": "3"}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("partitoin", "nothing is called 'partitoin'. Did you mean 'partition'?"),
        ("", "nothing is called ''"),
        ("partition:cmoo", "unknown partition 'cmoo'. Did you mean 'cmoe'?"),
        ("partition:auto", "'partition:auto' chooses among the methods of 'partition'"),
        ("router:auto", "unknown router 'auto'"),
        ("partition:cmoe:top_k=3", "give the method alone: partition:cmoe"),
    ],
)
def test_what_there_is_not_is_one_line(run, what, says):
    with pytest.raises(InputError) as caught:
        moesaic.describe(what)
    assert says in str(caught.value)
    code, out, err = run("describe", what)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())


def test_it_prints_one_object_or_a_table_of_eighty_columns(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run("describe", "partition:cmoe", "--json")
    assert code == 0
    assert json.loads(out)["entries"][0] == {
        "name": "top_k", "default": "10", "meaning": "Neurons of a token that count as active; CMoE's K_a.",
    }  # fmt: skip
    code, out, err = run("describe", "finetune")
    assert (code, out) == (0, "")
    assert "patience" in err
    assert max(len(line) for line in err.splitlines()) <= 80
    assert "It has no options." in run("describe", "partition:random")[2]
