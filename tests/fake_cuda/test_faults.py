"""Each rule is broken once, on purpose: the report names the file and the line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.fake_cuda import matching, rules
from tests.fake_cuda.host import Host
from tests.fake_cuda.records import RankRecord

_Rule = Callable[[Sequence[RankRecord]], list[str]]

_FAULTS: dict[str, tuple[str, _Rule]] = {
    "read": ("careless", rules.extra_reads),
    "copy": ("careless", rules.slow_copies),
    "dtype": ("careless", rules.wrong_dtypes),
    "leak": ("careless", rules.leaks),
    "barrier": ("barrier", rules.failures),
    "device": ("tensor on the CPU", rules.wrong_places),
    "other device": ("other order", rules.wrong_places),
    "size": ("other order", matching.problems_of),
    "order": ("circle", matching.problems_of),
    "communicator": ("other order", matching.late_communicators),
}
"""Mark of a line in ``faults.py`` -> the case in which it is run, and the rule that it breaks."""


def _line(fault: str) -> str:
    """``file:number`` of the line that is marked with a fault."""
    lines = (Path(__file__).parent / "faults.py").read_text().splitlines()
    (number,) = (number for number, line in enumerate(lines, start=1) if line.endswith(f"# fault: {fault}"))
    return f"tests/fake_cuda/faults.py:{number} "


@pytest.mark.parametrize("fault", _FAULTS)
def test_fault_is_named(fake_gpus: Host, fault: str) -> None:
    case, rule = _FAULTS[fault]
    problems = rule(fake_gpus.run(case))
    assert any(_line(fault) in problem for problem in problems), (problems, rules.failures(fake_gpus.run(case)))
