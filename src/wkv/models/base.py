"""The machinery that all generations share, once: embed, loop over blocks, read out.

    x = ln0(emb[token])
    for each block:  x = x + att(ln1(x));  x = x + ffn(ln2(x))
    logits = head(ln_out(x))

The equations live in `rwkv4.py` ... `rwkv7.py`. Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import Config, Recompute
from ..errors import BackendError, InputError, StateError
from ..ops import Segments, cheap_again
from ..ops.common import sum_dtype
from ..ops.dispatch import named_backend
from ..state import LayerState, State
from . import layers, recipe
from .layers import Embedding, Linear
from .recipe import orthogonal, uniform

if TYPE_CHECKING:
    from .compiled import CompiledModel

Output = Literal["logits", "last", "hidden"]


class Block(nn.Module):
    """Time mix and channel mix, each behind a norm and added to the residual stream.

    `RWKV4Block` ... `RWKV7Block` also work in a network of any other kind, for vectors x (B, T, D):

        blocks = nn.ModuleList(RWKV7Block(config, layer) for layer in range(config.n_layer))
        ...
        v_first = None
        for block in blocks:
            x, v_first, _ = block(x, v_first)

    Their weights start as the recipe of that layer says, and `wkv.parameter_groups` finds the rest of it.
    """

    parts: ClassVar[tuple[type[Any], type[Any]]]  # (TimeMix, ChannelMix): each has its own forward

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        time_mix, channel_mix = self.parts
        self.ln0 = layers.norm(config) if layer == 0 else None
        self.ln1 = layers.norm(config)
        self.ln2 = layers.norm(config)
        self.att = time_mix(config, layer)
        self.ffn = channel_mix(config, layer)
        if self.ln1.weight.device.type != "meta":
            recipe.initialize(self, seed=layer)

    def initial_state(self, batch_size: int = 1) -> LayerState:
        """The state before the first token: zeros, or a tuned `time_state` where the block has one."""
        weight = self.ln1.weight
        # Not weight.new_zeros: weights may be sharded over processes, states are not.
        shift = torch.zeros(batch_size, len(weight), dtype=weight.dtype, device=weight.device)
        like = torch.empty((), dtype=sum_dtype(weight), device=weight.device)
        return LayerState(shift, self.att.initial_memory(batch_size, like), shift)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None = None,
        state: LayerState | None = None,
        segments: Segments | None = None,
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """Return x (B, T, D) after the block, the values of layer 0 (None before RWKV-7), the new state.

        v_first   what the block before returned, None for layer 0
        state     what a call before returned, or None for a fresh start
        segments  padding, and sequences that start within a row: `Segments.of(starts, lengths)`
        """
        if state is None:
            state = self.initial_state(len(x))
        if self.ln0 is not None:
            x = self.ln0(x)
        if segments is not None and segments.starts is not None:
            fresh = self.att.initial_memory(1, state.memory)
            state = state._replace(memory=segments.initial(state.memory, fresh))
        mixed, v_first, att_shift, memory = self.time_mix(self.ln1(x), v_first, state, segments)
        if segments is not None:
            memory = segments.final(memory)
        x = x + mixed
        mixed, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, segments)
        return x + mixed, v_first, LayerState(att_shift, memory, ffn_shift)

    def time_mix(
        self, x: Tensor, v_first: Tensor | None, state: LayerState, segments: Segments | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """What to add to the residual, RWKV-7's v_first (None before it), the newest input, the memory."""
        out, last, memory = self.att(x, state.att_shift, state.memory, segments)
        return out, None, last, memory


class RWKV(nn.Module):
    """A language model of one generation: `RWKV4`, `RWKV5`, `RWKV6` or `RWKV7`.

    One call for every use, `logits, state = model(tokens, state)`: T = 1 is the recurrent step, T > 1 the
    parallel form of the same function. A new model's weights follow the official initialisation
    (`wkv.build`); on the meta device they take no memory until a checkpoint gives them theirs.
    """

    block: ClassVar[type[Block]]
    embedding_bound: ClassVar[float] = 1e-4

    def __init__(self, config: Config, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.quantization: str | None = None  # "int8" or "int4": see `quantized.py`
        self.recompute: Recompute = "cheap"
        V, D = config.vocab_size, config.n_embd
        self.emb = Embedding(V, D, init=uniform(self.embedding_bound))
        self.blocks = nn.ModuleList(self.block(config, layer) for layer in range(config.n_layer))
        self.ln_out = layers.norm(config)
        self.head = Linear(D, V, init=orthogonal(0.5, tall=True), muon=False)
        if self.device.type != "meta":
            self.initialize(seed)

    @property
    def device(self) -> torch.device:
        return self.emb.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.emb.weight.dtype

    @property
    def memory_dtype(self) -> torch.dtype:
        """float32 whatever the weights are, unless they are float64."""
        return sum_dtype(self.emb.weight)

    def initialize(self, seed: int = 0) -> None:
        """Fill all weights from their recipes, in place; the same seed gives the same weights."""
        recipe.initialize(self, seed)

    def initial_state(self, batch_size: int = 1) -> State:
        """The state before the first token: zeros, or a tuned `time_state` where the model has one."""
        return State(tuple(block.initial_state(batch_size) for block in self._blocks()))

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        output: Output = "logits",
    ) -> tuple[Tensor, State]:
        """Read tokens; return what follows them and the state that remembers them.

        tokens   (B, T) int64, T >= 1
        state    what a call before returned, or None for a fresh start; it is not changed
        lengths  (B,) int64 in 1..T: row b's tokens beyond lengths[b] are padding. Its logits before that
                 and its state are those of the row alone
        starts   (B, T) bool: the state before this token is fresh, as for a new call, the token shift
                 included. So rows may hold several documents, each of which is read as if alone: the row's
                 state belongs to what stands before its first start, the new State to its last document
        output   "logits"  (B, T, V) for every position
                 "last"    (B, 1, V) for each row's last token only: a prompt need not pay for the head
                 "hidden"  (B, T, D) the vectors before the head
        returns  the output, in the weights' dtype, and the new State

        Gradients reach the parameters, and the initial and the final state. InputError for tokens, lengths
        or starts out of range, StateError for a state of another model, batch size, dtype or device.
        """
        if state is None:
            state = self.initial_state(len(tokens))
        compiled = self._compiled(state)
        if compiled is not None:
            found = self._read_compiled(compiled, tokens, state, lengths, starts, output)
            if found is not None:
                return found
        self._check_tokens(tokens, lengths, starts)
        B, T = tokens.shape
        self.check_state(state, B)

        segments = None if lengths is None and starts is None else Segments.of(starts, lengths)
        x, v_first = self.emb(tokens), None
        new_layers = []
        for block, layer in zip(self._blocks(), state.layers, strict=True):
            x, v_first, layer = self.run_block(block, x, v_first, layer, segments)
            new_layers.append(layer)

        if output == "last" and T > 1:
            last = torch.full((B,), T, device=x.device) if lengths is None else lengths
            x = x[torch.arange(B, device=x.device), last - 1][:, None]
        x = self.ln_out(x)
        return (x if output == "hidden" else self.head(x)), State(tuple(new_layers))

    def run_block(
        self, block: Block, x: Tensor, v_first: Tensor | None, layer: LayerState, segments: Segments | None
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """`block` on its inputs. For the gradients it keeps what `recompute` does not say is computed again:

        "nothing"  all that the gradients need
        "cheap"    what takes long to compute, such as products: not what one pass over it gives
        "blocks"   the block's inputs

        The gradients are the same bits. torch.compile decides such things itself: there "cheap" is "nothing".
        """
        inputs = x, v_first, layer, segments
        if self.recompute == "blocks" and torch.is_grad_enabled():
            found = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        elif self.recompute == "cheap" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with cheap_again():
                found = block(*inputs)
        else:
            found = block(*inputs)
        return cast("tuple[Tensor, Tensor | None, LayerState]", found)

    def _read_compiled(
        self,
        compiled: CompiledModel,
        tokens: Tensor,
        state: State,
        lengths: Tensor | None,
        starts: Tensor | None,
        output: Output,
    ) -> tuple[Tensor, State] | None:
        """None for tokens that are not as they should be; nothing was done then."""
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or not tokens.numel():
            return None
        if any(x is not None and x.device.type != "cpu" for x in (tokens, lengths, starts)):
            return None
        if lengths is not None or starts is not None:
            self._check_tokens(tokens, lengths, starts)
        if state.made_by is not compiled or state.batch_size != len(tokens):
            self.check_state(state, len(tokens))
        fresh = None if starts is None else self.initial_state(1)
        return compiled(tokens, state, output, lengths=lengths, starts=starts, fresh=fresh)

    def _compiled(self, state: State) -> CompiledModel | None:
        """The model in the compiled engine's hands, where it does all that is asked for here."""
        backend = named_backend()
        if backend not in (None, "native") or torch.is_grad_enabled():
            return None  # with gradients, "native" names rows of the operators
        reason = None
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            reason = "torch.compile or autocast is at work"
        if reason is None:
            from .compiled import compiled_model  # here: it knows the generations, which know this file

            found = compiled_model(self, state)
            if not isinstance(found, str):
                return found
            reason = found
        if backend == "native":
            raise BackendError(f"the backend 'native' refuses this call: {reason}")
        return None

    def check_state(self, state: State, batch_size: int) -> None:
        """StateError unless `state` is one of this model's, for this batch size, dtype and device."""
        if not isinstance(state, State):
            raise StateError(f"the state is a {type(state).__name__}", "a State that the model returned")
        if len(state.layers) != self.config.n_layer:
            raise StateError(
                f"the state has {len(state.layers)} layers", f"{self.config.n_layer}, as the model has",
                "a state made by this model",
            )  # fmt: skip
        if state.batch_size != batch_size:
            raise StateError(
                f"the state has {state.batch_size} rows, the tokens {batch_size}",
                "as many",
                "state[i] or State.stack",
            )
        shift = (batch_size, self.config.n_embd), self.dtype
        memory = (batch_size, *self._blocks()[0].att.memory_shape), self.memory_dtype
        for layer in state.layers:
            for name, (shape, dtype) in zip(LayerState._fields, (shift, memory, shift), strict=True):
                tensor: Tensor = getattr(layer, name)
                if tensor.shape != shape or tensor.dtype != dtype or tensor.device != self.device:
                    raise StateError(
                        f"the state's {name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}",
                        f"{dtype} {shape} on {self.device}",
                        "a state that this model made, in this dtype",
                    )

    def fingerprint(self) -> str:
        """SHA-256 over the config and every weight, hex: equal only for the same weights in the same dtype.

        Takes about a second per gigabyte, once: it is remembered until a weight changes. (A fused optimizer
        changes weights unseen; wkv's own say so, `torch.autograd.graph.increment_version` does for others.)
        """
        tensors = self.state_dict()
        version = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors.values())
        cached = self.__dict__.get("_fingerprint")
        if cached is None or cached[0] != version:
            digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
            for name, tensor in tensors.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            cached = self.__dict__["_fingerprint"] = (version, digest.hexdigest())
        return cast(str, cached[1])

    def _blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _check_tokens(self, tokens: Tensor, lengths: Tensor | None, starts: Tensor | None) -> None:
        if tokens.dtype != torch.int64 or tokens.ndim != 2:
            raise InputError(
                f"tokens is {tokens.dtype} of shape {tuple(tokens.shape)}",
                "int64 of shape (B, T)",
                "torch.tensor([ids])",
            )
        B, T = tokens.shape
        if not B or not T:
            raise InputError(f"tokens has shape {(B, T)}", "at least one row and one token")
        if starts is not None and (starts.dtype != torch.bool or starts.shape != (B, T)):
            raise InputError(
                f"starts is {starts.dtype} of shape {tuple(starts.shape)}", f"bool of shape {(B, T)}"
            )
        if torch.compiler.is_compiling():
            return
        lowest, highest = (int(x) for x in torch.aminmax(tokens))
        if lowest < 0 or highest >= self.config.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InputError(
                f"token id {wrong}", f"0 to {self.config.vocab_size - 1}, the model's vocabulary",
                "the tokenizer that belongs to this model",
            )  # fmt: skip
        if lengths is None:
            return
        if lengths.dtype != torch.int64 or lengths.shape != (B,):
            raise InputError(
                f"lengths is {lengths.dtype} of shape {tuple(lengths.shape)}", f"int64 of shape ({B},)"
            )
        if int(lengths.min()) < 1 or int(lengths.max()) > T:
            raise InputError(f"lengths {lengths.tolist()}", f"each from 1 to T = {T}")
