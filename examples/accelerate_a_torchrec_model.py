"""Accelerates a TorchRec model, trains it, also with the optimizer fused, and takes the weights back.

Needs TorchRec; on a machine without a GPU:
    pip install "recsys-ops[torchrec]"
    pip install --no-deps torchrec==1.8.0
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


def train(model: Recommender) -> None:
    """Train whatever has gradients by Adam; what a fused optimizer updates has none."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(41):
        features, clicked = make_batch(seed=step)
        loss = nn.functional.binary_cross_entropy_with_logits(model(features), clicked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"  step {step}: loss {loss.item():.4f}")


def load_into_torchrec(model: Recommender) -> None:
    """Save the model, load it into a plain one, and compare what they say."""
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
    difference = (scores - theirs).abs().max().item()
    print(f"  Its checkpoint gives the plain TorchRec model the same scores, within {difference:.1e}.")


def main() -> None:
    torch.manual_seed(0)

    print("The whole model, accelerated; its tables are trained by whoever trained them before:")
    model = Recommender()
    features, _ = make_batch(seed=0)
    print(recsys_ops.accelerate(model, features))
    train(model)
    load_into_torchrec(model)

    print("Its collection in place of TorchRec's, on the same memory, trained in the backward:")
    model = Recommender()
    model.tables = from_torchrec(model.tables, recsys_ops.optim.RowWiseAdagrad(lr=0.2))
    train(model)
    load_into_torchrec(model)


if __name__ == "__main__":
    main()
