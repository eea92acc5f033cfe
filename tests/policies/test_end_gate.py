from dataclasses import replace

import pytest
import torch
from editing_home import seat
from tiny_models import SENTENCES

from memory.model.editable import EditableModel
from memory.side.side_memory import SideMemory
from policies.edit_site import EditSite, make_default_site
from policies.end_gate import fit_end_gate
from policies.wise import compute_keys, read_prompt_ends

FACTS = [seat(n, "Oslo") for n in range(11, 15)]
TEXT = [f"{line} {line}" for line in SENTENCES[::3]]  # as long as a piece can be


@pytest.fixture
def side(model: EditableModel) -> SideMemory:
    site: EditSite = make_default_site(4)
    layers = (site.key_layer, site.side_layer)
    centres = {n: read_prompt_ends(model, SENTENCES[:30], n)[1].mean(0) for n in layers}
    return SideMemory(model, site.gates, centres)


def scores(side: SideMemory) -> torch.Tensor:
    """Cosines of each piece of text with each fact, one at a time."""
    keys = compute_keys(side.model, side, FACTS)
    found = []
    for number, line in enumerate(TEXT):
        piece = " ".join(line.split()[: 3 + number % 10])
        _, output = read_prompt_ends(side.model, [piece], side.layer)
        asked = side.compute_keys(side.layer, output[0])
        found += [float((keys[f.id].end @ asked).max()) for f in FACTS]
    return torch.tensor(found)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.5])
def test_so_many_pairs_of_fact_and_text_pass_and_no_fewer_could(
    side: SideMemory, share: float
) -> None:
    every = scores(side)
    found = fit_end_gate(side, FACTS, [(0, "The seat of country 11 is")], TEXT, share)
    assert found.pairs == len(every)
    assert found.false_routes == int(share * len(every)) / len(every)
    allowed = int(share * len(every))
    assert int((every >= found.gate + 1e-5).sum()) <= allowed
    assert int((every >= found.gate - 1e-5).sum()) >= allowed
    assert found.scores[0.5] == pytest.approx(float(every.median()), abs=0.01)


def test_a_larger_share_gives_a_lower_gate(side: SideMemory) -> None:
    gates = [fit_end_gate(side, FACTS, [(0, "It")], TEXT, share).gate for share in (0.01, 0.1, 0.5)]
    assert gates == sorted(gates, reverse=True) and gates[0] > gates[2]


def test_it_tells_how_many_other_words_pass_to_their_own_fact(side: SideMemory) -> None:
    every = scores(side).view(len(TEXT), -1)
    gate = float(every.flatten().median())
    number = int((every.amax(1) - every.amin(1)).argmax())
    piece = " ".join(TEXT[number].split()[: 3 + number % 10])
    near, far = int(every[number].argmax()), int(every[number].argmin())
    assert every[number, near] > gate > every[number, far]

    def passed(*asked: tuple[int, str]) -> float:
        return fit_end_gate(side, FACTS, asked, TEXT, 0.5).passed

    own = [(n, fact.question) for n, fact in enumerate(FACTS)]
    assert passed(*own) == 1
    assert passed(own[0], (near, piece), (far, piece)) == pytest.approx(2 / 3)


def test_a_gate_is_a_cosine(side: SideMemory) -> None:
    same = [replace(FACTS[0], prompt="{} is a member of the")]
    text = [same[0].question] * 40
    assert fit_end_gate(side, same, [(0, text[0])], text, 0.001).gate <= 1
