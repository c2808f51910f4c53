"""A small transformer in training: what it loses at each step, for allocators to be compared bit for bit."""

from __future__ import annotations

import torch


def losses(device: str, steps: int = 5) -> list[float]:
    """Forward, backward and AdamW, from the same seeds each time."""
    torch.manual_seed(7)
    layer = torch.nn.TransformerEncoderLayer(64, 4, dim_feedforward=128, dropout=0.0, batch_first=True)
    network = torch.nn.Sequential(
        torch.nn.Embedding(100, 64), torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    )
    network.append(torch.nn.Linear(64, 100))
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    tokens = torch.randint(0, 100, (4, 33)).to(device)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        logits = network(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen
