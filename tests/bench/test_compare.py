"""``fusedopt bench compare``: regressions beyond the scatter, counts, failures, warnings."""

import io
import json

import pytest
from rich.console import Console

from fusedopt.bench.compare import compare, load, print_changes, warnings

NAMES = {"workload": "tiny", "optimizer": "adamw", "format": "fp32", "contract": "step", "library": "fusedopt-cuda"}


def row(gpu_ms=10.0, scatter=0.02, **changes):
    figures = {"gpu_ms": gpu_ms, "gpu_ms_q1": gpu_ms - scatter / 2, "gpu_ms_q3": gpu_ms + scatter / 2}
    return NAMES | figures | {"wall_ms": None, "host_ms": None, "launches": 1, "error": None, "skipped": None} | changes


def result(*rows, **facts):
    return {"device": "H100", "torch": "2.11", "rows": list(rows)} | facts


def verdicts(before, after, tolerance=None):
    changes, _ = compare(result(before), result(after), tolerance)
    return {change.figure: change.verdict for change in changes}


def test_a_slower_median_is_a_regression():
    assert verdicts(row(10.0), row(10.5))["gpu_ms"] == "slower"
    assert verdicts(row(10.5), row(10.0))["gpu_ms"] == "faster"


def test_what_both_runs_scatter_is_not():
    assert verdicts(row(10.0, scatter=0.3), row(10.5, scatter=0.3))["gpu_ms"] == "same"
    assert verdicts(row(10.0, scatter=0.2), row(10.5, scatter=0.2))["gpu_ms"] == "slower"


def test_a_change_within_the_tolerance_is_not():
    assert verdicts(row(10.0, scatter=0.0), row(10.05, scatter=0.0))["gpu_ms"] == "same"
    assert verdicts(row(10.0, scatter=0.0), row(10.05, scatter=0.0), tolerance=0.001)["gpu_ms"] == "slower"
    assert verdicts(row(10.0), row(10.5), tolerance=0.1)["gpu_ms"] == "same"


def test_files_without_quartiles_are_compared_by_their_ranges():
    old = row(10.0, gpu_ms_min=9.7, gpu_ms_max=10.3)
    del old["gpu_ms_q1"], old["gpu_ms_q3"]
    assert verdicts(old, row(10.5))["gpu_ms"] == "same"
    assert verdicts(old, row(10.7))["gpu_ms"] == "slower"


def test_more_launches_or_bytes_are_regressions():
    assert verdicts(row(launches=1), row(launches=2))["launches"] == "slower"
    assert verdicts(row(launches=2), row(launches=1))["launches"] == "faster"
    assert verdicts(row(state_bytes=1000), row(state_bytes=1100))["state_bytes"] == "slower"
    assert verdicts(row(state_bytes=0), row(state_bytes=0))["state_bytes"] == "same"


def test_a_row_that_fails_now_is_a_regression():
    changes, _ = compare(result(row()), result(row(error="OutOfMemoryError")))
    assert [change.verdict for change in changes] == ["failed"] and changes[0].is_regression
    assert compare(result(row(error="x")), result(row()))[0] == []


def test_rows_that_only_one_has_are_named():
    changes, only = compare(result(row(), row(library="apex")), result(row(), row(library="optimi")))
    assert {change.row for change in changes} == {"tiny/adamw/fp32/step/fusedopt-cuda"}
    assert only == ["tiny/adamw/fp32/step/apex: only in the first", "tiny/adamw/fp32/step/optimi: only in the second"]


def test_different_devices_and_versions_warn():
    found = warnings(result(), result(device="A100", torch="2.12"))
    assert found[0].startswith("different device: H100 and A100: times of different devices")
    assert found[1] == "different torch: 2.11 and 2.12"
    assert warnings(result(), result()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "is no JSON"), ("[]", 'has no "rows"'), ('{"rows": 3}', 'has no "rows"')],
)
def test_bad_files_are_explained(tmp_path, text, message):
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_good_file_is_loaded(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result(row())))
    assert load(path) == result(row())


def test_changes_are_shown_with_their_verdict():
    """Those of failed rows without figures, and what is the same only on request."""
    before, after = result(row(), row(library="apex"), row(library="x")), result(row(11.0), row(library="apex"))
    after["rows"].append(row(library="x", error="OutOfMemoryError"))
    changes, _ = compare(before, after)
    text = {}
    for every in (False, True):
        out = io.StringIO()
        print_changes(Console(file=out, width=200), changes, every)
        text[every] = out.getvalue()
    assert "+10.0%" in text[False] and "REGRESSION" in text[False] and "FAILS NOW" in text[False]
    assert "apex" not in text[False] and "apex" in text[True]
    out = io.StringIO()
    print_changes(Console(file=out), [], False)
    assert out.getvalue() == ""
