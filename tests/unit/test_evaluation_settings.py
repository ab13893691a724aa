"""Settings of an evaluation are complete and valid, or there are none: from Python as from the command line."""

from __future__ import annotations

from typing import Any

import pytest

from optima.errors import RecipeError
from optima.evaluation.settings import EvaluationSettings

BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"models": ()}, "models is empty: name a hub id"),
    ({"models": None}, "models must be a list of names, none of them empty, got None"),
    ({"dataset": ()}, "nothing to measure: name a text"),
    ({"dataset": (3,)}, "dataset must be a list of names, none of them empty, got (3,)"),
    ({"dtype": "fp16"}, "unknown dtype 'fp16'"),
    ({"max_seq_length": "many"}, "max_seq_length must be a whole number of at least 1, such as 2048, got 'many'"),
    ({"max_seq_length": 0}, "max_seq_length must be a whole number of at least 1"),
    ({"task_limit": 0, "tasks": "piqa"}, "task_limit must be a whole number of at least 1, got 0"),
    ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, got 1.5"),
    ({"seed": None}, "seed must be a whole number of at least 0 and below 2^63, such as 0, got None"),
    ({"seed": 2**63}, "seed must be a whole number of at least 0 and below 2^63"),
    ({"seed": -1}, "seed must be a whole number of at least 0"),
    ({"divergence": "yes"}, "divergence must be true or false, got 'yes'"),
    ({"device": 0}, "device must be auto, cpu, cuda or cuda:N, got 0"),
    ({"dataset": (), "tasks": "piqa", "max_seq_length": 64}, "--max-seq-length is for a text: name one with --dataset"),
    ({"dataset": (), "tasks": "piqa", "protocol": "sparsegpt"}, "--protocol is for a text"),
    ({"dataset": (), "tasks": "piqa", "max_windows": 3}, "--max-windows is for a text"),
    ({"dataset": (), "tasks": "piqa", "split": "train"}, "--split is for a text"),
]


@pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=lambda item: str(item)[:40])
def test_bad_value(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        EvaluationSettings(**{"models": ("model",), "dataset": ("held-out.txt",)} | values)
    assert message in str(caught.value)


def test_one_text_for_several_and_a_list_for_a_tuple() -> None:
    settings = EvaluationSettings("model", "held-out.txt", tasks=["piqa"])  # type: ignore[arg-type]
    assert (settings.models, settings.dataset, settings.tasks) == (("model",), ("held-out.txt",), ("piqa",))
    assert EvaluationSettings("model", "a.txt", max_seq_length="32").max_seq_length == 32  # type: ignore[arg-type]


def test_tasks_need_no_text() -> None:
    assert EvaluationSettings("model", tasks="piqa", batch_size=4).dataset == ()  # type: ignore[arg-type]
