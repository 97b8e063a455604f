"The reliability campaign at a small count; `python tests/reliability --help` runs it at any."

import pytest
from reliability.__main__ import KINDS
from reliability.artefacts import make_workshop

SEED = 20261121


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "One of each artefact."
    return make_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("kills", 10),
        ("damages", 60),
        ("settings", 400),
        ("combinations", 6),
        ("races", 4),
        ("disks", 4),
    ],
)
def test_everything_holds(shop, kind, count):
    failures = [f"{case}: {failure}" for case, failure in KINDS[kind](shop, count, SEED) if failure]
    assert not failures, "\n".join(failures)
