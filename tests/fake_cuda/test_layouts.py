"""Every rank of several layouts on a fake GPU, through the Trainer: what a GPU would not like happens nowhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.fake_cuda import matching, rules
from tests.fake_cuda.cases import CASES, EXHAUSTIVE
from tests.fake_cuda.host import Host
from tests.fake_cuda.records import RankRecord

_RULES: dict[str, Callable[[Sequence[RankRecord]], list[str]]] = {
    "all stages run": rules.failures,
    "all tensors on the rank's GPU": rules.wrong_places,
    "all tensors of their dtype": rules.wrong_dtypes,
    "one host read per step": rules.extra_reads,
    "one host read per batch of an evaluation": rules.extra_reads_of_evaluation,
    "all copies pinned and asynchronous": rules.slow_copies,
    "memory returns to its level": rules.leaks,
    "messages match": matching.problems_of,
    "communicators made before the first batch": matching.late_communicators,
}


def _check(host: Host, case: str, rule: str) -> None:
    records = host.run(case)
    if rule != "all stages run" and rules.failures(records):
        pytest.skip("a rank has failed")
    problems = _RULES[rule](records)
    assert not problems, "\n".join([f"{case}: {rule}:", *problems])


@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.parametrize("case", CASES)
def test_case(fake_gpus: Host, case: str, rule: str) -> None:
    _check(fake_gpus, case, rule)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.parametrize("case", EXHAUSTIVE)
def test_further_case(fake_gpus: Host, case: str, rule: str) -> None:
    _check(fake_gpus, case, rule)
