from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from editing_home import seat
from torch import Tensor

from kedit_daemon.bench.methods import reference_wise
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.methods.reference_wise import ReferenceWise, WiseMemory, merge_ties
from kedit_daemon.editing.model_loading import LoadedModel, load_model
from memory.facts import Fact
from memory.model.generate import generate_answers
from memory.model.scoring import PromptAnswer, score_answers

FACTS = [seat(1, "Oslo"), seat(2, "Lima")]
KNOWN = [
    Fact("Lake Eyre", "The country that {} lies in is", "Norway"),
    Fact("Danielle Darrieux", "The mother tongue of {} is", "English"),
]


@pytest.fixture
def method(load: Callable[[str], LoadedModel], tmp_path: Path) -> ReferenceWise:
    return made(load("llama"), tmp_path)


def made(loaded: LoadedModel, folder: Path) -> ReferenceWise:
    method = ReferenceWise(MethodSetup(loaded, folder, batch_size=1, seed=0))
    method.contexts = method.contexts[:2]  # the others only take time here
    return method


def loss(method: ReferenceWise, fact: Fact, routed: bool = True) -> float:
    ids = tuple(method.model.encode_target(fact.question, fact.target))
    row = PromptAnswer(tuple(method.model.encode(fact.question)), ids)
    return score_answers(method.model, [row], method.overlay if routed else None)[0].loss


def logits(method: ReferenceWise, prompt: str) -> Tensor:
    ids = torch.tensor([method.model.encode(prompt)])
    with torch.no_grad():
        out: Tensor = method.model.hf_model(input_ids=ids).logits
    return out


def routed_logits(method: ReferenceWise, prompt: str) -> Tensor:
    assert method.overlay is not None
    with method.overlay([0]):
        return logits(method, prompt)


def test_it_learns_facts_and_leaves_the_weights_and_other_prompts_alone(tmp_path: Path) -> None:
    """On the shipped model: a random one learns nothing in the published steps."""
    method = made(load_model("shipped", "cpu", tmp_path, iter), tmp_path)
    model, (one, two) = method.model, KNOWN
    base = model.weights_hash(range(model.layer_count))
    before = [loss(method, fact) for fact in KNOWN]
    assert method.overlay is None
    method.edit([one])
    assert routed_logits(method, two.question).equal(logits(method, two.question))
    method.edit([two])
    assert model.weights_hash(range(model.layer_count)) == base
    assert (method.not_edited, method.fact_count) == (0, 2)
    assert all(loss(method, f) < b / 20 for f, b in zip(KNOWN, before, strict=True))
    said = generate_answers(model, [f.question for f in KNOWN], 1, method.overlay)
    assert said == [fact.target for fact in KNOWN]
    assert method.count_stored_bytes() == 4 * method.delta.numel()
    assert set(method.stopwatch.seconds_by_part) == {"steps"}


def test_a_shard_is_confined_to_its_random_part(method: ReferenceWise) -> None:
    method.edit(FACTS[:1])
    assert 0.15 < float(method.mask.float().mean()) < 0.25
    assert method.delta[method.mask].abs().max() > 0
    assert not method.delta[~method.mask].any()


def test_below_the_threshold_the_weights_answer_bit_for_bit(method: ReferenceWise) -> None:
    method.edit(FACTS[:1])
    asked = FACTS[0].question
    assert not routed_logits(method, asked).equal(logits(method, asked))
    method.threshold *= 1.2  # over the distance of the edit itself
    assert routed_logits(method, asked).equal(logits(method, asked))


def test_the_threshold_is_below_the_least_distance_of_the_edits(method: ReferenceWise) -> None:
    method.edit(FACTS[:1])
    first = method.threshold
    assert first == pytest.approx(
        reference_wise.THRESHOLD_RATIO * method._measure_distance(FACTS[0])
    )
    method.edit(FACTS[1:])
    assert method.threshold == min(
        first, reference_wise.THRESHOLD_RATIO * method._measure_distance(FACTS[1])
    )


def test_rows_are_decided_by_themselves_and_again_at_every_token(method: ReferenceWise) -> None:
    """By hand: the mean distance of all tokens so far, whatever went through in which pass."""
    method.edit(FACTS[:1])
    overlay = method.overlay
    assert overlay is not None
    ids = method.model.encode(FACTS[0].question)
    caught: list[Tensor] = []
    with torch.no_grad():
        taps = {method.layer: lambda k, _y: caught.append((k[0] @ method.delta.T).norm(dim=1))}
        with method.model.tap_layers(taps):
            method.model.hf_model(input_ids=torch.tensor([ids]))
        means = caught[0].cumsum(0) / torch.arange(1, len(ids) + 1)
        routed, cache = [], None
        layer = method.layer
        seen: list[Tensor] = []
        with overlay([0]), method.model.tap_layers({layer: lambda _k, y: seen.append(y)}):
            for token in ids:
                out = method.model.hf_model(
                    input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
        plain: list[Tensor] = []
        cache = None
        with method.model.tap_layers({layer: lambda _k, y: plain.append(y)}):
            for token in ids:
                out = method.model.hf_model(
                    input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
    routed = [not a.equal(b) for a, b in zip(seen, plain, strict=True)]
    assert routed == (means >= method.threshold).tolist()


def test_the_farthest_memory_over_its_threshold_answers(method: ReferenceWise) -> None:
    torch.manual_seed(0)
    near, far = (0.01 * torch.randn(method.shape) for _ in range(2))
    far = 3 * far
    asked = FACTS[0].question
    method.full_shards = [WiseMemory(near, 0.0), WiseMemory(far, 0.0)]
    both = routed_logits(method, asked)
    method.full_shards = [WiseMemory(far, 0.0)]
    assert routed_logits(method, asked).equal(both)
    method.full_shards = [WiseMemory(near, 0.0)]
    alone = routed_logits(method, asked)
    method.full_shards = [
        WiseMemory(near, 0.0),
        WiseMemory(far, 1e9),
    ]  # the farthest is under its threshold
    assert routed_logits(method, asked).equal(alone)
    assert not alone.equal(both)


def test_shards_are_merged_when_all_of_them_are_full(method: ReferenceWise) -> None:
    method.shard_capacity = 1
    method.edit(FACTS[:1])
    (first,) = method.full_shards
    assert (method.fact_count, method.merged_memories, method.delta.any()) == (
        0,
        [],
        torch.tensor(False),
    )
    method.edit(FACTS[1:])
    (merged,) = method.answering_memories
    assert method.merged_memories == [merged] and method.full_shards == []
    assert merged.threshold <= first.threshold
    # Where only one shard has an entry, the merge keeps it whole; their masks differ.
    only = first.delta.abs() > 0
    assert 0.5 < float((merged.delta[only] == first.delta[only]).float().mean()) < 1
    assert "merge" in method.stopwatch.seconds_by_part
    method.edit([seat(3, "Cairo")])
    assert len(method.answering_memories) == 2


def test_ties_by_hand() -> None:
    one = torch.tensor([[4.0, -3.0, 0.1, 5.0]])
    two = torch.tensor([[2.0, 9.0, 0.1, 0.2]])
    # Kept are the two largest of each. Then signs: + of (4, 0), + of (-3, 9), none, + of (5, 0).
    assert merge_ties([one, two]).tolist() == [[3.0, 9.0, 0.0, 5.0]]


def test_numbers_that_are_not_finite_leave_the_memory_alone(method: ReferenceWise) -> None:
    method.edit(FACTS[:1])
    kept, threshold = method.delta.clone(), method.threshold
    method.distance_unit = float("nan")
    method.edit(FACTS[1:])
    assert (method.not_edited, method.fact_count, method.threshold) == (1, 1, threshold)
    assert method.delta.equal(kept)
