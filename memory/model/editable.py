"""The model behind one small interface: read activations, overlay, change weights, go back.

Knows nothing of facts or of how an edit is computed. The weights that may change are the down
projections of the MLPs, W in (hidden d, width d_ff), with y = W k (+ b) for an MLP input k;
`W0` is kept, and every change is stated against it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from memory.errors import UnusableModel
from memory.model.device import has_fast_bfloat16
from memory.model.layout import find_down_projections

# (input k, output y) of a down projection -> another output, or None to leave it as it is.
Tap = Callable[[Tensor, Tensor], Tensor | None]


class _SkippedBlock(nn.Module):
    """Stands for a block whose work was done before: hands on a hidden state it was given."""

    def __init__(self, block: nn.Module, hidden: Tensor | None, as_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: only its attributes are read
        self._hidden, self._as_tuple = hidden, as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        out = hidden if self._hidden is None else self._hidden
        return (out, None) if self._as_tuple else out


class EditableModel:
    """A causal language model, its tokenizer, and the one place where its weights change."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises KeditError (code "unsupported") when the model has no place to edit."""
        self.hf_model, self.tokenizer = model.train(False).requires_grad_(False), tokenizer
        self.device = next(model.parameters()).device
        self.hidden_size = int(model.config.get_text_config().hidden_size)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_positions = int(longest or 1 << 30)  # tokens that a text may have
        self._blocks, self._down_projections = find_down_projections(model)
        self.layer_count = len(self._down_projections)
        self._base_weights: dict[int, Tensor] = {}
        self._as_tuple: bool | None = None
        self._is_flat_mlp: bool | None = None  # whether MLPs run on all tokens in one dimension

    @classmethod
    def load(cls, path_or_id: str | Path, device: torch.device) -> "EditableModel":
        """Load in float32 from a folder or hub id: safetensors only, no code from the model.

        Raises KeditError: the files are missing or broken, or the model cannot be edited.
        """
        transformers_logging.disable_progress_bar()
        name = str(path_or_id)
        try:
            AutoConfig.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=True
            )
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UnusableModel(
                f"the model {name} cannot be loaded: {str(error).splitlines()[0]}",
                hint="give a folder with config.json, model.safetensors and a tokenizer",
            ) from error
        return cls(cast(PreTrainedModel, model).to(device), tokenizer)  # type: ignore[arg-type]

    # Weights ------------------------------------------------------------------------------------

    def weight(self, layer: int) -> Tensor:
        """W of a layer as a view of shape (hidden, width), whatever the module's own layout."""
        module = self._down_projections[layer]
        weight = cast(Tensor, module.weight)
        return weight.T if isinstance(module, Conv1D) else weight

    def base_weight(self, layer: int) -> Tensor:
        """W0 (hidden, width): the weight before any edit."""
        return (
            self._base_weights[layer]
            if layer in self._base_weights
            else self.weight(layer).detach()
        )

    def keep_base(self, layers: Iterable[int]) -> None:
        """Copy W0 of these layers, where there is no copy yet, to go back to it from anything."""
        for layer in set(layers) - set(self._base_weights):
            self._base_weights[layer] = self.weight(layer).detach().clone()

    def set_deltas(self, deltas: dict[int, Tensor]) -> None:
        """Make every weight W0 + delta, and plain W0 where no delta (hidden, width) is given."""
        self.keep_base(deltas)
        for layer in sorted(self._base_weights):
            with torch.no_grad():
                target = self.weight(layer)
                target.copy_(self._base_weights[layer])
                if layer in deltas:
                    target.add_(deltas[layer].to(target))

    @contextmanager
    def at_base(self) -> Iterator[None]:
        """W0 for the time being; the edited weights return afterwards, bit for bit."""
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
        """For gradients: products in bfloat16 where the device is made for it; weights stay as they
        are, as do sums, norms and softmax.

        Attention is spelled out as products: the fused kernels' backward is slow for a few tokens,
        and on a GPU not always the same bits.
        """
        weights = [p for p in self.hf_model.parameters() if p.ndim > 1]
        low = has_fast_bfloat16(self.device)
        try:
            for weight in weights:  # a weight's copy is kept within the block only if it may learn
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
        """sha256 over the float32 bytes of the given layers' weights as they are now."""
        digest = hashlib.sha256()
        for layer in layers:
            digest.update(self.weight(layer).detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    # Activations --------------------------------------------------------------------------------

    @contextmanager
    def tap_layers(self, taps: Mapping[int, Tap]) -> Iterator[None]:
        """Let each function see, and change, what its layer's down projection gives.

        It sees (rows, tokens, width) and (rows, tokens, hidden), also where a block (OPT's) runs
        its MLP on all tokens in one dimension.
        """
        shapes: dict[int, torch.Size] = {}

        def make_shape_hook(n: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _block, args: shapes.update({n: args[0].shape[:2]})

        def make_output_hook(
            n: int,
        ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
            def call_tap(
                _module: nn.Module, args: tuple[Tensor, ...], output: Tensor
            ) -> Tensor | None:
                self._is_flat_mlp = args[0].ndim == 2
                if not self._is_flat_mlp:
                    return taps[n](args[0], output)
                inputs = args[0].reshape(*shapes[n], -1)
                changed = taps[n](inputs, output.reshape(*shapes[n], -1))
                return None if changed is None else changed.reshape(output.shape)

            return call_tap

        handles = [
            self._down_projections[n].register_forward_hook(make_output_hook(n)) for n in taps
        ]
        if (
            self._is_flat_mlp is not False
        ):  # as is not known before the first tap; each hook takes time
            handles += [self._blocks[n].register_forward_pre_hook(make_shape_hook(n)) for n in taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def observe_input_ids(self, hear: Callable[[Tensor], None]) -> Iterator[None]:
        """Tell the token ids (rows, tokens) of the next pass before it begins; of that one alone,
        so that others cost nothing."""

        def pass_input_ids(
            _model: nn.Module, _args: tuple[Tensor, ...], given: dict[str, Tensor]
        ) -> None:
            handle.remove()
            hear(given["input_ids"])

        handle = self.hf_model.register_forward_pre_hook(pass_input_ids, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def capture_layer_input(
        self, layer: int, ids: Tensor, mask: Tensor, positions: Tensor
    ) -> tuple[Tensor, DynamicCache]:
        """The residual stream (rows, tokens, hidden) that enters a block, and the attention's keys
        and values. ids, mask (1 where a token may be seen) and positions: (rows, tokens)."""
        caught: list[Tensor] = []
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
                    logits_to_keep=1,  # nobody reads them, and a vocabulary is wide
                )
        finally:
            handle.remove()
            shape.remove()
        return caught[0], cache

    @contextmanager
    def skip_layers_below(self, layer: int, hidden: Tensor) -> Iterator[None]:
        """The blocks below `layer` do nothing, and `hidden`, from `entering`, enters it."""
        kept = [self._blocks[i] for i in range(layer)]
        try:
            for i, block in enumerate(kept):
                given = hidden if i == layer - 1 else None
                self._blocks[i] = _SkippedBlock(block, given, bool(self._as_tuple))
            yield
        finally:
            for i, block in enumerate(kept):
                self._blocks[i] = block

    # Text ---------------------------------------------------------------------------------------

    @property
    def end_token(self) -> int | None:
        """The id of end-of-text, when the tokenizer has one."""
        return cast("int | None", self.tokenizer.eos_token_id)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """All ids that end an answer: end-of-text, and what the model's generation settings name
        beside it, as models that were taught to chat have it for the end of a turn."""
        settings = getattr(self.hf_model.generation_config, "eos_token_id", None)
        named = settings if isinstance(settings, list) else [settings]
        return frozenset(n for n in [self.end_token, *named] if n is not None)

    def encode(self, text: str) -> list[int]:
        """Token ids as the model reads a prompt, special tokens included."""
        return cast(list[int], self.tokenizer(text)["input_ids"])

    def encode_target(self, prompt: str, target: str) -> list[int]:
        """The ids that `target` adds after `prompt`, a space between them where there is none."""
        joint = target if prompt[-1:].isspace() else f" {target}"
        before, full = self.encode(prompt), self.encode(prompt + joint)
        if full[: len(before)] == before:
            return full[len(before) :]
        return cast(list[int], self.tokenizer(joint, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))
