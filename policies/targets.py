"""Targets of MEMIT: the edit keys k and residuals v − W0 k of each fact in the edited layers.

For every fact a δ is added to the down projection's output at its sites, in each edited layer, and
moved until the model says the target in all contexts (Meng et al. 2023, eq. 16, with every edited
layer optimised together, so that each has its own target). In a subject layer the site is the
subject's last token. In an end layer it is every token that predicts a token of the target, since a
residual at the prompt's end alone reaches the later ones only through attention. Keys are read in
the same pass, those of an end layer thus under the subject layers' δ. All of it happens on the
unedited weights.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from memory.errors import KeditError, OutOfMemory
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.oom import as_out_of_memory
from policies.edit_site import EditSite
from policies.edit_terms import Refusal
from policies.prompts import make_essence_row, make_rows
from policies.target_optimiser import SlotShape, TargetOptimiser, TermsById, WaitingFacts

MAX_SLOTS = 12  # facts that are optimised at the same time, while there is memory for them
# Tokens of a target: one of 190 took minutes, since every slot is as long as the longest.
MAX_TARGET_TOKENS = 64
PULSE_STEPS = 8  # steps after which the caller hears from the work, whether a fact is done or not
log = logging.getLogger(__name__)


def compute_terms(
    model: EditableModel,
    site: EditSite,
    norms: Mapping[int, float],
    facts: Sequence[Fact],
    report: Callable[[TermsById], None] = lambda _part: None,
    slots: int = MAX_SLOTS,
) -> TermsById:
    """Compute the keys and residuals of each fact, by fact id; always on the base weights.

    norms: the median ‖y‖ of each edited layer. report: called with results as they come, sometimes
    with none, while the active weights are back in place; it may raise to stop the work. slots:
    facts that are optimised side by side, on whose number the last bits of the results depend.
    A fact whose loss, gradient or δ is not finite, or whose target is far beyond the site's
    anchors, is refused; the others are not. Raises OutOfMemory where there is no memory for one
    fact alone.
    """
    shapes, result = _group_by_shape(model, facts, site)
    report(dict(result))
    for shape, waiting in shapes.items():
        for part in _optimise_shape(model, site, norms, shape, waiting, slots):
            result |= part
            report(part)
    return result


def _group_by_shape(
    model: EditableModel, facts: Sequence[Fact], site: EditSite
) -> tuple[dict[SlotShape, WaitingFacts], TermsById]:
    """Group facts by slot shape; refuse those that the model cannot read or whose target is too
    long."""
    shapes: dict[SlotShape, WaitingFacts] = defaultdict(deque)
    refused: TermsById = {}
    for fact in facts:
        try:
            rows = make_rows(model, fact, site.target_ending)
        except KeditError as error:
            refused[fact.id] = Refusal(str(error))
            continue
        length = len(rows[0].target)
        if length > MAX_TARGET_TOKENS:
            why = f"the target has {length} tokens, and the weights take at most"
            refused[fact.id] = Refusal(f"{why} {MAX_TARGET_TOKENS}", can_use_side=True)
            continue
        # A tokenizer may split the target in two ways; one is enough.
        rows = [row for row in rows if len(row.target) == length]
        if site.has_essence:
            rows.append(make_essence_row(model, fact))
        shapes[SlotShape.measure(rows, site)].append((fact, rows))
    return shapes, refused


def _optimise_shape(
    model: EditableModel,
    site: EditSite,
    norms: Mapping[int, float],
    shape: SlotShape,
    waiting: WaitingFacts,
    slots: int,
) -> Iterator[TermsById]:
    """Yield the results of facts of one shape, in parts.

    Out of memory, the facts that are not done start again in half as many slots.
    """
    left = {fact.id: (fact, rows) for fact, rows in waiting}
    while left:
        try:
            with as_out_of_memory():
                # No local holds the optimiser, or its memory would not be free after a failure.
                parts = _run_pulses(
                    TargetOptimiser(model, site, norms, shape, slots), deque(left.values())
                )
                for part in parts:
                    left = {n: one for n, one in left.items() if n not in part}
                    yield part
        except OutOfMemory as error:
            if slots == 1:
                raise
            slots //= 2
            log.warning("Computing targets for %d facts at once: %s", slots, error)


def _run_pulses(optimiser: TargetOptimiser, waiting: WaitingFacts) -> Iterator[TermsById]:
    """Yield results at least every `PULSE_STEPS` steps, with the active weights in place."""
    while waiting or optimiser.is_busy:
        part: TermsById = {}
        with optimiser.model.at_base(), optimiser.model.low_precision():
            for _ in range(PULSE_STEPS):
                optimiser.fill_slots(waiting)
                if part := optimiser.step():
                    break
        yield part
