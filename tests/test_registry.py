import pytest

from moesaic import InputError, registry


@pytest.mark.parametrize("stage", registry.STAGES)
def test_every_method_builds_and_names_itself(stage):
    for name in registry.names(stage):
        assert registry.spec(registry.build(stage, name)) == name


def test_options_are_read_and_checked():
    assert registry.build("partition", "cmoe:top_k=7,iterations=2").top_k == 7
    with pytest.raises(InputError, match="Did you mean 'top_k'"):
        registry.build("partition", "cmoe:topk=7")
    for bad in ("top_k=0", "top_k=1.5"):
        with pytest.raises(InputError, match="option top_k of partition 'cmoe' is"):
            registry.build("partition", f"cmoe:{bad}")
    with pytest.raises(InputError, match="expected a number"):
        registry.build("partition", "cmoe:top_k=many")


def test_a_word_is_an_option_where_words_are_asked_for():
    assert registry.build("learner", "ppo:warm=k") == registry.build("learner", "ppo:warm='k'")
    with pytest.raises(InputError, match="should be 'p', 'k' or 'none'"):
        registry.build("learner", "ppo:warm=q")
    with pytest.raises(InputError, match="is 'soon', expected a number or True/False"):
        registry.build("learner", "ppo:epochs=soon")


@pytest.mark.parametrize("name", ["", ".x", "a b", "broken_module", "no_such_module"])
def test_a_module_that_cannot_be_imported_is_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("x = undefined_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot import") as error:
        registry.import_module(name)
    assert "\n" not in str(error.value)


def test_unknown_names_answer_with_the_nearest_and_all():
    with pytest.raises(InputError, match=r"Did you mean 'coactivation'\?.*cmoe.*specialists"):
        registry.build("partition", "coactivatoin")
