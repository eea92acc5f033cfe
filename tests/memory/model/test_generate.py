from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, make_tokenizer, save_model

from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.model.generate import MAX_BATCH_ROWS, cut_first_sentence, decode_steps, generate_answers

PROMPTS = ["The seat of country 1 is", "Rome", "It is", "The seat of country 22 is Oslo and"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (" Rome.", "Rome"),
        ("Rome", "Rome"),
        ("Rome. It is old.", "Rome"),
        ("J. S. Bach. He wrote", "J. S. Bach"),
        ("St. Louis. A city", "St. Louis"),
        ("Mr. T", "Mr. T"),
        ("3.5 metres. High", "3.5 metres"),
        ("version 2.0.1", "version 2.0.1"),
        ("Rome\nOslo", "Rome"),
        ("\n\nRome. Oslo", "Rome"),
        ("in 12. Then", "in 12"),
        ("by me. Then", "by me"),
        ("Rome ...", "Rome .."),
        ("example.org is", "example.org is"),
        ("", ""),
        ("  \n ", ""),
        (". Rome", ""),
    ],
)
def test_an_answer_ends_at_its_natural_stop(text: str, sentence: str) -> None:
    assert cut_first_sentence(text) == sentence


def greedy(model: EditableModel, prompt: str, tokens: int) -> str:
    """What the model says without a cache and without company."""
    ids = model.encode(prompt)
    said: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            out = model.hf_model(input_ids=torch.tensor([[*ids, *said]]), use_cache=False)
        token = int(out.logits[0, -1].argmax())
        if token == model.end_token:
            break
        said.append(token)
    return cut_first_sentence(model.decode(said))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_answers_are_greedy_and_in_the_order_of_the_prompts(
    kind: str, model_folder: Callable[[str], Path]
) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    assert generate_answers(model, PROMPTS, 6) == [greedy(model, prompt, 6) for prompt in PROMPTS]


def test_an_answer_does_not_depend_on_its_company(model: EditableModel) -> None:
    prompts = [f"The seat of country {n} is" for n in range(10, 20)] + PROMPTS
    assert generate_answers(model, prompts, 6) == [
        generate_answers(model, [p], 6)[0] for p in prompts
    ]


@torch.no_grad()
def test_steps_feed_the_likeliest_tokens_or_those_that_are_forced(model: EditableModel) -> None:
    ids = torch.tensor([model.encode(f"The seat of country {n} is") for n in (10, 11)])
    told = torch.tensor([[3, 5, 7], [8, 6, 4]])
    for forced in (None, told):
        row, steps = ids, decode_steps(model, ids, 3, forced=forced, logits_to_keep=1)
        for n, logits in enumerate(steps):
            expected = model.hf_model(input_ids=row, use_cache=False).logits[:, -1]
            assert torch.allclose(logits, expected, atol=1e-5)
            fed = expected.argmax(-1, keepdim=True) if forced is None else forced[:, n : n + 1]
            row = torch.cat([row, fed], 1)
        assert row.shape[1] == ids.shape[1] + 3


def test_no_prompts_no_answers(model: EditableModel) -> None:
    assert generate_answers(model, [], 5) == []


def chain(folder: Path, *tokens: int) -> EditableModel:
    """A model that says each of the tokens after the one before it, and knows nothing else."""
    save_model("gpt2", folder, tie_word_embeddings=False)
    model = EditableModel.load(folder, torch.device("cpu"))
    body, head = model.hf_model.transformer, model.hf_model.lm_head.weight
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if "c_proj" in name or "wpe" in name:
                parameter.zero_()
        head.zero_()
        for before, after in pairwise(tokens):
            head[after] = body.ln_f(body.wte.weight[before])
    return model


@pytest.mark.parametrize(
    ("text", "most", "answer", "passes"),
    [
        (" Rome\n Oslo Lima Cairo", 10, "Rome", 2),
        (" Rome. Oslo Lima Cairo", 10, "Rome", 3),
        (" Rome Oslo Lima Cairo", 2, "Rome Oslo", 2),
        (" Rome Oslo Lima Cairo", 10, "Rome Oslo Lima Cairo", 5),
    ],
)
def test_decoding_ends_where_the_answer_does(
    tmp_path: Path, text: str, most: int, answer: str, passes: int
) -> None:
    tokenizer = make_tokenizer()
    start, *said = tokenizer(" is" + text, add_special_tokens=False)["input_ids"]
    model = chain(tmp_path / "chain", start, *said, 0)
    seen: list[int] = []
    with model.tap_layers({0: lambda k, _y: seen.append(k.shape[1])}):
        assert generate_answers(model, ["It is"], most) == [answer]
    assert len(seen) == passes
    assert set(seen[1:]) <= {1}  # from the cache: one token a step


@pytest.mark.parametrize(("most", "reply"), [(20, "Rome. Oslo\n Lima"), (3, "Rome. Oslo")])
def test_a_whole_reply_goes_on_behind_its_first_sentence(
    tmp_path: Path, most: int, reply: str
) -> None:
    text = " is Rome. Oslo\n Lima"
    model = chain(
        tmp_path / "chain", *make_tokenizer()(text, add_special_tokens=False)["input_ids"], 0
    )
    assert generate_answers(model, ["It is"], most, whole=True) == [reply]
    assert generate_answers(model, ["It is"], most) == ["Rome"]


def test_a_row_stops_at_the_end_of_text(model: EditableModel) -> None:
    head = model.hf_model.get_output_embeddings().weight
    with torch.no_grad():
        head.zero_()  # every token is as likely as any other, and the first one is the end
    assert generate_answers(model, PROMPTS, 50) == [""] * len(PROMPTS)


def test_a_row_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    start, *said = make_tokenizer()(" is Rome Oslo", add_special_tokens=False)["input_ids"]
    model = chain(tmp_path / "chain", start, *said, 0)
    model.hf_model.generation_config.eos_token_id = [0, said[-1]]
    assert generate_answers(model, ["It is"], 10) == ["Rome"]


def test_every_group_runs_under_the_overlay_and_is_told_its_places(model: EditableModel) -> None:
    prompts = ["Rome"] * (MAX_BATCH_ROWS + 3) + ["The seat of country 1 is"]
    opened: list[list[int]] = []
    shapes: list[tuple[int, int]] = []

    @contextmanager
    def overlay(places: list[int]) -> Iterator[None]:
        opened.append(places)
        with model.tap_layers({0: lambda k, _y: shapes.append((len(places), k.shape[0]))}):
            yield

    generate_answers(model, prompts, 2, overlay)
    assert sorted(place for places in opened for place in places) == list(range(len(prompts)))
    assert max(len(places) for places in opened) == MAX_BATCH_ROWS
    assert all(told == rows for told, rows in shapes)
    for places in opened:
        assert len({prompts[place] for place in places}) == 1


def test_rows_that_find_no_memory_together_are_run_in_halves_and_that_is_told(
    model: EditableModel, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [f"The seat of country {n} is" for n in range(7)]
    calm, rows = generate_answers(model, prompts, 5), list[int]()

    def room_for_two(_model: object, _args: object, given: dict[str, torch.Tensor]) -> None:
        rows.append(len(given["input_ids"]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("no room")

    most = 2
    handle = model.hf_model.register_forward_pre_hook(room_for_two, with_kwargs=True)
    try:
        assert generate_answers(model, prompts, 5) == calm
        assert max(rows) == 7
        assert "Splitting 7 prompts in halves" in caplog.messages[0]
        most = 0
        with pytest.raises(KeditError, match="no memory left"):
            generate_answers(model, prompts, 5)
    finally:
        handle.remove()
