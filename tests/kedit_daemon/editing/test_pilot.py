from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editing_home import seat
from pilot_facts import PILOT

from kedit_daemon.editing.pilot import (
    CHAT_REQUEST,
    MAX_PROMPT_TOKENS,
    Pilot,
    PilotExaminer,
    make_pilot,
    read_pilot,
)
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.shipped import PILOT_FACTS
from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel


def test_a_pilot_keeps_paraphrases_from_the_edit(model: EditableModel) -> None:
    pilot = make_pilot(model, [*PILOT, seat(7)], 2)
    assert [f.id for f in pilot.facts] == [f.id for f in PILOT]
    assert all(not f.paraphrases for f in pilot.facts)
    assert pilot.held_out == tuple(
        (n, f.filled_paraphrases[0], f.target) for n, f in enumerate(PILOT)
    )
    assert pilot.near == ("Nothing", "He said that", "1 2 3 4")


def test_without_neighbours_the_other_facts_are_near(model: EditableModel) -> None:
    plain = [replace(seat(n), neighbours=()) for n in range(6)]
    pilot = make_pilot(model, plain, 4)
    assert len(pilot.facts) == 4
    assert pilot.near == tuple(f.question for f in plain[4:])
    pilot = make_pilot(model, plain, 9)
    assert (len(pilot.facts), len(pilot.near)) == (4, 2)
    assert not {f.question for f in pilot.facts} & set(pilot.near)


def test_without_paraphrases_other_words_stand_before_the_question(model: EditableModel) -> None:
    pilot = make_pilot(model, [seat(1), seat(2)], 2)
    assert len(pilot.held_out) == 2
    assert [place for place, _, _ in pilot.held_out] == [0, 1]
    for (_, prompt, target), fact in zip(pilot.held_out, pilot.facts, strict=True):
        assert prompt.endswith(fact.question) and len(prompt) > len(fact.question)
        assert target == fact.target


def test_what_the_model_cannot_read_is_left_out(model: EditableModel) -> None:
    long = "very " * MAX_PROMPT_TOKENS
    unreadable = replace(seat(3), prompt="The " + "seat " * 400 + "of {} is")
    wordy = replace(PILOT[0], paraphrases=(long, *PILOT[0].paraphrases))
    pilot = make_pilot(model, [unreadable, wordy], 5)
    assert [f.id for f in pilot.facts] == [wordy.id]
    assert [prompt for _, prompt, _ in pilot.held_out] == [PILOT[0].filled_paraphrases[0]]
    with pytest.raises(KeditError) as caught:
        make_pilot(model, [unreadable], 5)
    assert (caught.value.code, "at least three" in caught.value.hint) == ("pilot", True)


def test_the_examiner_asks_what_greedy_answers_would_say(model: EditableModel) -> None:
    ids = model.encode("The seat of country 3 is")
    for _ in range(2):
        with torch.no_grad():
            ids.append(int(model.hf_model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = model.decode(ids[-2:])
    known = Fact("country 3", "The seat of {} is", said.strip())
    wanted = known.target if model.encode_target(known.question, known.target) == ids[-2:] else None
    pilot = Pilot((known, PILOT[0]), ((0, known.question, known.target),), ("Nothing", "1 2"))
    quality = PilotExaminer(model, pilot)({}, 2)
    assert (quality.locality, quality.norm_ratio, quality.perplexity_ratio) == (1.0, 1.0, 1.0)
    assert (quality.reliability, quality.generality) == ((0.5, 1.0) if wanted else (0.0, 0.0))


def test_the_examiner_sees_a_change_and_takes_it_back(model: EditableModel) -> None:
    before = model.weights_hash(range(4))
    examiner = PilotExaminer(
        model, Pilot(tuple(PILOT), ((0, "x", "y"),), ("Nothing", "1 2", "He said"))
    )
    torch.manual_seed(1)
    moved = examiner({1: torch.randn_like(model.weight(1)) * 5}, 2)
    assert moved.locality < 1 and moved.norm_ratio > 2 and moved.perplexity_ratio != 1
    assert model.weights_hash(range(4)) == before
    assert examiner({}, 2).locality == 1


def test_the_examiner_asks_only_about_the_facts_that_were_edited(model: EditableModel) -> None:
    prompt, target = "The seat of country 3 is", "Rome"
    (token,) = model.encode_target(prompt, target)
    with torch.no_grad():  # the model is made to say it
        ids = torch.tensor([model.encode(prompt)])
        state = model.hf_model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        model.hf_model.get_output_embeddings().weight[token] = 1000 * state
    held_out = ((0, prompt, target), (1, prompt, "Oslo"))
    examiner = PilotExaminer(model, Pilot(tuple(PILOT), held_out, ("1 2", "He said")))
    assert (examiner({}, 1).generality, examiner({}, 2).generality) == (1.0, 0.5)


def test_a_chat_model_is_asked_in_a_chat_too(model: EditableModel) -> None:
    model.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
    )
    pilot = make_pilot(model, PILOT, 2)
    chats = [row for row in pilot.held_out if "<reply>" in row[1]]
    assert chats == [
        (n, f"<user>{CHAT_REQUEST.format(f.subject)}<reply>{f.question}", f.target)
        for n, f in enumerate(PILOT)
    ]


def test_a_pilot_is_read_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "pilot.csv"
    path.write_text("subject,prompt,target\nOslo,{} lies in,Norway\nOslo,{} lies in,Peru\nx,,\n")
    assert [f.target for f in read_pilot(path, FileLimits())] == ["Peru"]
    path.write_text("subject,prompt,target\nx,,\n")
    with pytest.raises(KeditError, match=r"pilot\.csv:2: ") as caught:
        read_pilot(path, FileLimits())
    assert caught.value.code == "pilot"
    shipped = read_pilot(PILOT_FACTS, FileLimits())
    assert len(shipped) > 16 and all(f.paraphrases and f.neighbours for f in shipped)
