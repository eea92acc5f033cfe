"""Interface of the language model: read and change activations, change weights, restore them.

Knows nothing of facts or of how an edit is computed. The weights that may change are the down
projections of the MLPs, W of (hidden d, width d_ff), with y = W k (+ b) for an MLP input k; `W0` is
kept, and every change is a delta against it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.pytorch_utils import Conv1D

from memory.joins import join_texts
from memory.model.continuation import encode_behind
from memory.model.device import has_fast_bfloat16
from memory.model.layout import find_down_projections
from memory.model.picture_passes import PicturePasses
from memory.model.pictures import PictureTable, split_vision
from memory.model.replaced_modules import Float32Projection, SkippedBlock
from memory.model.strict_loading import load_strictly
from memory.picture_marks import FIRST_PICTURE_ID, MARK, join_mark

# (input k, output y) of a down projection -> another output, or None to keep it.
Tap = Callable[[Tensor, Tensor], Tensor | None]


class _PassDone(Exception):
    """Raised to end a pass over the model whose rest is not needed."""


class EditableModel:
    """A causal language model and its tokenizer; the only place where its weights change."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None = None,
    ) -> None:
        """processor: of a model that takes pictures. Raises UnsupportedModel when the model has no
        place to edit."""
        self.pictures: PictureTable | None = None
        if processor is not None:
            model, self.pictures = split_vision(model, processor)
        self.hf_model, self.tokenizer = model.train(False).requires_grad_(False), tokenizer
        self._passes = None if self.pictures is None else PicturePasses(model, self.pictures)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype  # of all layers that are not edited
        self.hidden_size = int(model.config.get_text_config().hidden_size)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_positions = int(positions or 1 << 30)  # tokens that a text may have
        self._blocks, self._down_projections = find_down_projections(model)
        self.layer_count = len(self._down_projections)
        self._base_weights: dict[int, Tensor] = {}
        self._as_tuple: bool | None = None
        self._is_flat_mlp: bool | None = None  # whether MLPs run on all tokens in one dimension

    @classmethod
    def load(
        cls, path_or_id: str | Path, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> "EditableModel":
        """Load from a folder or hub id: safetensors only, no code from the model.

        Weights that the files hold in this dtype stay there, on the CPU: they are mapped, and
        processes share them.

        Raises UnusableModel when the model is not whole, or cannot be edited.
        """
        return cls(*load_strictly(str(path_or_id), device, dtype))

    # Weights ------------------------------------------------------------------------------------

    def weight(self, layer: int) -> Tensor:
        """Return W of a layer as a view (hidden, width), whatever the module's own layout."""
        module = self._down_projections[layer]
        weight = cast(Tensor, module.weight)
        return weight.T if isinstance(module, Conv1D) else weight

    def base_weight(self, layer: int) -> Tensor:
        """Return W0 (hidden, width) in float32, the weight before any edit."""
        kept = self._base_weights.get(layer)
        return (self.weight(layer).detach() if kept is None else kept).float()

    def keep_base(self, layers: Iterable[int]) -> None:
        """Give these layers weights of their own to edit, in float32, unless that was done. W0
        stays where it was loaded, to restore it exactly later.

        A change is small against the weight: 16 bits would round much of it away.
        """
        for layer in set(layers) - set(self._base_weights):
            module = self._down_projections[layer]
            self._base_weights[layer] = self.weight(layer).detach()
            weight = cast(Tensor, module.weight).detach().to(torch.float32, copy=True)
            module.weight = nn.Parameter(weight, requires_grad=False)
            if self.dtype != torch.float32:
                self._widen_projection(layer)

    def widen_layers(self, layers: Iterable[int]) -> None:
        """Run these layers' down projections in float32, as they are once they are edited: then an
        edit is all that changes their outputs. In a model of float32 nothing happens."""
        if self.dtype != torch.float32:
            self.keep_base(layers)

    def _widen_projection(self, layer: int) -> None:
        """Run a layer's down projection in float32; taps on it see float32 as well."""
        module, block = self._down_projections[layer], self._blocks[layer]
        name = next(name for name, one in block.named_modules() if one is module)
        path, _, attribute = name.rpartition(".")
        if (bias := getattr(module, "bias", None)) is not None:
            module.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
        setattr(block.get_submodule(path), attribute, Float32Projection(module))

    def set_deltas(self, deltas: dict[int, Tensor]) -> None:
        """Set every weight to W0 + delta (hidden, width), or to W0 when it has no delta."""
        self.keep_base(deltas)
        for layer in sorted(self._base_weights):
            with torch.no_grad():
                target = self.weight(layer)
                target.copy_(self._base_weights[layer])
                if layer in deltas:
                    target.add_(deltas[layer].to(target))

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """Run the block on W0, and restore the edited weights bit for bit afterwards."""
        edited = {layer: self.weight(layer).detach().clone() for layer in self._base_weights}
        self.set_deltas({})
        try:
            yield
        finally:
            with torch.no_grad():
                for layer, weight in edited.items():
                    self.weight(layer).copy_(weight)

    @contextmanager
    def low_precision(self) -> Iterator[None]:
        """Run products in bfloat16 where the device supports it, for gradients; weights, sums,
        norms and softmax keep their precision.

        Attention runs as plain products: the fused kernels' backward pass is slow for a few tokens
        and not always deterministic on a GPU.
        """
        weights = [p for p in self.hf_model.parameters() if p.ndim > 1]
        low = has_fast_bfloat16(self.device)
        try:
            for weight in weights:  # autocast caches copies of weights with gradients only
                weight.requires_grad_(low)
            with (
                torch.autocast(self.device.type, torch.bfloat16, enabled=low),
                sdpa_kernel(SDPBackend.MATH),
            ):
                yield
        finally:
            for weight in weights:
                weight.requires_grad_(False)

    def weights_hash(self, layers: Sequence[int]) -> str:
        """Compute the sha256 over the float32 bytes of the current weights of these layers."""
        digest = hashlib.sha256()
        for layer in layers:
            digest.update(self.weight(layer).detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # Activations --------------------------------------------------------------------------------

    @contextmanager
    def tap_layers(self, taps: Mapping[int, Tap]) -> Iterator[None]:
        """Call each function with the input and output of its layer's down projection, in float32;
        the output that it returns, if any, replaces the module's.

        Shapes are (rows, tokens, width) and (rows, tokens, hidden), also for blocks (OPT's) that
        run their MLP on all tokens in one dimension.
        """
        shapes: dict[int, torch.Size] = {}

        def record_shape(n: int, _block: nn.Module, args: tuple[Tensor, ...]) -> None:
            shapes[n] = args[0].shape[:2]

        def call_tap(
            n: int, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor
        ) -> Tensor | None:
            self._is_flat_mlp = args[0].ndim == 2
            inputs, seen = args[0].float(), output.float()
            if self._is_flat_mlp:
                inputs, seen = inputs.reshape(*shapes[n], -1), seen.reshape(*shapes[n], -1)
            changed = taps[n](inputs, seen)
            return None if changed is None else changed.reshape(output.shape).to(output.dtype)

        projections, blocks = self._down_projections, self._blocks
        handles = [projections[n].register_forward_hook(partial(call_tap, n)) for n in taps]
        # Not known before the first tap; each hook takes time.
        if self._is_flat_mlp is not False:
            handles += [blocks[n].register_forward_pre_hook(partial(record_shape, n)) for n in taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def observe_input_ids(self, observer: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `observer` with the token ids (rows, tokens) of each pass before it starts."""

        def pass_input_ids(
            _model: nn.Module, _args: tuple[Tensor, ...], given: dict[str, Tensor]
        ) -> None:
            observer(given["input_ids"])

        handle = self.hf_model.register_forward_pre_hook(pass_input_ids, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def change_logits(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replace the logits (rows, tokens, vocabulary) of each pass by what `change` makes of
        them."""

        def pass_logits(_model: nn.Module, _args: tuple[Tensor, ...], output: Any) -> None:
            output.logits = change(output.logits)

        handle = self.hf_model.register_forward_hook(pass_logits)
        try:
            yield
        finally:
            handle.remove()

    def capture_layer_input(
        self,
        layer: int,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None = None,
    ) -> tuple[Tensor, DynamicCache]:
        """Return the residual stream (rows, tokens, hidden) that enters a block, and the attention
        cache. ids, positions: (rows, tokens); mask: 1 where a token may be attended to, also for
        those of a `cache` of the tokens before."""
        caught: list[Tensor] = []
        if cache is None:
            cache = DynamicCache([(None, None)] * self.layer_count)
        handle = self._blocks[layer].register_forward_pre_hook(
            lambda _module, args: caught.append(args[0].detach())
        )
        shape = self._blocks[0].register_forward_hook(
            lambda _module, _args, output: setattr(self, "_as_tuple", isinstance(output, tuple))
        )
        try:
            with torch.no_grad():
                self.hf_model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,  # they are not read, and a vocabulary is wide
                )
        finally:
            handle.remove()
            shape.remove()
        return caught[0], cache

    def run_to_layer(self, ids: Tensor, layer: int) -> None:
        """Run ids (rows, tokens) up to the down projection of a layer and the taps there, without
        what comes after it."""

        def end_pass(*_: Any) -> None:
            raise _PassDone

        # Called after the taps, which are there already.
        handle = self._down_projections[layer].register_forward_hook(end_pass)
        try:
            with suppress(_PassDone), torch.no_grad():
                self.hf_model(input_ids=ids, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()

    @contextmanager
    def observe_final_states(self, observer: Callable[[Tensor], None]) -> Iterator[None]:
        """Call `observer` with the residual stream (rows, tokens, hidden) that leaves the last
        block, of each pass."""

        def pass_states(_block: nn.Module, _args: tuple[Tensor, ...], output: Any) -> None:
            self._as_tuple = isinstance(output, tuple)
            observer(output[0] if self._as_tuple else output)

        handle = self._blocks[-1].register_forward_hook(pass_states)
        try:
            yield
        finally:
            handle.remove()

    def compute_logits(self, states: Tensor) -> Tensor:
        """Compute the next-token logits (rows, vocabulary) of states (rows, hidden) that leave the
        last block: by what comes after the blocks, which no edit changes."""
        # Two columns, of which the head takes the last, as it takes it from a whole text: another
        # layout in memory has another kernel, and so other last bits.
        columns = states[:, None].repeat(1, 2, 1).to(self.dtype)
        ids = torch.zeros(columns.shape[:2], dtype=torch.long, device=states.device)
        with torch.no_grad(), self.skip_layers_below(self.layer_count, columns):
            logits: Tensor = self.hf_model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]

    @contextmanager
    def skip_layers_below(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """Skip the blocks below `layer`; `hidden`, of `capture_layer_input`, enters it."""
        kept = [self._blocks[i] for i in range(layer)]
        try:
            for i, block in enumerate(kept):
                given = hidden if i == layer - 1 else None
                self._blocks[i] = SkippedBlock(block, given, bool(self._as_tuple))
            yield
        finally:
            for i, block in enumerate(kept):
                self._blocks[i] = block

    # Text ---------------------------------------------------------------------------------------

    @property
    def end_token(self) -> int | None:
        """Id of end-of-text, if the tokenizer has one."""
        return cast("int | None", self.tokenizer.eos_token_id)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """All ids that end an answer: end-of-text and those of the generation settings, where chat
        models have the end of a turn."""
        settings = getattr(self.hf_model.generation_config, "eos_token_id", None)
        named = settings if isinstance(settings, list) else [settings]
        return frozenset(n for n in [self.end_token, *named] if n is not None)

    def encode(self, text: str, *, whole: bool = True) -> list[int]:
        """Encode a prompt to token ids, with those of the pictures whose marks it has. `whole`:
        with the special tokens that a text begins with, unless it has them itself."""
        if self.pictures is None or MARK.search(text) is None:
            return cast(list[int], self.tokenizer(text, add_special_tokens=whole)["input_ids"])
        return self.pictures.encode(text, whole)

    def place_tokens(self, ids: Sequence[int]) -> list[int]:
        """Return the positions of a text's tokens."""
        return list(range(len(ids))) if self._passes is None else self._passes.place_tokens(ids)

    def find_next_places(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """Return the positions (rows, 1) behind prompts of one length; None where they are just
        that length."""
        saved = [self.count_saved_positions(ids) for ids in prompts]
        if not any(saved):
            return None
        return torch.tensor([[len(prompts[0]) - n] for n in saved], device=self.device)

    def count_saved_positions(self, ids: Sequence[int]) -> int:
        """Count by how much less than its tokens a text takes of the model's positions: pictures
        may take fewer."""
        return 0 if self._passes is None else self._passes.count_saved(ids)

    def encode_target(self, prompt: str, target: str, join: str | None = None) -> list[int]:
        """Return the ids that `target` adds after `prompt`; `join`: as a fact says it."""
        text = join_texts(prompt, target, join)
        before, full = self.encode(prompt), self.encode(text)
        if full[: len(before)] == before:
            return full[len(before) :]
        return encode_behind(self.tokenizer, text[len(prompt) :])

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Decode ids to text, without special tokens unless they are wanted; pictures become
        marks."""
        if self.pictures is None or max(ids, default=0) < FIRST_PICTURE_ID:
            return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=not special))
        return "".join(
            join_mark(picture.digest, "")
            if picture is not None
            else cast(str, self.tokenizer.decode(list(part), skip_special_tokens=not special))
            for picture, part in self.pictures.split_ids(ids)
        )
