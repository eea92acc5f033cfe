from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, CITIES, SENTENCES
from torch import Tensor

from memory.model.editable import EditableModel, Tap
from memory.model.prefix_cache import PrefixCache

CPU = torch.device("cpu")
HEAD, TAIL = 14, 6
Piece = tuple[list[int], list[int]]  # head and tail of a row


@pytest.fixture(params=list(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> EditableModel:
    return EditableModel.load(model_folder(request.param), CPU)


def pieces(model: EditableModel) -> list[Piece]:
    """Rows whose heads and tails are of many lengths, none at all and all there is room for."""
    ids = model.encode(" ".join(SENTENCES[::3]))
    cuts = [(0, 9, 13), (13, 13, 18), (20, 34, 40), (41, 44, 45), (50, 62, 64), (70, 71, 77)]
    return [(ids[start:middle], ids[middle:end]) for start, middle, end in cuts]


def columns(rows: Sequence[Piece]) -> Tensor:
    """Three of each tail, the last one first."""
    return torch.tensor([[len(tail) - 1, len(tail) // 2, 0] for _, tail in rows])


def whole(model: EditableModel, row: Piece) -> Tensor:
    """Logits (tokens, vocabulary) at a row's tail, the whole row run without company or pads."""
    head, tail = row
    ids = torch.tensor([[*head, *tail]])
    return model.hf_model(input_ids=ids, use_cache=False).logits[0, len(head) :]


def filled(model: EditableModel, layer: int, rows: Sequence[Piece]) -> PrefixCache:
    replay = PrefixCache(model, layer, len(rows), HEAD, TAIL)
    replay.fill_rows(0, [head for head, _ in rows], [tail for _, tail in rows])
    return replay


def assert_whole(
    model: EditableModel, replay: PrefixCache, rows: Sequence[Piece], first: int = 0
) -> None:
    """The rows from `first` on give what the model gives for each by itself."""
    chosen = torch.zeros(len(replay.tail_ids), 3, dtype=torch.long)
    chosen[first : first + len(rows)] = columns(rows)
    with torch.no_grad():
        found = replay.logits(chosen)
        for n, row in enumerate(rows, first):
            assert torch.allclose(found[n], whole(model, row)[chosen[n]], atol=1e-4), n


@pytest.mark.parametrize("lengths", [(40, 30, 26), (40, 24), (60, 24, 24, 57)])
def test_a_shared_beginning_gives_what_the_whole_row_gives(
    any_model: EditableModel, lengths: Sequence[int]
) -> None:
    ids = any_model.encode(" ".join(SENTENCES * 2))
    start, rest = ids[:24], ids[24:]
    rows = [
        ([*start, *rest[n : n + most - 24]], rest[-4 - n :][:4]) for n, most in enumerate(lengths)
    ]
    replay = PrefixCache(any_model, 1, len(rows), 62, 4)
    passes: list[torch.Size] = []
    with any_model.observe_input_ids(lambda seen: passes.append(seen.shape)):
        replay.fill_rows(0, [head for head, _ in rows], [tail for _, tail in rows])
    assert passes == [(1, 24), (len(rows), max(lengths) - 24 + 4)]
    assert_whole(any_model, replay, rows)


def hooked(model: EditableModel) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.hf_model.modules())


def fail(_inputs: Tensor, _outputs: Tensor) -> None:
    raise RuntimeError("stopped")


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_a_replay_is_the_whole_forward(any_model: EditableModel, layer: int) -> None:
    rows = pieces(any_model)
    replay = filled(any_model, layer, rows)
    assert_whole(any_model, replay, rows)
    assert_whole(any_model, replay, rows)  # a replay leaves nothing behind
    assert replay.logits(columns(rows)).shape == (len(rows), 3, len(any_model.tokenizer))


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_rows_take_the_place_of_others(any_model: EditableModel, layer: int) -> None:
    rows = pieces(any_model)
    replay = filled(any_model, layer, rows)
    new = [rows[n] for n in (2, 5, 1)]  # longer and shorter ones than those that stood there
    replay.fill_rows(1, [head for head, _ in new], [tail for _, tail in new])
    assert_whole(any_model, replay, [rows[0], *new, *rows[4:]])


def test_rows_may_stay_empty_and_be_filled_last(model: EditableModel) -> None:
    rows = pieces(model)[:2]
    replay = PrefixCache(model, 1, 4, HEAD, TAIL)
    replay.fill_rows(2, [rows[0][0]], [rows[0][1]])
    assert_whole(model, replay, rows[:1], 2)
    replay.fill_rows(3, [rows[1][0]], [rows[1][1]])
    assert_whole(model, replay, rows, 2)


def test_no_head_at_all_is_a_shape_too(any_model: EditableModel) -> None:
    rows: list[Piece] = [([], tail) for _, tail in pieces(any_model)]
    replay = PrefixCache(any_model, 1, len(rows), 0, TAIL)
    replay.fill_rows(0, [[]] * len(rows), [tail for _, tail in rows])
    assert_whole(any_model, replay, rows)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_gradients_are_those_of_the_whole_forward(any_model: EditableModel, layer: int) -> None:
    rows = pieces(any_model)
    replay, chosen = filled(any_model, layer, rows), columns(rows)
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(2, len(rows), any_model.hidden_size, generator=generator)
    size = (*chosen.shape, len(any_model.tokenizer))
    weights = torch.randn(size, generator=generator)  # of the logits in what is differentiated

    def taps(delta: Tensor, at: int) -> dict[int, Tap]:
        """δ (2, rows, hidden) is added at one token, at the first layer and at the last."""

        def tap(n: int) -> Tap:
            def add(_inputs: Tensor, outputs: Tensor) -> Tensor:
                before, here, after = outputs.split([at, 1, outputs.shape[1] - at - 1], 1)
                return torch.cat([before, here + delta[n][:, None], after], 1)

            return add

        return {layer: tap(0), any_model.layer_count - 1: tap(1)}

    mine = delta.clone().requires_grad_()
    with any_model.tap_layers(taps(mine, 0)):
        found = replay.logits(chosen)
    (gradient,) = torch.autograd.grad((found * weights).sum(), mine)
    for n, row in enumerate(rows):
        theirs = delta[:, n : n + 1].clone().requires_grad_()
        with any_model.tap_layers(taps(theirs, len(row[0]))):
            expected = whole(any_model, row)[chosen[n]]
        assert torch.allclose(found[n], expected, atol=1e-4)
        (wanted,) = torch.autograd.grad((expected * weights[n]).sum(), theirs)
        assert float(wanted.abs().max()) > 0.1
        assert torch.allclose(gradient[:, n : n + 1], wanted, atol=1e-3, rtol=1e-3)


def test_a_row_has_the_same_bits_whatever_stands_beside_it(any_model: EditableModel) -> None:
    row, *others = pieces(any_model)
    chosen = torch.tensor([[2, 0]]).repeat(4, 1)
    found = []
    for company, place in ((others[:0], 1), (others[:3], 1), (others[2:5], 1), (others[:3], 3)):
        replay = PrefixCache(any_model, 1, 4, HEAD, TAIL)
        for n, other in zip([n for n in range(4) if n != place], company, strict=False):
            replay.fill_rows(n, [other[0]], [other[1]])
        replay.fill_rows(place, [row[0]], [row[1]])
        found.append(replay.logits(chosen)[place])
    for other_bits in found[1:]:
        assert torch.equal(other_bits, found[0])


def test_a_row_that_is_no_number_spoils_no_other(any_model: EditableModel) -> None:
    rows = pieces(any_model)[:3]
    (bad,) = any_model.tokenizer("~", add_special_tokens=False)["input_ids"]
    replay = filled(any_model, 1, rows)
    plain = replay.logits(columns(rows))
    any_model.hf_model.get_input_embeddings().weight[bad] = torch.nan
    replay.fill_rows(1, [[bad, bad]], [[bad]])
    spoiled = replay.logits(columns(rows))
    assert not torch.isfinite(spoiled[1]).any()
    if not any_model.hf_model.config.tie_word_embeddings:  # there the logit of the token is none
        assert torch.equal(spoiled[[0, 2]], plain[[0, 2]])
    replay.fill_rows(1, [rows[0][0]], [rows[0][1]])
    healed = replay.logits(columns([rows[0], rows[0], rows[2]]))[:, :, :bad]
    assert torch.equal(healed[[0, 2]], plain[[0, 2], :, :bad])
    assert torch.allclose(healed[1], healed[0], atol=1e-4)


def test_pads_before_the_longest_head_of_a_filling_are_not_computed(model: EditableModel) -> None:
    rows, seen = pieces(model)[:5], list[int]()
    replay = filled(model, 1, rows)
    with model.tap_layers({0: lambda k, _y: seen.append(k.shape[1])}):
        replay.fill_rows(3, [rows[3][0]], [rows[3][1]])
        replay.fill_rows(1, [[]], [rows[1][1]])
    assert seen == [len(rows[3][0]) + TAIL, TAIL]
    assert_whole(model, replay, [rows[0], ([], rows[1][1]), *rows[2:]])


@pytest.mark.parametrize("layer", [1, 3])
def test_the_blocks_below_are_not_run_again(any_model: EditableModel, layer: int) -> None:
    rows = pieces(any_model)
    replay = filled(any_model, layer, rows)
    plain = replay.logits(columns(rows))
    with any_model.tap_layers(dict.fromkeys(range(layer), fail)):
        assert torch.equal(replay.logits(columns(rows)), plain)
    with pytest.raises(RuntimeError, match="stopped"), any_model.tap_layers({layer: fail}):
        replay.logits(columns(rows))


def test_the_vocabulary_is_projected_on_at_the_chosen_columns_alone(model: EditableModel) -> None:
    rows = pieces(model)
    replay = filled(model, 1, rows)
    seen: list[torch.Size] = []
    head = model.hf_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _args, output: seen.append(output.shape))
    replay.logits(columns(rows))
    handle.remove()
    assert seen == [(len(rows), 3, len(model.tokenizer))]


@pytest.mark.parametrize("layer", [0, 2])
def test_the_model_is_itself_again_afterwards(any_model: EditableModel, layer: int) -> None:
    rows = pieces(any_model)
    with torch.no_grad():
        plain = whole(any_model, rows[0])
        blocks = list(any_model._blocks)
        replay = filled(any_model, layer, rows)
        replay.logits(columns(rows))
        with pytest.raises(RuntimeError, match="stopped"), any_model.tap_layers({3: fail}):
            replay.logits(columns(rows))
        with pytest.raises(RuntimeError, match="stopped"), any_model.tap_layers({3: fail}):
            filled(any_model, layer, rows)
        assert all(a is b for a, b in zip(any_model._blocks, blocks, strict=True))
        assert not hooked(any_model)
        assert torch.equal(whole(any_model, rows[0]), plain)
    assert_whole(any_model, replay, rows)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_row_may_reach_the_models_last_position(any_model: EditableModel, layer: int) -> None:
    text = any_model.encode(" ".join(CITIES * 40))[:256]
    rows: list[Piece] = [(text[:250], text[250:]), (text[:252], text[252:254]), ([], text[:3])]
    replay = PrefixCache(any_model, layer, len(rows), 252, 8)  # pads go beyond the last position
    replay.fill_rows(0, [head for head, _ in rows], [tail for _, tail in rows])
    assert_whole(any_model, replay, rows)
