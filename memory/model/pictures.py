"""Pictures in a model's texts: each has token ids of its own, and so passes through all that takes
ids.

A vision-language model puts what its tower sees in the place of the embeddings of placeholder
tokens. Here the ids of these places tell which picture stands there: they lie beyond every
vocabulary, and are given out in this process, one block a picture. So a row's ids say all about it,
rows with and without pictures run together, and nothing that cuts, pads or compares ids needs to
know of pictures. What the tower sees is computed once, before the first pass that needs it, and by
the model's own forward: whatever an architecture does before its decoder's first block is done.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from memory.errors import BadPicture
from memory.model.picture_processor import find_placeholder_id, find_written
from memory.picture_files import open_picture
from memory.picture_marks import FIRST_PICTURE_ID, MARK, make_digest

MAX_KEPT_BYTES = 1 << 28  # of pictures' files and of what is seen of them
MAX_PICTURES = 4096  # whose ids are known


class _DecoderReached(Exception):
    """Raised to end a pass where the decoder would begin."""


@dataclass
class _Seen:
    """Input of the decoder for a picture: states (tokens, hidden), and positions (3, tokens)
    from 0 on where the model has them in three dimensions."""

    states: Tensor
    positions: Tensor | None


@dataclass
class Picture:
    """A picture in a table: its tokens, and what the model sees of it.

    is_shown (tokens,): which tokens show it; the others are put around it. data: its file, and
    seen: what the decoder gets of it, as long as they are kept.
    """

    digest: str
    first_id: int
    token_ids: tuple[int, ...]
    is_shown: Tensor
    data: bytes | None = field(default=None, repr=False)
    seen: _Seen | None = field(default=None, repr=False)

    @property
    def ids(self) -> range:
        """The ids of its tokens in this process."""
        return range(self.first_id, self.first_id + len(self.token_ids))

    @property
    def byte_count(self) -> int:
        """The bytes that are kept of it."""
        return len(self.data or b"") + (0 if self.seen is None else self.seen.states.nbytes)


class PictureTable:
    """The pictures that a model has been given, by their digests and by their ids."""

    def __init__(
        self,
        model: PreTrainedModel,
        decoder: nn.Module,
        processor: ProcessorMixin,
        find_file: Callable[[str], bytes | None] = lambda _digest: None,
    ) -> None:
        """model: the whole one, of which `decoder` has the blocks. find_file: finds the file of a
        picture that a text names and nobody has added."""
        self.model, self.find_file = model, find_file
        self._decoder, self._processor = decoder, processor
        self.tokenizer = cast(PreTrainedTokenizerBase, processor.tokenizer)
        self.placeholder_id = find_placeholder_id(model)
        self.placeholder = str(self.tokenizer.convert_ids_to_tokens(self.placeholder_id))
        self._written = find_written(processor, self.placeholder)
        self._empty = cast(list[int], self.tokenizer("")["input_ids"])
        self._pictures: OrderedDict[str, Picture] = OrderedDict()  # the last used come last
        self._first_ids: list[int] = []  # of the blocks, in order
        self._digests: list[str] = []  # of the same
        self._next_id = FIRST_PICTURE_ID
        self._lock = Lock()  # requests are read in other threads than the one that runs the model
        self._processing = Lock()  # one picture at a time: unpacked, they are large

    # Adding -------------------------------------------------------------------------------------

    def add(self, data: bytes) -> Picture:
        """Add a picture by its file, unless it is there. Raises BadPicture."""
        digest = make_digest(data)
        with self._lock:
            if (known := self._use(digest)) is not None:
                return known
        prepared = self._prepare(data)
        with self._lock:
            if (known := self._use(digest)) is not None:
                return known
            prepared.first_id = self._next_id
            self._next_id += len(prepared.token_ids)
            self._pictures[digest] = prepared
            self._first_ids.append(prepared.first_id)
            self._digests.append(digest)
            self._forget_oldest()
        return prepared

    def find(self, digest: str) -> Picture | None:
        """Find a picture, also by its file; None where there is none."""
        with self._lock:
            if (known := self._use(digest)) is not None:
                return known
        data = self.find_file(digest)
        return None if data is None else self.add(data)

    def _use(self, digest: str) -> Picture | None:
        if (known := self._pictures.get(digest)) is not None:
            self._pictures.move_to_end(digest)
        return known

    def _forget_oldest(self) -> None:
        """Let go of the oldest pictures' bytes where there are too many, and of the oldest ones."""
        kept = sum(one.byte_count for one in self._pictures.values())
        for picture in [*self._pictures.values()][:-1]:
            if kept <= MAX_KEPT_BYTES:
                break
            kept -= picture.byte_count
            picture.data = picture.seen = None
        while len(self._pictures) > MAX_PICTURES:
            _, gone = self._pictures.popitem(last=False)
            at = bisect_right(self._first_ids, gone.first_id) - 1
            del self._first_ids[at], self._digests[at]

    def _prepare(self, data: bytes) -> Picture:
        """Make a picture of its file, without ids of its own."""
        ids = self._process(data)["input_ids"][0].tolist()
        begin, end = self._locate_own(ids)
        own = tuple(ids[begin:end])
        shown = torch.tensor([n == self.placeholder_id for n in own])
        if not shown.any():
            raise BadPicture("the model's processor writes no token for a picture")
        return Picture(make_digest(data), 0, own, shown, data)

    def _process(self, data: bytes) -> dict[str, Tensor]:
        """Make the inputs of a picture alone, as the model's own processor does."""
        with self._processing:
            image = open_picture(data)
            return dict(self._processor(text=self._written, images=[image], return_tensors="pt"))

    def _locate_own(self, ids: Sequence[int]) -> tuple[int, int]:
        """Locate a picture's tokens: without those that begin or end any text."""
        empty, begin, end = self._empty, 0, len(ids)
        if empty and [*ids[: len(empty)]] == empty:
            begin = len(empty)
        elif empty and [*ids[-len(empty) :]] == empty:
            end -= len(empty)
        return begin, end

    # Text ---------------------------------------------------------------------------------------

    def encode(self, text: str, whole: bool) -> list[int]:
        """Encode a text with marks of pictures; those of unknown ones stay text. `whole`: with the
        special tokens that a text begins with."""
        pieces, pictures = [""], list[Picture]()
        end = 0
        for mark in MARK.finditer(text):
            if (picture := self.find(mark[1])) is not None:
                pieces[-1] += text[end : mark.start()]
                pieces.append("")
                pictures.append(picture)
                end = mark.end() + (text[mark.end() : mark.end() + 1] == " ")
        pieces[-1] += text[end:]
        # A user may have typed the placeholder; that shows nothing.
        kinds: list[Picture | None] = []
        for n, piece in enumerate(pieces):
            kinds += [None] * piece.count(self.placeholder)
            kinds += pictures[n : n + 1]
        text = self.placeholder.join(pieces)
        given = cast(list[int], self.tokenizer(text, add_special_tokens=whole)["input_ids"])
        written, ids = iter(kinds), list[int]()
        for token in given:
            picture = next(written, None) if token == self.placeholder_id else None
            ids += [token] if picture is None else picture.ids
        if whole and self._written == "":  # BLIP-2's stand before what begins a text
            ids = self._lead_with_pictures(ids)
        return ids

    def _lead_with_pictures(self, ids: list[int]) -> list[int]:
        """Move the tokens that begin any text behind the pictures that it begins with."""
        begin = len(self._empty)
        end = next((n for n in range(begin, len(ids)) if ids[n] < FIRST_PICTURE_ID), len(ids))
        return ids[begin:end] + ids[:begin] + ids[end:]

    # Looking ------------------------------------------------------------------------------------

    def find_by_id(self, token: int) -> Picture:
        """Find the picture that a token's id belongs to. Raises BadPicture if it was forgotten."""
        with self._lock:
            at = bisect_right(self._first_ids, token) - 1
            found = self._pictures.get(self._digests[at]) if at >= 0 else None
        if found is None or token not in found.ids:
            raise BadPicture("the picture was not kept so long", hint="send it again")
        return found

    def split_ids(self, ids: Sequence[int]) -> Iterator[tuple[Picture | None, Sequence[int]]]:
        """Split ids into runs of text and the tokens of one picture each."""
        start = 0
        while start < len(ids):
            end = start + 1
            picture = self.find_by_id(ids[start]) if ids[start] >= FIRST_PICTURE_ID else None
            while end < len(ids) and (
                ids[end] in picture.ids and ids[end] > ids[end - 1]
                if picture is not None
                else ids[end] < FIRST_PICTURE_ID
            ):
                end += 1
            yield picture, ids[start:end]
            start = end

    def pool_file(self, data: bytes) -> Tensor:
        """Return the same as `pool_states` of a picture that is not added. Raises BadPicture."""
        return self.pool_states(self._prepare(data))

    def read_file(self, picture: Picture) -> bytes:
        """Return a picture's file. Raises BadPicture if it is not kept any more."""
        data = picture.data or self.find_file(picture.digest)
        if data is None:
            raise BadPicture("the picture was not kept so long", hint="send it again")
        return data

    def pool_states(self, picture: Picture) -> Tensor:
        """Return the mean (hidden,) of what the decoder is shown of a picture, in float32."""
        shown = picture.is_shown.to(self.model.device)
        return self.see(picture).states[shown].float().mean(0)

    def see(self, picture: Picture) -> _Seen:
        """Compute what enters the decoder for a picture, once. Only for the thread that runs the
        model."""
        if (seen := picture.seen) is None:
            inputs = self._process(self.read_file(picture))
            caught = self._run_to_decoder(inputs)
            begin, end = self._locate_own(inputs["input_ids"][0].tolist())
            states = caught["inputs_embeds"][0, begin:end].detach()
            positions = caught.get("position_ids")
            if positions is not None and positions.ndim == 3:
                own = positions[-3:, 0, begin:end]
                seen = _Seen(states, own - own[:, :1])
            else:
                seen = _Seen(states, None)
            picture.seen = seen
        return seen

    def _run_to_decoder(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Run the model up to its decoder, and return what it hands to it."""
        caught: dict[str, Any] = {}

        def stop(_module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
            caught.update(given)
            raise _DecoderReached

        on_device = {name: one.to(self.model.device) for name, one in inputs.items()}
        # First: in BLIP-2 the decoder is what the passes' watchers watch.
        handle = self._decoder.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        try:
            # Not a call, which would run the hooks of whoever watches the passes.
            with suppress(_DecoderReached), torch.no_grad():
                self.model.forward(**on_device)
        finally:
            handle.remove()
            # Qwen2-VL keeps how far the picture moves what follows, for whatever text comes next.
            for module in self.model.modules():
                if getattr(module, "rope_deltas", None) is not None:
                    cast(Any, module).rope_deltas = None
        return caught


def split_vision(
    model: PreTrainedModel, processor: ProcessorMixin
) -> tuple[PreTrainedModel, PictureTable]:
    """Return the model to run on ids alone, and the table of its pictures. Where the decoder is a
    causal language model of its own (BLIP-2), that is the one to run."""
    decoder = cast(PreTrainedModel, model.get_decoder())
    table = PictureTable(model.train(False).requires_grad_(False), decoder, processor)
    return (model if decoder.get_output_embeddings() is None else decoder), table
