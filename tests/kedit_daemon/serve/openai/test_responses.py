"""The bodies of answers."""

import time

from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, TokenLogprobs
from kedit_daemon.serve.openai.responses import Choice, ResponseBuilder


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
