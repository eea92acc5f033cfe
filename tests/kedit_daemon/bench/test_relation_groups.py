from kedit_daemon.bench.relation_groups import group_by_relation
from memory.facts import Fact


def test_facts_of_one_relation_are_known_by_their_wordings() -> None:
    seat, other = (
        Fact("Zamba", "The seat of {} is", "Lima"),
        Fact("Zimbu", "{} is ruled from", "Oslo"),
    )
    speaks, native = (
        Fact("Ada", prompt, "French") for prompt in ("{} spoke the language", "{}, a native")
    )
    names = group_by_relation(
        [
            (seat, ["Where is the seat of Zamba?"]),
            (other, ["Where is the seat of Zimbu?"]),  # asked alike
            (speaks, ["What does Ada speak?"]),
            (native, ["What is Ada's tongue?"]),
            (Fact("Bo", "{}, a native", "Dutch"), []),  # stated alike
            (Fact("Bo", "The native language of {} is", "Dutch"), []),
            (Fact("Bo", "The mother tongue of {} is", "Dutch"), []),  # by PARAREL
        ]
    )
    assert names[0] == names[1]
    assert names[3] == names[4]
    assert names[5] == names[6]
    assert len(set(names)) == 4
