"""Where an evaluation is written, and that what others wrote there meanwhile is not lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from optima.errors import OptimaError
from optima.evaluation.card import update_card
from optima.evaluation.record import Evaluation, check_free, record_file
from optima.models.files import is_same, stat_of, usable_path
from optima.reporting.model_card import CARD_NAME, check_card
from optima.reporting.record import REPORT_NAME


class Saving:
    """Every refusal is made now, before the models are measured.

    Args:
        models: as the user named them.
        save: into those of them that are outputs of OPTIMA, and their cards.
        output: to this file.
        overwrite: replace what is there now.

    Raises:
        OptimaError: if there is nothing to write to, or it cannot be written to.
    """

    def __init__(self, models: Sequence[str], save: bool, output: str | None, overwrite: bool) -> None:
        if output is not None:
            if not output:
                raise OptimaError("--output is empty: name a file")
            output = str(usable_path(output, "--output", "name another file"))
        self._models = models if save else ()
        self._overwrite = overwrite
        found = _places(models, save, output, overwrite)
        # One place may be named twice: a model by two paths, or the file that it keeps its results in.
        self._places = list({os.path.realpath(record_file(place)): place for place in found}.values())
        self._so_far = _so_far(output, overwrite)
        self._directories = {place: stat_of(place) for place in self._places if place.is_dir()}
        self._records = {place: _written(place) for place in self._places}
        self._kept: list[Path] = []

    def keep(self, found: Evaluation) -> None:
        """What is known before all is: a later model may fail."""
        if self._so_far is not None:
            self._kept.append(found.save(self._so_far))

    def save(self, found: Evaluation) -> tuple[list[Path], list[str]]:
        """The files that were written, and what could not be done as asked."""
        gone = [place for place, known in self._directories.items() if not is_same(place, known)]
        told = [
            f"{place} was replaced while it was measured, and is another model now: its results were not written "
            "there; --output FILE writes them elsewhere"
            for place in gone
        ]
        files, others = list[Path](), list[Path]()
        for place in self._places:
            if place in gone:
                continue
            if self._overwrite or _written(place) == self._records[place]:
                files.append(found.save(place))
            else:
                others.append(place)
                files.append(found.save(_free_beside(place)))
                told.append(
                    f"{record_file(place)} was written by another evaluation while this one ran: its results are in "
                    f"{files[-1]}"
                )
        cards = self._update_cards(found, (*gone, *others))
        for file in self._kept:
            file.unlink(missing_ok=True)
        return [*files, *cards], told

    def _update_cards(self, found: Evaluation, but: Sequence[Path]) -> list[Path]:
        """The cards of those models that OPTIMA made, ``but`` these; each is brought up to date."""
        places = {model: _of_model(model) for model in self._models}
        made = {model: place for model, place in places.items() if (place / REPORT_NAME).is_file() and place not in but}
        cards = [place / CARD_NAME for model, place in made.items() if update_card(place, found, model)]
        return list(dict.fromkeys(cards))  # out and ./out are one


def _of_model(name: str) -> Path:
    return usable_path(name, "the model", "give a hub id, a local model directory or a GGUF file")


def _written(place: Path) -> tuple[int, int, int] | None:
    """What tells the record that is there from another."""
    with suppress(OSError):
        found = record_file(place).stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _free_beside(place: Path) -> Path:
    file = record_file(place)
    names = (file.with_name(f"{file.stem}-{number}{file.suffix}") for number in count(2))
    return next(name for name in names if not os.path.lexists(name))


def _so_far(output: str | None, overwrite: bool) -> Path | None:
    """Where what is measured is kept until all is, for a later model may fail; refused now if it cannot be."""
    if output is None:
        return None
    place = Path(f"{output}.partial")
    if place.is_dir():
        raise OptimaError(
            f"{place} is a directory, and results wait there until all are found: choose another --output"
        )
    if place.exists() and not overwrite:
        raise OptimaError(
            f"{place} holds what an unfinished evaluation found: --overwrite replaces it, or move it away"
        )
    check_free(place, overwrite)
    return place


def _places(models: Sequence[str], save: bool, output: str | None, overwrite: bool) -> list[Path]:
    """Where an evaluation is written; refused now if it cannot be."""
    places = [_of_model(model) for model in models] if save else []
    if overwrite and not (save or output):
        raise OptimaError("--overwrite is for what --save or --output writes: name one, or leave it out")
    places = [place for place in places if (place / REPORT_NAME).is_file()]
    if save and not places:
        named = ", ".join(m if _of_model(m).is_dir() else f"{m} (no directory here)" for m in models)
        raise OptimaError(f"--save: none of {named} is an output of optima prune; use --output FILE")
    if output and Path(output).is_dir():
        raise OptimaError(f"--output {output} is a directory: name a file, or --save into the models' own directories")
    places += [Path(output)] if output else []
    for place in places:
        check_free(place, overwrite)
        if save and place.is_dir():
            check_card(place)
    return places
