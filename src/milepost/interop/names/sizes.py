"""The sizes that instantiate tables of names, from a flavor or a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from milepost.interop.names.model_sizes import ModelArgs


@dataclass(frozen=True, slots=True)
class ExpertCount:
    """The number of experts, on which their sharding over ranks depends."""

    num_experts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one model by the tables' names, and the features that determine its parameters."""

    named: Mapping[str, int]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    tied_embeddings: bool = False
    """The output projection is the embedding matrix, stored once."""
    kinds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Kind -> indices of the layers of this kind, in models whose layers differ."""
    features: frozenset[str] = frozenset()
    """Features that only some models of a family have."""

    @property
    def moe(self) -> ExpertCount | None:
        """The experts of a layer; None without any."""
        return ExpertCount(self.named["experts"]) if "experts" in self.named else None

    def layers(self, kind: str) -> Sequence[int]:
        """Return the indices of the layers of ``kind``; of all layers if it is empty."""
        return self.kinds[kind] if kind else range(self.n_layers)


Args = TypeVar("Args", ModelArgs, Sizes)
"""The sizes of a model that Milepost trains, or of any other."""


def sizes_of(args: ModelArgs | Sizes) -> Sizes:
    """Return the sizes named in the tables' shapes."""
    if isinstance(args, Sizes):
        return args
    named = {
        "vocab": args.vocab_size,
        "dim": args.dim,
        "head_dim": args.head_dim,
        "q_rows": args.n_heads * args.head_dim,
        "kv_rows": args.n_kv_heads * args.head_dim,
        "hidden": args.hidden_dim,
    }
    if args.moe is not None:
        named |= {"experts": args.moe.num_experts, "expert_hidden": args.moe.hidden_dim}
    return Sizes(
        named=named,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        tied_embeddings=args.tied_embeddings,
    )


def with_vocabulary(args: Args, vocab_size: int) -> Args:
    """Return ``args`` with another vocabulary size."""
    if isinstance(args, Sizes):
        return replace(args, named={**args.named, "vocab": vocab_size})
    return replace(args, vocab_size=vocab_size)
