"""The benchmark of critics: what it calls explained, and that every kind of critic runs in it."""

import pytest
import torch

from benchmarks import critics


def test_the_benchmark_knows_a_critic_that_explains_nothing():
    trainer = critics.make_trainer(0, critics.CRITICS["adapter"])
    with torch.no_grad():
        for parameter in trainer.model.v_head.parameters():
            parameter.zero_()
    explained, score = critics.explained_variance(trainer, 5)
    assert explained == pytest.approx(0.0, abs=1e-6)
    assert 0 <= score <= critics.LENGTH
    rows = [critics.run(name, 0, 1) for name in ("head, detached", "full")]
    assert len(critics.table(rows).splitlines()) == 2 + len(rows)
    assert all(row["explained_variance"] <= 1 for row in rows)
