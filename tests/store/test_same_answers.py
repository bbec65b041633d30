"""Whatever is asked of them, all stores give the same answers."""

from __future__ import annotations

import asyncio
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.store.etcd_cluster import EtcdCluster

from transhume.store.address import open_store
from transhume.store.interface import ABSENT, Compare, Store
from transhume.store.memory import MemoryStore

KEYS = ("a", "a/b", "a/c", "b", "ü")


@dataclass(frozen=True)
class Step:
    """One transaction. Each comparison is with the revision that a key had so many steps ago, or `ABSENT`."""

    compares: tuple[tuple[str, int | None], ...]
    puts: dict[str, bytes]
    deletes: frozenset[str]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    touched = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
    cut = draw(st.integers(0, len(touched)))
    compares = st.tuples(st.sampled_from(KEYS), st.sampled_from([None, 0, 0, 0, 1]))
    return Step(
        compares=tuple(draw(st.lists(compares, max_size=2))),
        puts={key: draw(st.binary(max_size=3)) for key in touched[:cut]},
        deletes=frozenset(touched[cut:]),
    )


async def _answers(store: Store, script: Sequence[Step]) -> list[object]:
    """What the store says to each step, with revisions as the number of the step that made them."""
    made_by: dict[int, int] = {ABSENT: -1}
    history: list[dict[str, int]] = [{}]
    answers: list[object] = []
    for number, step in enumerate(script):
        compares = [
            Compare(
                key, ABSENT if back is None else history[max(0, len(history) - 1 - back)].get(key, ABSENT)
            )
            for key, back in step.compares
        ]
        revision = await store.transact(compares, step.puts, sorted(step.deletes))
        if revision is not None:
            made_by[revision] = number
        listed = await store.list("")
        under = [entry.key for entry in await store.list("a/")]
        history.append({entry.key: entry.mod_revision for entry in listed})
        answers.append(
            (
                revision is not None,
                [(entry.key, entry.value, made_by[entry.mod_revision]) for entry in listed],
                under,
            )
        )
    return answers


@pytest.mark.parametrize("kind", ["sqlite", "etcd"])
def test_a_script_of_transactions_has_the_same_answers_everywhere(
    kind: str, request: pytest.FixtureRequest
) -> None:
    etcd: EtcdCluster | None = request.getfixturevalue("etcd") if kind == "etcd" else None

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(steps(), max_size=12))
    def compare(script: list[Step]) -> None:
        async def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                name = uuid.uuid4().hex
                url = f"sqlite://{folder}/{name}" if etcd is None else etcd.url(f"same/{name}")
                store = await open_store(url)
                try:
                    assert await _answers(store, script) == await _answers(MemoryStore(), script)
                finally:
                    await store.close()

        asyncio.run(run())

    compare()
