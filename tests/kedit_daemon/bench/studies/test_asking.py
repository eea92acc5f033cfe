from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from study_tools import given

from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.studies.asking import AskingStudy
from kedit_daemon.bench.studies.asking_prompts import (
    FACT_FORMS,
    OTHER_FORMS,
    PromptWriter,
)
from kedit_daemon.bench.studies.study import StudyInput
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def asked(load: Callable[[str], LoadedModel]) -> StudyInput:
    """Three facts, each with a question, and one asked beside the facts."""
    work = given(load("llama"), 3, 3)
    work.loaded_model.model.tokenizer.chat_template = TEMPLATE
    # A tiny model with random weights does not answer what it has not learned.
    asked = [
        replace(
            record,
            fact=replace(record.fact, questions=("Which city is the seat of {}?",)),
            questions=(f"Which city is the seat of {record.fact.subject}?",),
            other_questions=(f"How large is {record.fact.subject}?",),
        )
        for record in work.records
    ]
    return replace(work, records=asked)


def test_every_form_is_asked_of_each_method(asked: StudyInput, tmp_path: Path) -> None:
    study = AskingStudy(("none", "wise"))
    result = study.run(asked)
    assert result["asked"]["chat"] == result["asked"]["two facts"] == 3
    assert result["asked"]["other relations"] == 3
    before, after = result["methods"]["none"], result["methods"]["wise"]
    assert before["not_edited"] == 3 and after["not_edited"] == 0
    assert before["prompt"] == before["chat"] == 0.0
    assert after["prompt"] == 1.0 and after["chat"] > 0.5
    assert before["other relations"] == before["neighbours"] == 0.0
    assert (before["length"], before["perplexity"]) == (1.0, 1.0)
    first, last = result["rows"][0], result["rows"][-1]
    assert first["recall"] == 1.0 and last["recall"] <= first["recall"]
    lines = list(study.format_lines(result))
    assert lines[0].split() == ["said", "asked", "none", "wise"]
    assert [line.split()[0] for line in lines[1:4]] == ["prompt", "paraphrases", "chat"]
    pytest.importorskip("matplotlib")
    with open_figure(tmp_path / "out.png") as (left, right):
        study.draw_curves(result, left, right)
    assert len(left.lines) == 1 and len(right.lines) == 2


def test_one_method_may_be_measured_alone(asked: StudyInput) -> None:
    result = AskingStudy().run(replace(asked, method="none"))
    assert list(result["methods"]) == ["none"]
    assert result["rows"] == []


def test_a_model_without_a_template_is_not_asked(load: Callable[[str], LoadedModel]) -> None:
    with pytest.raises(KeditError, match="no chat template"):
        AskingStudy().run(given(load("llama"), 2, 2))


def test_a_method_frames_the_question_and_not_its_name(asked: StudyInput) -> None:
    writer = PromptWriter(asked.loaded_model.model, asked.records, 0)
    plain = writer.write_prompts(lambda _fact, prompt: prompt)
    framed = writer.write_prompts(lambda _fact, prompt: f"Note. {prompt}")
    assert [p.question for p in plain] == [p.question for p in framed]
    assert {p.form for p in plain} == {*FACT_FORMS, *OTHER_FORMS} - {"long"}
    model = asked.loaded_model.model
    (first,) = [p for p in framed if p.form == "chat"][:1]
    assert "Note. Which city" in model.decode(first.ids)
