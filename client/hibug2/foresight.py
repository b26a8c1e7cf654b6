"""Slices that the data does not show: predicted by a method, and held against other data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from hibug2 import messages
from hibug2.connection import PAGE, Connection, RunLike, full_name, gather
from hibug2.v1 import prediction_pb2, run_pb2


@dataclass(frozen=True)
class Verification:
    """What the scored instances of other splits say of predictions.

    `methods` has a row a method, as the paper's Table 1. Columns: method, pair_counts, predicted_count; then of the
    predicted slices that have enough scored instances, and with base_ of random combinations that were unseen too:
    verified_count, verified_mean_drop (mean over the slices of overall mean less mean), its 95% interval
    verified_interval_low and verified_interval_high, and verified_error_slice_share.
    `slices` has the columns of `predicted` and scored_count, mean, drop, interval_low, interval_high, is_error_slice.
    """

    overall_mean: float
    scored_count: int
    methods: pa.Table
    slices: pa.Table


class Foresight(Connection):
    """The calls of `Client` about predicted slices."""

    def predicted(
        self,
        run: RunLike,
        method: str = "tag_substitution",
        *,
        pair_count: int | None = None,
        max_per_class: int | None = None,
    ) -> pa.Table:
        """The predicted slices of a run by a method: tag_substitution, instruction (a language model) or prior.

        The run has predicted by tag substitution; whatever else is asked for is made now, once, and waited for.
        `pair_count` is the number of pairs of each slice (instruction: as many as the run's slices may have; prior: any
        number); `max_per_class` bounds the slices that name one class, and those that name none (20).

        Columns: rank, tags, score, method, origin_ranks (of the error slices), replaced (the pair), similarity,
        known_count (instances of the run's split that hold all tags; fewer than its slices need), target (what the
        class is thought to be taken for), expected_mean, doubtful; null where the method does not tell. Empty when
        the run left prediction out, having no error slices, and nothing else is asked for.
        """
        found = self._finished(run, "ranking")
        if method == "tag_substitution" and (pair_count, max_per_class) == (None, None) and not found.prediction:
            found = self._finished(run, "prediction", empty_when_skipped=True)
            if not found.prediction:
                return messages.PREDICTED.empty_table()
        return self._listed(self._prediction(found, method, pair_count, max_per_class))

    def verify_predictions(
        self,
        run: RunLike,
        methods: Sequence[str] = ("tag_substitution",),
        *,
        splits: Sequence[str] = ("test",),
        model: str = "",
        min_count: int | None = None,
        seed: int = 0,
        pair_count: int | None = None,
        max_per_class: int | None = None,
    ) -> Verification:
        """Hold what the `methods` predict against the scored instances of `splits`, beside a base rate.

        Predictions are made as `predicted` does; beside other methods tag substitution is spared the `pair_count`.
        `model` is a name or id, the run's own when empty. A slice can be verified when `min_count`
        instances of it are scored (as many as the run's slices need). `seed` draws the random combinations.
        """
        found = self._finished(run, "ranking")
        names = [
            self._prediction(found, method, pairs_of(method, methods, pair_count), max_per_class) for method in methods
        ]
        request = prediction_pb2.VerifyPredictionsRequest(
            predictions=names,
            model=model and full_name(found.dataset, "models", model),
            splits=splits,
            min_count=min_count,
            seed=seed,
        )
        response = self._call(self._predictions.VerifyPredictions, request)
        rows, slices = messages.verified_table([self._listed(name) for name in names], response.predictions)
        return Verification(response.overall_mean, response.scored_count, rows, slices)

    def _prediction(self, run: run_pb2.Run, method: str, pair_count: int | None, max_per_class: int | None) -> str:
        """The name of the run's prediction by `method`, which is made where it is not there yet."""
        number = messages.number(prediction_pb2.PredictionMethod.DESCRIPTOR, method, "method")
        if method == "tag_substitution" and run.prediction and (pair_count, max_per_class) == (None, None):
            return run.prediction
        request = prediction_pb2.CreatePredictionRequest(
            parent=run.dataset,
            ranking=run.ranking,
            method=prediction_pb2.PredictionMethod.ValueType(number),
            pair_count=pair_count,
            max_per_class=max_per_class,
        )
        job = self._call(self._predictions.CreatePrediction, request).job
        return self._ended(job, self._predictions.WatchPrediction, prediction_pb2.WatchPredictionRequest).name

    def _listed(self, prediction: str) -> pa.Table:
        pages = self._pages(
            lambda token: prediction_pb2.ListPredictedSlicesRequest(
                parent=prediction, page_size=PAGE, page_token=token
            ),
            self._predictions.ListPredictedSlices,
        )
        return gather((messages.predicted_batch(p.predicted_slices) for p in pages), messages.PREDICTED)


def pairs_of(method: str, methods: Sequence[str], pair_count: int | None) -> int | None:
    """The `pair_count` that goes to `method`: tag substitution takes none, and alone it is to say so."""
    return None if method == "tag_substitution" and len(methods) > 1 else pair_count
