"""The bodies of answers."""

import time

from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, TokenLogprobs
from kedit_daemon.serve.openai.responses import Choice, ResponseBuilder
from memory.side.shards import RoutingMatch


def test_where_each_token_begins_is_found_in_one_pass() -> None:
    shape = ResponseBuilder("x", 0, "tiny", False, [AnswerStart(0, None)], True, str)
    said = Choice()
    said.add_part(
        AnswerPart("", tuple(TokenLogprobs(n, -1.0, ()) for n in range(20_000)), "length", 20_000)
    )
    began = time.process_time()
    (choice,) = shape.build_response([said], {})["choices"]
    assert time.process_time() - began < 2  # a sum for each token takes many times that
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[:12] == [*range(11), 12]
    assert offsets[-1] == len("".join(map(str, range(19_999))))
    assert shape.build_chunk(0, AnswerPart("", ()), 5)["choices"][0]["logprobs"] is None
    chunk = shape.build_chunk(
        0, AnswerPart("", (TokenLogprobs(10, -1.0, ()), TokenLogprobs(1, -1.0, ()))), 5
    )
    assert chunk["choices"][0]["logprobs"]["text_offset"] == [5, 7]


def test_facts_that_fired_within_a_reply_are_named_at_its_end() -> None:
    first, later = (RoutingMatch(f"{n:012x}", n, 0.9, 2.0) for n in (1, 2))
    builder = ResponseBuilder("x", 0, "tiny", True, [AnswerStart(0, first)], False, str)
    part = AnswerPart("", (), "stop", 9, ((7, later),))
    said = Choice()
    said.add_part(part)
    facts = builder.build_response([said], {})["kedit"]["facts"]
    assert [(fact["id"], fact.get("reply_token")) for fact in facts] == [
        (first.fact_id, None),
        (later.fact_id, 7),
    ]
    assert builder.build_headers([said])["x-kedit-facts"] == f"{first.fact_id},{later.fact_id}"
    assert builder.build_chunk(0, part, 0)["kedit"] == {"facts": facts[1:]}
    assert "kedit" not in builder.build_chunk(0, AnswerPart("a"), 0)
