"""The sizes that tables of names are filled in with, whatever told them: a flavor or a ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from milepost.interop.names.model_sizes import ModelArgs


@dataclass(frozen=True, slots=True)
class Experts:
    """The sizes of a mixture of experts that its spreading over ranks depends on."""

    num_experts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of one model by the names that tables call them, and which of its parameters there are."""

    named: Mapping[str, int]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    tied_embeddings: bool = False
    """The output projection is the embedding matrix, stored once."""
    kinds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Kind of layer: numbers of the layers of this kind, in models whose layers differ."""
    features: frozenset[str] = frozenset()
    """What only some models of a family have."""

    @property
    def moe(self) -> Experts | None:
        """The experts of a layer; None without any."""
        return Experts(self.named["experts"]) if "experts" in self.named else None

    def layers(self, kind: str) -> Sequence[int]:
        """The numbers of the layers of ``kind``; all of them for an empty one."""
        return self.kinds[kind] if kind else range(self.n_layers)


Args = TypeVar("Args", ModelArgs, Sizes)
"""What a table is filled in with: the sizes of a model that Milepost trains, or those of any other."""


def sizes_of(args: ModelArgs | Sizes) -> Sizes:
    """The sizes that the tables' shapes name."""
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
    """``args`` with a vocabulary of another size."""
    if isinstance(args, Sizes):
        return replace(args, named={**args.named, "vocab": vocab_size})
    return replace(args, vocab_size=vocab_size)
