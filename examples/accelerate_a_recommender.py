"""Accelerates a recommender that knows nothing of recsys_ops, trains it, and takes its weights back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import recsys_ops

USERS, ITEMS, CATEGORIES, QUERY_WORDS = 2_000, 10_000, 300, 5_000
BATCH, HISTORY = 512, 50


class Recommender(nn.Module):
    """Scores an item for a user from the user's history, the item's categories, and a query."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, dim)
        self.item = nn.Embedding(ITEMS, dim)
        self.history = nn.Embedding(ITEMS, dim)
        self.bags = nn.ModuleDict(
            {
                "categories": nn.EmbeddingBag(CATEGORIES, dim, mode="max"),
                "words": nn.EmbeddingBag(QUERY_WORDS, dim, mode="sum", padding_idx=0),
            }
        )
        self.dense = nn.Linear(8, dim)
        self.tower = nn.Sequential(nn.Linear(6 * dim, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        viewed = self.history(batch["history"])  # [B, HISTORY, D]
        features = [
            self.user(batch["user"]),
            self.item(batch["item"]),
            viewed.mean(dim=1),
            *(bag(batch[name]) for name, bag in self.bags.items()),
            self.dense(batch["dense"]).relu(),
        ]
        return self.tower(torch.cat(features, dim=1)).squeeze(1)


def make_batch(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int, *shape: int) -> Tensor:
        # Squaring makes small numbers popular, as real ids are.
        return (torch.rand(shape, generator=generator) ** 2 * count).long()

    batch = {
        "user": ids(USERS, BATCH),
        "item": ids(ITEMS, BATCH),
        "history": ids(ITEMS, BATCH, HISTORY),
        "categories": ids(CATEGORIES, BATCH, 4),
        "words": ids(QUERY_WORDS, BATCH, 10),
        "dense": torch.rand(BATCH, 8, generator=generator),
    }
    return batch, (batch["dense"].sum(1) > 4).float()


def main() -> None:
    torch.manual_seed(0)
    model = Recommender()
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.01)

    # A tuple holds positional arguments: here one, a dict.
    batch, _ = make_batch(seed=0)
    report = recsys_ops.accelerate(model, (batch,))
    print(report)

    for step in range(10):
        batch, clicked = make_batch(seed=step)
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch), clicked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "recommender.pt"
        torch.save(model.state_dict(), checkpoint)
        plain = Recommender()
        plain.load_state_dict(torch.load(checkpoint))
    with torch.no_grad():
        torch.testing.assert_close(plain(batch), model(batch))
    print("The checkpoint loads into the plain model, which gives the same scores.")

    recsys_ops.restore(model)
    assert type(model) is Recommender


if __name__ == "__main__":
    main()
