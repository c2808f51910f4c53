"""A small transformer trains to the same bits, whoever gives it memory."""

from __future__ import annotations

import json

import pytest
import torch


def losses_of_training(steps: int = 8) -> list[str]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).cuda()
    embed = torch.nn.Embedding(1000, 256).cuda()
    head = torch.nn.Linear(256, 1000).cuda()
    parameters = [*model.parameters(), *embed.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        tokens = torch.randint(0, 20, (8, 32 + 17 * (step % 4)), generator=generator).cuda()
        logits = head(model(embed(tokens)))
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss).hex())
    return losses


def test_training(request: pytest.FixtureRequest) -> None:
    losses = losses_of_training()
    assert losses_of_training() == losses  # with a cache that is warm
    values = [float.fromhex(loss) for loss in losses]
    assert values[-1] < values[0]
    if (path := request.config.getoption("--losses")) is not None:
        path.write_text(json.dumps(losses))
