"""Passes of a model over ids of which some are pictures': what it needs to be told about these."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memory.model.pictures import Picture, PictureTable
from memory.picture_marks import FIRST_PICTURE_ID


class PicturePasses:
    """Hooks of a model that put pictures in the place of their ids, in every pass.

    Positions: some models (Qwen2-VL) count those of a picture in three dimensions, and go on behind
    it with fewer than it has tokens. Masks: some (Gemma 3) let the tokens of a picture see each
    other in both directions.
    """

    def __init__(self, model: PreTrainedModel, table: PictureTable) -> None:
        """model: the one that runs the passes."""
        self.table, self._passed_id = table, table.placeholder_id
        arguments = inspect.signature(type(model).forward).parameters
        self._has_token_types = "token_type_ids" in arguments
        # Of the whole model: what is a question of its tower is one of its positions, too.
        config = table.model.config.get_text_config()
        rope = getattr(config, "rope_parameters", None) or {}
        self._has_places = "mrope_section" in rope
        embedding = model.get_input_embeddings()
        model.register_forward_pre_hook(self._prepare_pass, with_kwargs=True)
        embedding.register_forward_pre_hook(self._pass_placeholders)
        embedding.register_forward_hook(self._put_states)
        self._ids: Tensor | None = None  # of the running pass, if it has pictures

    def count_saved(self, ids: Sequence[int]) -> int:
        """Count the positions that the pictures among a row's ids save."""
        if not self._has_places or max(ids, default=0) < FIRST_PICTURE_ID:
            return 0
        parts = self.table.split_ids(ids)
        return sum(len(part) - self._count_places(one) for one, part in parts if one is not None)

    def place_tokens(self, ids: Sequence[int]) -> list[int]:
        """Return the positions of a row's tokens; of a picture's, where it begins."""
        if not self._has_places or max(ids, default=0) < FIRST_PICTURE_ID:
            return list(range(len(ids)))
        places: list[int] = []
        start = 0
        for picture, part in self.table.split_ids(ids):
            if picture is None:
                places += range(start, start + len(part))
                start += len(part)
            else:
                places += [start] * len(part)
                start += self._count_places(picture)
        return places

    def _count_places(self, picture: Picture) -> int:
        """Count the positions that a picture takes."""
        positions = self.table.see(picture).positions
        return len(picture.token_ids) if positions is None else int(positions.max()) + 1

    # Hooks --------------------------------------------------------------------------------------

    def _prepare_pass(
        self, _model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See the pictures of a pass before it begins, and tell the model where they are."""
        ids = given.get("input_ids")
        self._ids = None
        if ids is None or int(ids.max()) < FIRST_PICTURE_ID:
            return None
        rows = ids.tolist()
        for row in rows:
            for picture, _ in self.table.split_ids(row):
                if picture is not None:
                    self.table.see(picture)
        self._ids = ids
        more: dict[str, Any] = {}
        if self._has_token_types:
            more["token_type_ids"] = self._make_token_types(rows).to(ids.device)
        if self._has_places:
            more["position_ids"] = self._make_positions(rows, given.get("position_ids"), ids.device)
        return args, {**given, **more}

    def _pass_placeholders(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Look placeholders up in the place of pictures' ids, which have no embedding."""
        (ids, *rest) = args
        return (ids.masked_fill(ids >= FIRST_PICTURE_ID, self._passed_id), *rest)

    def _put_states(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Put what is seen of the pictures in the place of the placeholders' embeddings."""
        if self._ids is None or output.shape[:2] != self._ids.shape:
            return output
        rows, self._ids = self._ids.tolist(), None
        changed = output.clone()
        for n, row in enumerate(rows):
            start = 0
            for picture, part in self.table.split_ids(row):
                if picture is not None:
                    first = part[0] - picture.first_id
                    states = self.table.see(picture).states[first : first + len(part)]
                    changed[n, start : start + len(part)] = states.to(changed)
                start += len(part)
        return changed

    def _make_token_types(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return 1 (rows, tokens) where a picture is shown, else 0."""
        types = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
        for n, row in enumerate(rows):
            start = 0
            for picture, part in self.table.split_ids(row):
                if picture is not None:
                    first = part[0] - picture.first_id
                    types[n, start : start + len(part)] = picture.is_shown[first:][: len(part)]
                start += len(part)
        return types

    def _make_positions(
        self, rows: Sequence[Sequence[int]], given: Tensor | None, device: torch.device
    ) -> Tensor:
        """Return the positions (3, rows, tokens): as given (rows, tokens) for text."""
        if given is None:
            given = torch.tensor([self.place_tokens(row) for row in rows], device=device)
        positions = given.repeat(3, 1, 1)
        for n, row in enumerate(rows):
            start = 0
            for picture, part in self.table.split_ids(row):
                if picture is not None and (own := self.table.see(picture).positions) is not None:
                    first = part[0] - picture.first_id
                    places = own[:, first : first + len(part)] + positions[0, n, start]
                    positions[:, n, start : start + len(part)] = places
                start += len(part)
        return positions
