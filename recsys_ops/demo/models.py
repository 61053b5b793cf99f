"""Two recommenders in plain PyTorch, written as if this package did not exist; and one with a collection."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import recsys_ops
from recsys_ops.demo.features import DENSE_FEATURES


class HistoryPooling(nn.Module):
    """Scores every item as the next purchase, from what the customer bought before.

    Args:
        num_items: I.
        buckets: rows of each table of hashed pairs.
        dim: width of the embeddings.
    """

    def __init__(self, num_items: int, buckets: int, dim: int) -> None:
        super().__init__()
        self.items = nn.EmbeddingBag(num_items, dim, mode="sum", sparse=True)
        self.pairs = nn.EmbeddingBag(buckets, dim, mode="mean", sparse=True, padding_idx=0)
        self.recent = nn.EmbeddingBag(num_items + 1, dim, mode="max", padding_idx=0)
        self.customer_month = nn.EmbeddingBag(buckets, dim, mode="sum", sparse=True)
        self.mlp = nn.Sequential(nn.Linear(4 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.output = nn.Linear(dim, num_items)
        _initialize_tables(self)

    def forward(
        self,
        items: Tensor,
        offsets: Tensor,
        weights: Tensor,
        pairs: Tensor,
        recent: Tensor,
        customer_month: Tensor,
    ) -> Tensor:
        """Logits [B, I]; the arguments are the fields of ``features.History``."""
        pooled = [
            self.items(items, offsets, weights),
            self.pairs(pairs),
            self.recent(recent),
            self.customer_month(customer_month),
        ]
        return self.output(torch.stack(pooled).sum(0) + self.mlp(torch.cat(pooled, dim=1)))


class DLRM(nn.Module):
    """Scores whether a customer buys the item offered: embeddings, their dot products, two MLPs.

    Args:
        num_customers, num_items: rows of those tables.
        buckets: rows of each table of hashed pairs.
        dim: width of the embeddings.
    """

    def __init__(self, num_customers: int, num_items: int, buckets: int, dim: int) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(DENSE_FEATURES, dim), nn.GELU(), nn.Linear(dim, dim))
        self.customer = nn.EmbeddingBag(num_customers, dim, mode="sum", sparse=True)
        self.customer_month = nn.EmbeddingBag(buckets, dim, mode="sum", sparse=True)
        self.item = nn.EmbeddingBag(num_items, dim, mode="sum", sparse=True)
        self.basket = nn.EmbeddingBag(num_items, dim, mode="sum", sparse=True)
        self.crosses = nn.EmbeddingBag(buckets, dim, mode="mean", sparse=True, padding_idx=0)
        self.top = nn.Sequential(nn.Linear(3 * dim + 6 * 5 // 2, 64), nn.GELU(), nn.Linear(64, 1))
        _initialize_tables(self)

    def forward(
        self,
        dense: Tensor,
        customer: Tensor,
        customer_month: Tensor,
        item: Tensor,
        basket: Tensor,
        offsets: Tensor,
        weights: Tensor,
        crosses: Tensor,
    ) -> Tensor:
        """Logits [B]; the arguments are the fields of ``features.Offers``."""
        features = [
            self.bottom(dense),
            self.item(item),
            self.crosses(crosses),
            self.basket(basket, offsets, weights),
            self.customer(customer),
            self.customer_month(customer_month),
        ]
        return _interact(features, self.top)


def _interact(features: list[Tensor], top: nn.Module) -> Tensor:
    """Logits [B] from six features [B, D]."""
    stacked = torch.stack(features, dim=1)  # [B, 6, D]
    i, j = torch.triu_indices(6, 6, offset=1)
    products = torch.bmm(stacked, stacked.transpose(1, 2))[:, i, j]  # [B, 15]
    return top(torch.cat([*features[:3], products], dim=1)).squeeze(1)


class CollectionDLRM(nn.Module):
    """A copy of a ``DLRM`` that has its tables in one collection, which trains them in its backward.

    Args:
        plain: the model to copy.
        learning_rate: of Adagrad for the tables.
        accumulator: what Adagrad's sums start from.
    """

    _TABLES = ("item", "crosses", "basket", "customer", "customer_month")

    def __init__(self, plain: DLRM, learning_rate: float, accumulator: float) -> None:
        super().__init__()
        self.bottom, self.top = copy.deepcopy(plain.bottom), copy.deepcopy(plain.top)
        bags = {name: getattr(plain, name) for name in self._TABLES}
        optimizer = recsys_ops.optim.Adagrad(lr=learning_rate, eps=1e-10)
        self.tables = recsys_ops.nn.EmbeddingBagCollection(
            [
                recsys_ops.nn.TableConfig(name, bag.num_embeddings, bag.embedding_dim, pooling=bag.mode)
                for name, bag in bags.items()
            ],
            optimizer,
            bounds="drop",
        )
        self.tables.load_state_dict(
            {f"embedding_bags.{name}.weight": bag.weight for name, bag in bags.items()}
        )
        assert self.tables.fused_optimizer is not None
        for state in self.tables.fused_optimizer.state.values():
            state["sum"].fill_(accumulator)

    def forward(
        self,
        dense: Tensor,
        customer: Tensor,
        customer_month: Tensor,
        item: Tensor,
        basket: Tensor,
        offsets: Tensor,
        weights: Tensor,
        crosses: Tensor,
    ) -> Tensor:
        """Logits [B]; the arguments are the fields of ``features.Offers``."""
        crosses = crosses.masked_fill(crosses == 0, -1)  # padding, which the collection drops
        lookups = [item, crosses, basket, customer, customer_month]
        starts, factors, first = [], [], 0
        for ids in lookups:
            of_bags = offsets if ids is basket else torch.arange(0, ids.numel(), ids.shape[1])
            starts.append(of_bags + first)
            factors.append(weights if ids is basket else weights.new_ones(ids.numel()))
            first += ids.numel()
        starts.append(torch.tensor([first]))
        values = torch.cat([ids.flatten() for ids in lookups])
        pooled = self.tables(values, torch.cat(starts), torch.cat(factors))  # [B, 5 * D]
        return _interact([self.bottom(dense), *pooled.chunk(5, dim=1)], self.top)


@torch.no_grad()
def _initialize_tables(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.EmbeddingBag):
            module.weight.normal_(std=0.05)
            if module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
