"""Log likelihood, divergence and agreement of language models, and the scores of the grouped model."""

from __future__ import annotations

import numpy as np
import pytest

from models.grouped_residual_metric import OUTPUT_SLOTS, score, task_scores
from models.language_metrics import compare, log_likelihood, log_softmax


def test_log_likelihood_is_of_the_token_that_follows() -> None:
    tokens = np.array([[0, 2, 1], [1, 1, 0]])
    logits = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    texts = [[log_p[0, 0, 2], log_p[0, 1, 1]], [log_p[1, 0, 1], log_p[1, 1, 0]]]
    found = log_likelihood({"input_ids": tokens}, {"logits": logits})
    assert found == pytest.approx(np.mean(texts, axis=1), rel=1e-5)


def test_one_constant_on_all_logits_changes_nothing() -> None:
    tokens = np.zeros((1, 5), int)
    logits = np.random.default_rng(1).normal(size=(1, 5, 7))
    found = compare(tokens, logits, logits + 3.0)
    assert found["kl"] == pytest.approx(np.zeros(4), abs=1e-12)
    assert found["top1"].tolist() == [1, 1, 1, 1]
    assert found["nats"] == pytest.approx(np.zeros(4), abs=1e-12)


def test_a_lost_token_is_a_loss() -> None:
    tokens = np.array([[0, 1]])
    before = np.log(np.array([[[0.1, 0.7, 0.2], [1, 1, 1]]]))
    after = np.log(np.array([[[0.7, 0.1, 0.2], [1, 1, 1]]]))
    found = compare(tokens, before, after)
    assert found["nats"] == pytest.approx([np.log(7)])
    assert found["kl"] == pytest.approx([0.1 * np.log(1 / 7) + 0.7 * np.log(7)])
    assert found["top1"].tolist() == [0]


def test_large_logits_do_not_overflow() -> None:
    assert log_softmax(np.array([[1e4, 0.0]]))[0] == pytest.approx([0.0, -1e4])


def test_a_task_is_scored_on_its_own_outputs() -> None:
    width = list(OUTPUT_SLOTS.values())[-1].stop
    task = np.array([2, 2, 5])
    target, output = np.zeros((3, width)), np.full((3, width), 9.0)
    target[[0, 1], [12, 14]] = 1
    output[:2, OUTPUT_SLOTS["wine"]] = [[5, 0, 0], [5, 0, 0]]
    target[2, OUTPUT_SLOTS["friedman1"]], output[2, OUTPUT_SLOTS["friedman1"]] = 1.0, 0.5
    inputs, outputs = {"task": task, "target": target}, {"output": output}
    assert task_scores(inputs, outputs) == {"wine": 0.5, "friedman1": 0.75}
    assert score(inputs, outputs) == 0.625
