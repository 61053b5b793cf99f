"""Gives a TorchRec model our collection, trains it with the optimizer fused, and takes the weights back.

Needs TorchRec; on a machine without a GPU:
    pip install --no-deps torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
    pip install tensordict torchmetrics==1.0.3 tqdm pyre-extensions
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torchrec
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

import recsys_ops
from recsys_ops.torchrec import from_torchrec

PRODUCTS, WORDS, BATCH, DIM = 300, 500, 128, 32
KEYS = ["viewed", "bought", "query"]


class Recommender(nn.Module):
    """A model that knows TorchRec and nothing of recsys_ops."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = torchrec.EmbeddingBagCollection(
            [
                EmbeddingBagConfig(
                    name="product", num_embeddings=PRODUCTS, embedding_dim=DIM, feature_names=KEYS[:2]
                ),
                EmbeddingBagConfig(
                    name="word",
                    num_embeddings=WORDS,
                    embedding_dim=DIM,
                    feature_names=KEYS[2:],
                    pooling=torchrec.PoolingType.MEAN,
                ),
            ]
        )
        self.tower = nn.Sequential(nn.Linear(3 * DIM, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        return self.tower(self.tables(features).values()).squeeze(1)


def make_batch(seed: int) -> tuple[KeyedJaggedTensor, Tensor]:
    """Bags of ids, and clicks that depend on what was viewed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (len(KEYS) * BATCH,), generator=generator)
    of_each = lengths.view(len(KEYS), BATCH).sum(1).tolist()
    # Squaring makes small numbers popular, as real ids are.
    ids = [
        (torch.rand(n, generator=generator) ** 2 * rows).long()
        for n, rows in zip(of_each, (PRODUCTS, PRODUCTS, WORDS), strict=True)
    ]
    features = KeyedJaggedTensor(KEYS, torch.cat(ids), lengths=lengths)
    first = features["viewed"].offsets()[:-1]
    return features, (ids[0][first] % 2).float()


def main() -> None:
    torch.manual_seed(0)
    model = Recommender()

    # The swap. It shares the weights of the collection it replaces; from here on the backward updates
    # them. (This line is what recsys_ops.accelerate would do for a whole model.)
    model.tables = from_torchrec(model.tables, recsys_ops.optim.RowWiseAdagrad(lr=0.2))

    # Tables have no gradients, so only the tower is left to the optimizer.
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(41):
        features, clicked = make_batch(seed=step)
        loss = nn.functional.binary_cross_entropy_with_logits(model(features), clicked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "recommender.pt"
        torch.save(model.state_dict(), checkpoint)
        plain = Recommender()
        plain.load_state_dict(torch.load(checkpoint))  # strict: the same keys
    features, _ = make_batch(seed=100)
    with torch.no_grad():
        scores, theirs = model(features), plain(features)
    # Both pool in fp32; sums of a bag may differ in their last bits.
    torch.testing.assert_close(scores, theirs)
    print(
        "The checkpoint loads into the plain TorchRec model, whose scores differ by at most "
        f"{(scores - theirs).abs().max().item():.1e}."
    )


if __name__ == "__main__":
    main()
