"""Zero-shot accuracy by lm-eval, on the tasks of ``optima.evaluation.tasks``.

Shapes: B requests in a batch, L tokens in the longest of them, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optima.data.text import special_tokens, token_ids
from optima.device import evaluating
from optima.errors import OTHER_DTYPE, ModelError, NumericalError, RecipeError
from optima.evaluation.logits import check_causal
from optima.evaluation.record import Estimate, TaskRecord
from optima.evaluation.settings import CHOICES
from optima.evaluation.tasks import METRICS, Tasks, quiet_lm_eval
from optima.models.reading import in_slices

PROBE = "Any text of some words shows whether a model reads it from its beginning to its end."


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = CHOICES,
) -> tuple[TaskRecord, ...]:
    """Accuracy on multiple-choice tasks.

    Args:
        model: a causal language model; runs where it is, in its own dtype, and is left as it was.
        tokenizer: the model's; what it adds to a text (BOS) it adds to every prompt.
        tasks: from ``load_tasks``; they can be used again.
        limit: use the first items of each task only; None uses all.
        batch_size: choices in one forward pass.

    Returns:
        One record a task: ``acc`` (the likeliest choice is the right one) and ``acc_norm`` (likelihoods per character
        of the choice), as far as the task defines them.

    Raises:
        ModelError: if the model predicts no next tokens, if a choice is longer than what it reads, or if the tokenizer
            has no token that begins or ends a text (lm-eval needs one).
        NumericalError: if a likelihood is NaN.
        RecipeError: if ``limit`` is less than 1.
    """
    from lm_eval import evaluator

    if limit is not None and limit < 1:
        raise RecipeError(f"--task-limit must be at least 1, got {limit}: leave it out to use every item")
    check_tokenizer(tokenizer)
    check_causal(model, torch.tensor(token_ids([PROBE], tokenizer)))
    # lm-eval gives a tokenizer without padding one, and switches the model to evaluation.
    with evaluating(model), quiet_lm_eval():
        read = language_model(model, copy.deepcopy(tokenizer), batch_size)
        found = evaluator.evaluate(read, tasks.loaded, limit=limit)
    return tuple(
        task_record(name, leaves, found, sum(read.cut[leaf] for leaf in leaves)) for name, leaves in tasks.names.items()
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: str = "the model") -> None:
    """Raise ``ModelError`` if the tokenizer of ``model`` lacks what lm-eval needs."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model} names neither a bos_token nor an eos_token: set one in tokenizer_config.json"
        )


def task_record(name: str, leaves: Sequence[str], found: Mapping[str, Any], cut: int = 0) -> TaskRecord:
    """What lm-eval found of a task or group ``name``, the items of its ``leaves`` in order.

    It names a number ``metric,filter``; a standard error of a single item is the text "N/A".
    """
    results = {**found["results"], **found.get("groups", {})}[name]
    samples = [sample for leaf in leaves for sample in sorted(found["samples"][leaf], key=lambda each: each["doc_id"])]
    metrics, correct = {}, {}
    for metric in METRICS:
        if f"{metric},none" in results:
            stderr = results.get(f"{metric}_stderr,none")
            known = isinstance(stderr, float)
            metrics[metric] = Estimate(float(results[f"{metric},none"]), float(stderr) if known else None)
            answers = [float(sample[metric]) for sample in samples]
            # Some tasks give shares of a point, and some groups a mean over tasks of unequal size: no share of items.
            alike = math.isclose(math.fsum(answers), metrics[metric].value * len(answers), abs_tol=1e-6)
            if set(answers) <= {0.0, 1.0} and alike:
                correct[metric] = "".join(str(int(answer)) for answer in answers)
    digest = hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode())
    return TaskRecord(name, len(samples), metrics, correct, digest.hexdigest(), cut)


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The model as lm-eval sees it: its own batches, with logits of the positions that are scored and no others.

    With a large vocabulary the head costs more than the body, and most positions belong to the prompt.
    """
    from lm_eval.models.huggingface import HFLM

    after = special_tokens(tokenizer).after  # behind a prompt they would end the text before the choice

    class Quiet(HFLM):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.cut: Counter[str] = Counter()  # see TaskRecord, by the name of a task

        def tok_encode(self, string: str, *given: Any, **options: Any) -> list[int]:
            ids: list[int] = super().tok_encode(string, *given, **options)
            return ids[: -len(after)] if after and ids[-len(after) :] == after else ids

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
        ) -> list[tuple[float, bool]]:
            if (longest := max((len(choice) for *_, choice in requests), default=0)) > self.max_length:
                raise ModelError(
                    f"a choice of the tasks has {longest} tokens, and {type(model).__name__} reads {self.max_length}: "
                    "leave that task out"
                )
            for name, (_, prompt, choice) in zip(self._names, requests, strict=True):
                self.cut[name] += len(prompt) + len(choice) > self.max_length + 1
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True, **options)
            return found

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self._names = [request.task_name for request in requests]
            found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            if any(math.isnan(likelihood) for likelihood, _ in found):  # the first choice would count as the likeliest
                raise NumericalError(f"the likelihood of a choice is NaN: {OTHER_DTYPE}")
            return found

    kind: Any = _with_last_logits(Quiet) if in_slices(model) else Quiet
    # lm-eval ties weights by the configuration, and some checkpoints have a head of their own beside it.
    vars(model)["tie_weights"] = lambda *args, **options: None
    try:
        # In bfloat16 a likelihood has so few digits that choices tie, and the first of them wins.
        return kind(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal", softmax_dtype="float32"
        )
    finally:
        del vars(model)["tie_weights"]


def _with_last_logits(kind: Any) -> Any:
    class LastLogits(kind):  # type: ignore[misc]
        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
        ) -> list[tuple[float, bool]]:
            # What lm-eval will make a row of, and how many of its last positions are scored.
            self._wanted: dict[tuple[int, ...], int] = {}
            for _, context, continuation in requests:
                row = tuple((context + continuation)[-(self.max_length + 1) : -1])
                self._wanted[row] = max(len(continuation), self._wanted.get(row, 0))
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
            return found

        def _model_call(self, inps: Tensor, **options: Any) -> Tensor:
            # Missing positions at the front are understood: lm-eval counts from the end of what it gets.
            with torch.no_grad():
                logits_BLV: Tensor = self.model(inps, logits_to_keep=scored_positions(inps, self._wanted)).logits
            return logits_BLV

    return LastLogits


def scored_positions(inputs_BL: Tensor, wanted: Mapping[tuple[int, ...], int]) -> int:
    """How many positions at the end of a batch hold all that is scored in it.

    Args:
        inputs_BL: rows of tokens, filled up to the right.
        wanted: of each row without what fills it up, how many of its last positions are scored.
    """
    most, length = 0, inputs_BL.shape[1]
    for row in inputs_BL.tolist():
        begin = length  # of what may fill the row up: one token, again and again
        while begin and row[begin - 1] == row[-1]:
            begin -= 1
        asked = [
            wanted[own] + length - len(own) for end in range(begin, length + 1) if (own := tuple(row[:end])) in wanted
        ]
        most = max(most, max(asked, default=length))
    return most
