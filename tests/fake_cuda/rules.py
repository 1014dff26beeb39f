"""The rules that every rank on a GPU keeps. Each returns what breaks it, with file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.fake_cuda.records import Event, Kind, RankRecord

_THE_READ = "lightning_mimo/optim/step_reduction.py"
"""Where the host reads the figures of a step, once."""
_SAMPLES = "lightning_mimo/data/sample_check.py"
"""Where ranks compare their samples in the first batch of every evaluation."""
_COUNTS_OF_EXPERTS = "megatron/core/transformer/moe/token_dispatcher.py"
"""Where the host waits in every layer of experts: only the device knows how many tokens each of them gets."""
_METRICS_OF_LIGHTNING = "lightning/fabric/utilities/apply_func.py"
"""Where Lightning moves the sums of logged metrics to the device, at the first log of an evaluation."""
_IN_FLOAT32 = (
    "megatron/core/transformer/moe/moe_utils.py",
    "lightning_mimo/layers/balancing_loss.py",
    "the backward pass of BmmBackward0",  # of the balancing loss
)
"""Where tokens are routed to experts, which is computed in float32 in any precision."""


def _steady(record: RankRecord) -> list[str]:
    """Phases of all steps but the first, in which ranks learn names of metrics and allocate the optimizer's state."""
    phases = dict.fromkeys(event.phase for event in record.events)
    return [phase for phase in phases if phase.startswith("step ")]


def _validation(record: RankRecord) -> list[str]:
    """Phases of validation: of each of its batches, and of what is between them."""
    return [phase for phase in dict.fromkeys(event.phase for event in record.events) if phase.startswith("validation")]


def _events(record: RankRecord, kind: Kind, phases: Iterable[str]) -> list[Event]:
    wanted = set(phases)
    return [event for event in record.events if event.kind == kind and event.phase in wanted]


def _lines(record: RankRecord, events: Iterable[Event]) -> list[str]:
    counted = Counter((event.kind, event.what, event.where) for event in events)
    return [
        f"rank {record.rank}: {kind}: {what}, {times} times, at {place}"
        for (kind, what, place), times in counted.items()
    ]


def wrong_places(records: Sequence[RankRecord]) -> list[str]:
    """Tensors on a wrong device, in any phase."""
    found = [f"rank {record.rank}: {line}" for record in records for line in record.misplaced]
    return found + [
        line for record in records for line in _lines(record, (e for e in record.events if e.kind == "device"))
    ]


def wrong_dtypes(records: Sequence[RankRecord]) -> list[str]:
    """Computations in a wrong dtype, from the first step on."""
    found = []
    for record in records:
        events = (event for event in record.events if event.kind == "dtype")
        found += _lines(record, (event for event in events if not event.where.startswith(_IN_FLOAT32)))
    return found


def extra_reads(records: Sequence[RankRecord]) -> list[str]:
    """Waits of the host in steps but the one of each, in which it reads the figures of the step."""
    found = []
    for record in records:
        for phase in _steady(record):
            reads = _events(record, "host read", [phase])
            expected = next((event for event in reads if event.where.startswith(_THE_READ)), None)
            if expected is None:
                found.append(f"rank {record.rank}: {phase}: the host does not read the figures of the step")
            others = [event for event in reads if event is not expected]
            found += _lines(record, (event for event in others if _COUNTS_OF_EXPERTS not in event.where))
    return found


def extra_reads_of_evaluation(records: Sequence[RankRecord]) -> list[str]:
    """Waits of the host in a batch of an evaluation but one, apart from the comparison of samples."""
    found = []
    for record in records:
        for phase in _validation(record):
            reads = _events(record, "host read", [phase])
            reads = [e for e in reads if _COUNTS_OF_EXPERTS not in e.where and not e.where.startswith(_SAMPLES)]
            if phase != "validation" and len(reads) > 1:
                found += [f"{phase}: {line}" for line in _lines(record, reads)]
    return found


def slow_copies(records: Sequence[RankRecord]) -> list[str]:
    """Copies to the device in steps and in evaluation that the host waits for."""
    found = []
    for record in records:
        copies = _events(record, "copy to the device", [*_steady(record), *_validation(record)])
        found += _lines(record, (event for event in copies if not event.where.startswith(_METRICS_OF_LIGHTNING)))
    return found


def leaks(records: Sequence[RankRecord]) -> list[str]:
    """Memory that a step leaves behind."""
    found = []
    for record in records:
        if len(set(record.memory[-2:])) > 1:
            places = ", ".join(f"{size} bytes of {place}" for place, size in record.grown.items())
            found.append(f"rank {record.rank}: bytes after each step: {list(record.memory)}; more is alive: {places}")
    return found


def failures(records: Sequence[RankRecord]) -> list[str]:
    """Tracebacks of ranks that raised an exception."""
    return [f"rank {record.rank}:\n{record.error}" for record in records if record.error]
