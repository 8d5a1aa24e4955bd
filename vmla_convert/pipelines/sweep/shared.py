"""What the points of a sweep share: one calibration, one set of predictions, one decomposition.

Layer by layer, each is solved once for every group of conversions that differ in size alone, and
cut to the size of each; what comes out lies on a shelf. So any number of ranks costs little more
than one, memory holds one layer's decompositions, and a sweep that was stopped goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from vmla_convert.config import ConvertConfig, RankPlan
from vmla_convert.layers.dit import CausalWanModel
from vmla_convert.maths.factor import (
    DATA_INITS,
    INITS,
    ErrorCurve,
    assume_evidence,
    predict_errors,
)
from vmla_convert.maths.projections import Evidence, KVWeights, LayerShape, cut
from vmla_convert.pipelines.calibrate import LayerReads, calibrate, deployed_phases, model_blocks
from vmla_convert.pipelines.conversion import measures
from vmla_convert.pipelines.data import open_clips, seeded
from vmla_convert.pipelines.factoring import (
    Branch,
    branch_of,
    build_student,
    latent_tensors,
    layer_evidence,
    layer_shape,
    layer_weights,
    planned_config,
    with_branches,
)
from vmla_convert.pipelines.grid import digest
from vmla_convert.pipelines.plan import Curves, divide, uniform_plan, wanted_curves
from vmla_convert.pipelines.shelf import Shelf, Tensors
from vmla_convert.pipelines.sweep.failures import left_out
from vmla_convert.progress import Progress, Silent
from vmla_convert.tables import to_dict

_SECONDS = "seconds"

_Kind = tuple[Literal["joint", "split"], tuple[int, ...], bool]
"""Latent, numbers of rope pairs, and whether inputs are measured."""

LeaveOut = Callable[[], AbstractContextManager[object]]
"""What a step is done within that may fail."""


class Shared:
    """The conversions of a sweep.

    Args:
        teacher: The dense model.
        common: What the points have in common: calibration and data.
        conversions: All of them; those that differ in a seed that they do not use count as one.
        shelf: Where work is kept.
    """

    def __init__(
        self,
        teacher: CausalWanModel,
        common: ConvertConfig,
        conversions: Iterable[ConvertConfig],
        shelf: Shelf,
    ) -> None:
        self.teacher, self.common, self.shelf = teacher, common, shelf
        self.conversions = {_name(each): _unseeded(each) for each in conversions}
        self.phases = deployed_phases(teacher.config)
        self._reads: Callable[[int], LayerReads] | None = None

    def measure(self, progress: Progress | None = None) -> list[LayerReads]:
        """Calibrate once, whatever the points are: what is found describes the model too."""
        teacher, common = self.teacher, self.common
        self._reads = calibrate(
            teacher,
            model_blocks(teacher),
            open_clips(common.data, teacher.config.cache.sink_frames),
            common.calibration_clips,
            common.seed,
            progress,
            self.shelf,
        )
        return [self._reads(layer) for layer in self._layers()]

    def convert(self, progress: Progress | None = None) -> None:
        """Make every conversion that the shelf lacks; calibration comes first.

        One that fails is left out: `student` tries it by itself, and tells why.
        """
        lacking = {n: each for n, each in self.conversions.items() if not self._is_made(n)}
        self._make(lacking, progress or Silent(), left_out)

    def student(self, conversion: ConvertConfig) -> tuple[CausalWanModel, float]:
        """A conversion as a model, and the seconds of its decompositions.

        Of one that several conversions are cut from it bears an equal part. Calibration and
        predictions are not in it: they are done once, whatever the conversions are.

        Raises:
            ConfigError: Its budget is too small, or whatever else it fails of.
        """
        name = _name(conversion)
        if not self._is_made(name):
            self.measure()
            self._make({name: self.conversions[name]}, Silent(), nullcontext)
        planned = planned_config(self.teacher.config, conversion, self._read_plan(name))
        branches: list[Branch] = []
        tensors, seconds = dict[str, Tensor](), 0.0
        for layer in self._layers():
            group = self.shelf.get(_of_layer(name, layer))
            seconds += group.pop(_SECONDS).item()
            branches.append(_take_branch(group))
            tensors |= group
        return build_student(self.teacher, with_branches(planned, branches), tensors), seconds

    def plan(self, conversion: ConvertConfig) -> RankPlan:
        """The sizes of a conversion's layers."""
        return self._read_plan(_name(conversion))

    def _is_made(self, name: str) -> bool:
        return all(self.shelf.has(_of_layer(name, layer)) for layer in self._layers())

    def _make(
        self,
        conversions: dict[str, ConvertConfig],
        progress: Progress,
        leave_out: LeaveOut,
    ) -> None:
        """Plan and convert, with `leave_out` around each step that can fail."""
        plans = self._plan(conversions, progress, leave_out)
        for layer in progress.track(self._layers() if plans else [], "converting"):
            self._convert_layer(layer, conversions, plans, leave_out)

    def _layers(self) -> range:
        return range(self.teacher.config.geometry.num_layers)

    def _weights(self, layer: int) -> KVWeights:
        state = self.teacher.state_dict()
        return layer_weights(state.__getitem__, layer, self.teacher.config.geometry.num_heads)

    def _evidence(self, layer: int, weights: KVWeights) -> Callable[[ConvertConfig], Evidence]:
        """What is known of a layer, worked out once with measured inputs, and once without."""
        known: dict[bool, Evidence] = {}

        def of(conversion: ConvertConfig) -> Evidence:
            measured = measures(conversion)
            if measured not in known and not measured:
                known[measured] = assume_evidence(weights, self.phases)
            if measured not in known:
                assert self._reads is not None
                known[measured] = layer_evidence(self._reads(layer), weights, self.phases)
            return known[measured]

        return of

    def _plan(
        self,
        conversions: dict[str, ConvertConfig],
        progress: Progress,
        leave_out: LeaveOut,
    ) -> dict[str, RankPlan]:
        """Sizes of conversions, from predictions that those of one kind share."""
        model = self.teacher.config
        wanted = {name: wanted_curves(model, each) for name, each in conversions.items()}
        most: dict[_Kind, int] = {}
        for name, curves in wanted.items():
            if curves is not None:
                kind = _kind(conversions[name], curves)
                most[kind] = max(curves.most, most.get(kind, 0))
        predicted = defaultdict[Hashable, list[ErrorCurve]](list)
        for layer in progress.track(self._layers() if most else [], "predicting errors"):
            weights = self._weights(layer)
            evidence = self._evidence(layer, weights)
            for kind, largest in most.items():
                latent, counts, calibrated = kind
                with leave_out():
                    known = evidence(replace(self.common, calibrate=calibrated))
                    curve = predict_errors(weights, latent, known, largest, counts)
                    predicted[kind].append(curve)
        plans: dict[str, RankPlan] = {}
        for name, each in conversions.items():
            curves = wanted[name]
            if curves is None:
                plans[name] = uniform_plan(model, each)
            elif len(predicted[_kind(each, curves)]) == len(self._layers()):
                own = [c.up_to(curves.most) for c in predicted[_kind(each, curves)]]
                with leave_out():
                    plans[name] = divide(model, each, own)
        for name, plan in plans.items():
            self.shelf.put(f"plan-{name}", _plan_tensors(plan))
        return plans

    def _convert_layer(
        self,
        layer: int,
        conversions: dict[str, ConvertConfig],
        plans: dict[str, RankPlan],
        leave_out: LeaveOut,
    ) -> None:
        weights = self._weights(layer)
        evidence = self._evidence(layer, weights)
        groups = defaultdict[Hashable, dict[str, ConvertConfig]](dict)
        for name, plan in plans.items():
            each = conversions[name]
            groups[_alike(each, plan.rope_pairs[layer])][name] = each
        for group in groups.values():
            with leave_out():
                self._convert_group(layer, group, plans, weights, evidence)

    def _convert_group(
        self,
        layer: int,
        group: dict[str, ConvertConfig],
        plans: dict[str, RankPlan],
        weights: KVWeights,
        evidence: Callable[[ConvertConfig], Evidence],
    ) -> None:
        """Solve a layer once for conversions that are alike in it but for size; cut it for each."""
        first, read = next(iter(group.values())), self.teacher.state_dict().__getitem__
        shapes = {name: layer_shape(each, plans[name], layer) for name, each in group.items()}
        started = perf_counter()
        known = evidence(first) if first.init in DATA_INITS else None
        draws = seeded(first.seed, layer, "init")
        solved = INITS[first.init](weights, _largest(list(shapes.values())), known, draws)
        share = (perf_counter() - started) / len(group)
        for name in group:
            started = perf_counter()
            factors = cut(solved, shapes[name])
            tensors = latent_tensors(factors, read, layer)
            seconds = torch.tensor(share + perf_counter() - started, dtype=torch.float64)
            made = tensors | _branch_tensors(branch_of(factors)) | {_SECONDS: seconds}
            self.shelf.put(_of_layer(name, layer), made)

    def _read_plan(self, name: str) -> RankPlan:
        lists = {field: tuple(t.tolist()) for field, t in self.shelf.get(f"plan-{name}").items()}
        return RankPlan(**lists)


def _unseeded(conversion: ConvertConfig) -> ConvertConfig:
    """Only a random init depends on the seed: calibration has one of its own."""
    return conversion if conversion.init == "random" else replace(conversion, seed=0)


def _name(conversion: ConvertConfig) -> str:
    return digest(to_dict(_unseeded(conversion)))


def _of_layer(name: str, layer: int) -> str:
    return f"converted-{name}-{layer}"


def _kind(conversion: ConvertConfig, curves: Curves) -> _Kind:
    """Conversions of one kind read their sizes off the same predictions."""
    return conversion.latent, curves.pair_counts, conversion.calibrate


def _alike(conversion: ConvertConfig, rope_pairs: int) -> Hashable:
    """Conversions that are alike in a layer but for its size can be cut from one solution."""
    if conversion.init == "random":
        return conversion
    return conversion.init, conversion.latent, conversion.calibrate, rope_pairs


def _largest(shapes: Sequence[LayerShape]) -> LayerShape:
    """The smallest shape that all of these can be cut from."""
    first = shapes[0]
    if first.latent == "joint":
        return max(shapes, key=lambda shape: shape.kv_lora_rank)
    keys, values = (max(sizes) for sizes in zip(*(s.parts() for s in shapes), strict=True))
    return first._replace(kv_lora_rank=keys + values, key_rank=keys)


def _plan_tensors(plan: RankPlan) -> Tensors:
    lists = {
        "kv_lora_rank": plan.kv_lora_rank,
        "rope_pairs": plan.rope_pairs,
        "key_ranks": plan.key_ranks,
    }
    return {field: torch.tensor(sizes, dtype=torch.long) for field, sizes in lists.items()}


def _branch_tensors(branch: Branch) -> Tensors:
    tensors = {"pairs": torch.tensor(branch.pairs, dtype=torch.long)}
    if branch.phases is not None:
        tensors["phases"] = torch.tensor(branch.phases, dtype=torch.float64)
    return tensors


def _take_branch(group: Tensors) -> Branch:
    """The branch that `_branch_tensors` wrote, taken out of a group."""
    phases = group.pop("phases", None)
    pairs = tuple(group.pop("pairs").tolist())
    return Branch(pairs, None if phases is None else _nested(phases))


def _nested(phases: Tensor) -> tuple[tuple[tuple[float, float], ...], ...]:
    return tuple(tuple((a, r) for a, r in head) for head in phases.tolist())
