"""Count every network that a report names again, and write the counts down."""

import json
from unittest import mock

from uvit_repro.config import PROTOCOLS
from uvit_repro.report import appendix
from uvit_repro.report.evidence import read_evidence
from uvit_repro.runs import counting


def count_sizes(
    known: dict,  # counts that are taken as they are
) -> dict:  # run id of the bare experiment: parameters, multiply-accumulates
    "The counts of all networks, from the networks."
    sizes = {}

    def record(exp):
        exp = counting.bare(exp)
        sizes[exp.run_id] = known.get(exp.run_id) or list(counting.count_network(exp))
        return sizes[exp.run_id]

    with mock.patch.object(counting, "_size", record):
        appendix.counts.__wrapped__()
        for way in ("tmsa", "adaln_zero"):
            appendix.time_parameters(way)
        appendix.cost_rows(read_evidence("published"))
        for exp in PROTOCOLS.values():
            counting.params_of(exp)
    return dict(sorted(sizes.items()))


if __name__ == "__main__":
    lines = [f" {json.dumps(name)}: {json.dumps(size)}" for name, size in count_sizes({}).items()]
    counting.SIZES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
