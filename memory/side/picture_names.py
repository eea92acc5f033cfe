"""Pictures as names of what they show: a picture in a prompt is called by the marks of those that
facts are about, where the model sees the same in both.

So all that reads names reads pictures, too, and what is asked about one is decided by the words, as
for any other subject.
"""

from collections import Counter
from functools import cached_property

import torch
from torch import Tensor

from memory.errors import HINT_VISION, Rejected
from memory.model.editable import EditableModel
from memory.model.pictures import Picture, PictureTable
from memory.model.plain_pictures import draw_plain_pictures
from memory.picture_marks import MARK, make_mark
from memory.picture_variants import vary_picture
from memory.side.index import KeyIndex, to_fact_id, to_fact_number

NEAR_FACTS = 16  # of a picture, that are looked at; several may be about one thing


class PictureNames:
    """The pictures that facts are about."""

    def __init__(self, model: EditableModel, min_cosine: float) -> None:
        """min_cosine: of what is seen of two pictures of one thing."""
        self.model, self.min_cosine = model, min_cosine
        self._digests: dict[str, str] = {}  # by fact
        self._counts = Counter[str]()  # of facts, by digest
        self._index = KeyIndex(model.hidden_size, gpu=model.device.type == "cuda")

    def __contains__(self, fact_id: object) -> bool:
        return fact_id in self._digests

    def add_fact(self, fact_id: str, digest: str, keys: Tensor) -> None:
        """Add a fact about a picture, with what is seen of it: keys (n, hidden) of unit length."""
        self._digests[fact_id] = digest
        self._counts[digest] += 1
        self._index.add(to_fact_number(fact_id), keys)

    def remove_fact(self, fact_id: str) -> None:
        """Remove a fact, if it is there."""
        if (digest := self._digests.pop(fact_id, None)) is not None:
            self._counts[digest] -= 1
            self._index.remove(to_fact_number(fact_id))

    def rename(self, text: str) -> str:
        """Write the marks of the pictures that facts are about in place of those in a text, which
        show the same; a picture that none is like keeps its own."""
        if not self._digests or (pictures := self.model.pictures) is None:
            return text
        marks = dict[str, str]()
        for digest in dict.fromkeys(MARK.findall(text)):
            if (picture := pictures.find(digest)) is not None:
                marks[digest] = " ".join(map(make_mark, self._find_like(picture) or [digest]))
        return MARK.sub(lambda mark: marks.get(mark[1], mark[0]), text)

    def _find_like(self, picture: Picture) -> list[str]:
        """Find the digests of pictures that show what this one shows, the nearest first."""
        if self._counts[picture.digest]:
            return [picture.digest]
        assert self.model.pictures is not None
        keys = self._make_keys(self.model.pictures.pool_states(picture)[None])
        near = self._index.find_near(keys, NEAR_FACTS, self.min_cosine)
        return list(dict.fromkeys(self._digests[to_fact_id(number)] for number in near))

    def compute_keys(self, digest: str) -> Tensor:
        """Compute the keys (n, hidden) of a picture that a fact is about, on the CPU: its own, and
        those of its variants. Raises what `check` does."""
        pictures, picture = self.check(digest)
        pooled = [pictures.pool_file(data) for data in vary_picture(pictures.read_file(picture))]
        return self._make_keys(torch.stack([pictures.pool_states(picture), *pooled]))

    def check(self, digest: str) -> tuple[PictureTable, Picture]:
        """Check that the model can be shown a picture, and return it with its table. Raises
        Rejected for one that is not there, or where the model takes none; BadPicture."""
        if self.model.pictures is None:
            raise Rejected("the model takes no pictures", hint=HINT_VISION)
        picture = self.model.pictures.find(digest)
        if picture is None:
            raise Rejected(f"there is no picture {digest}", hint="hand the picture in again")
        return self.model.pictures, picture

    def _make_keys(self, pooled: Tensor) -> Tensor:
        """Make keys (n, hidden) of unit length, on the CPU, of means of what the decoder is shown
        of pictures: less what pictures of nothing have as well."""
        away = pooled.cpu() - self._centre
        keys: Tensor = away / away.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return keys

    @cached_property
    def _centre(self) -> Tensor:
        """The mean (hidden,) of what is seen of pictures of nothing, which all have in common."""
        pictures = self.model.pictures
        assert pictures is not None
        seen = [pictures.pool_file(data) for data in draw_plain_pictures()]
        return torch.stack(seen).mean(0).cpu()
