"""What to train on next: picks from the pool, what to collect, and what a repair brought."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from hibug2 import messages
from hibug2.connection import PAGE, Connection, RunLike, full_name, gather
from hibug2.errors import UserError
from hibug2.v1 import repair_pb2, run_pb2


@dataclass(frozen=True)
class PickRules:
    """What a selection may hold, and how its slices are asked.

    class_quota: most picks of one class, as the model predicts it; 0 for no limit. exclude: instance ids that are never
    picked. without_near_copies: leave out images that look like one picked before. spread: slices take one instance
    each, in turn. one_per_family: of slices with nearly the same instances ask the clearest only. embeddings: for
    k_center, the URI of a Parquet file with instance_id and embedding, below a prefix that images may be read from.
    """

    class_quota: int = 0
    exclude: Iterable[str] = field(default=())
    without_near_copies: bool = False
    spread: bool = False
    one_per_family: bool = False
    embeddings: str = ""


@dataclass(frozen=True)
class Selection:
    """A selection that was made. `methods` has a row a method, its own first; columns: method, pick_count, shared_count
    (picks that its own method made too), matching_count (picks that match an error slice)."""

    name: str
    method: str
    pick_count: int
    pool_count: int
    unmatched_slice_count: int
    near_copy_count: int
    unreadable_count: int
    methods: pa.Table


class Repair(Connection):
    """The calls of `Client` about repair."""

    def picks(self, run: RunLike, method: str = "lowest_mean") -> pa.Table:
        """The pool instances that a run picked to train on, or (method="random") the random draw beside them.

        Columns: instance_id, image_uri, slice_rank, slice_mean, tags (of that slice), pool_index, predicted_label,
        value. Empty when the run left selection out. Picks by other methods and rules are made by `select`.
        """
        found = self._finished(run, "selections", empty_when_skipped=True)
        if not found.selections:
            _method(method)
            return messages.PICKS.empty_table()
        selection = self._selection(found, method)
        if not selection:
            raise UserError("method", f"{found.name} has no {method} picks; `select` makes them")
        return self.selected(selection)

    def select(
        self,
        run: RunLike,
        method: str = "lowest_mean",
        *,
        budget: int | None = None,
        rivals: Sequence[str] = (),
        split: str = "",
        seed: int | None = None,
        rules: PickRules | None = None,
    ) -> Selection:
        """Pick for the error slices of a run by a method, and by `rivals` as many beside; made once, and waited for.

        Methods by slices: lowest_mean (the paper's), drop_support, p_value, single_attribute (as HiBug), and
        slices_and_margin. Rivals that look at no slice: random, least_confidence, margin, entropy, k_center. `budget`
        and `seed` are the run's own when None; `split` is where to pick from, the run's pool when empty.
        """
        found = self._finished(run, "ranking")
        given = rules or PickRules()
        request = repair_pb2.CreateSelectionRequest(
            parent=found.dataset,
            ranking=found.ranking,
            method=_method(method),
            budget=found.parameters.budget if budget is None else budget,
            split=split or found.parameters.pool_split,
            seed=found.parameters.seed if seed is None else seed,
            rival_methods=[_method(rival) for rival in rivals],
            options=repair_pb2.SelectionOptions(
                class_quota=given.class_quota,
                excluded_instance_ids=given.exclude,
                without_near_copies=given.without_near_copies,
                spread=given.spread,
                one_per_family=given.one_per_family,
                embeddings_uri=given.embeddings,
            ),
        )
        job = self._call(self._repair.CreateSelection, request).job
        job = self._ended(job, self._repair.WatchSelection, repair_pb2.WatchSelectionRequest)
        told = self._call(self._repair.GetSelection, repair_pb2.GetSelectionRequest(name=job.name))
        return Selection(
            name=job.name,
            method=method,
            pick_count=told.pick_count,
            pool_count=told.pool_count,
            unmatched_slice_count=told.unmatched_slice_count,
            near_copy_count=told.near_copy_count,
            unreadable_count=told.unreadable_count,
            methods=messages.picked_methods(told),
        )

    def selected(self, selection: Selection | str, method: str = "") -> pa.Table:
        """The picks of a selection, as `picks`; of one of its rivals where `method` names it."""
        parent = selection if isinstance(selection, str) else selection.name
        number = _method(method) if method else repair_pb2.SELECTION_METHOD_UNSPECIFIED
        pages = self._pages(
            lambda token: repair_pb2.ListPicksRequest(parent=parent, page_size=PAGE, page_token=token, method=number),
            self._repair.ListPicks,
        )
        return gather((messages.picks_batch(p.picks) for p in pages), messages.PICKS)

    def data_needs(self, run: RunLike, wanted: int = 0, split: str = "") -> pa.Table:
        """What to collect: the error slices of a run of which the pool has fewer than `wanted` instances.

        Columns: slice_rank, slice_mean, tags, pool_count, missing_count, description (for a person), prompt (for an
        image generator), doubtful. `wanted` is as many as the run's slices need when 0. The pool may be empty.
        """
        found = self._finished(run, "ranking")
        pages = self._pages(
            lambda token: repair_pb2.ListDataNeedsRequest(
                parent=found.ranking,
                wanted_count=wanted,
                split=split or found.parameters.pool_split,
                page_size=PAGE,
                page_token=token,
            ),
            self._repair.ListDataNeeds,
        )
        return gather((messages.needs_batch(p.needs) for p in pages), messages.NEEDS)

    def compare_repair(
        self, run: RunLike, models: Mapping[str, str], split: str = "test", *, repaired: Sequence[int] = ()
    ) -> pa.Table:
        """What training with picks brought, on the scored instances of `split`.

        `models` maps each model that was trained again to the method of the run's picks (lowest_mean or random), or to
        a `Selection`'s name, a rival's as `NAME#method`. The first row is the run's own model, with the method
        "original"; the others follow in their order. Columns: model, method, added_count, and the means overall_mean,
        failing_mean (instances in at least one error slice), other_mean (the others); null where there is no such
        instance; and groups, a list with group, scored_count, mean, and the change against the run's own model with its
        95% interval change_low, change_high. With the ranks of `repaired` error slices the failing instances are
        parted, too: matching, overlapping, non_overlapping (paper, Table 3).
        """
        found = self._finished(run, "ranking")
        request = repair_pb2.CompareRepairRequest(
            ranking=found.ranking,
            compared_models=self._compared(found, models),
            split=split,
            repaired_ranks=repaired,
        )
        outcomes = self._call(self._repair.CompareRepair, request).outcomes
        return pa.Table.from_batches([messages.outcomes_batch(outcomes)])

    def _compared(self, run: run_pb2.Run, models: Mapping[str, str]) -> list[repair_pb2.ComparedModel]:
        compared = []
        for model, trained_with in models.items():
            if "/" in trained_with:
                selection, _, rival = trained_with.partition("#")
            else:
                selection, rival = self._selection(run, trained_with) or "", ""
            if not selection:
                raise UserError(
                    "method", f"{run.name} has no {trained_with} picks that '{model}' could be trained with"
                )
            one = repair_pb2.ComparedModel(model=full_name(run.dataset, "models", model), selection=selection)
            if rival:
                one.method = _method(rival)
            compared.append(one)
        return compared

    def _selection(self, run: run_pb2.Run, method: str) -> str | None:
        """The name of the run's selection by `method`; None when it has none."""
        wanted = _method(method)
        for name in run.selections:
            selection = self._call(self._repair.GetSelection, repair_pb2.GetSelectionRequest(name=name))
            if selection.method == wanted:
                return name
        return None


def _method(method: str) -> repair_pb2.SelectionMethod.ValueType:
    number = messages.number(repair_pb2.SelectionMethod.DESCRIPTOR, method, "method")
    return repair_pb2.SelectionMethod.ValueType(number)
