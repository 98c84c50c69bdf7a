"""Metrics: several processes are added up, a part that is restarted counts on, labels stay few."""

import re
import subprocess
import sys
import time

import pytest

from dicomscp.telemetry import metrics
from dicomscp.telemetry.refusals import Refusals, recent


@pytest.fixture
def directory(tmp_path):
    directory = tmp_path / "metrics"
    metrics.clean(directory)
    return directory


def run(directory, part, script):
    begin = (
        "from pathlib import Path; from dicomscp.telemetry import metrics as m; "
        f"m.share(Path({str(directory)!r}), {part!r})\n"
    )
    subprocess.run([sys.executable, "-c", begin + script], check=True, timeout=30)


def sample(directory, name):
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", metrics.exposition(directory).decode(), re.MULTILINE)
    return float(value)


def test_processes_are_added_up(directory):
    run(directory, "listener-0", "m.ListenerMetrics().received('CT1', 100, 0.002)")
    run(directory, "listener-1", "m.ListenerMetrics().received('CT1', 50, 0.3)")

    assert sample(directory, 'dicomscp_received_instances_total{calling_ae="CT1"}') == 2
    assert sample(directory, 'dicomscp_received_bytes_total{calling_ae="CT1"}') == 150
    assert sample(directory, 'dicomscp_store_seconds_bucket{le="0.005"}') == 1
    assert sample(directory, "dicomscp_store_seconds_count") == 2


def test_a_part_that_is_restarted_counts_on_and_forgets_what_was_open(directory):
    run(directory, "listener-0", "l = m.ListenerMetrics(); l.opened(); l.opened()")
    assert sample(directory, "dicomscp_open_associations") == 2
    files = sorted(directory.iterdir())

    run(directory, "listener-0", "l = m.ListenerMetrics(); l.opened()")

    assert sample(directory, "dicomscp_open_associations") == 1
    assert sample(directory, "dicomscp_accepted_associations_total") == 3
    assert sorted(directory.iterdir()) == files


def test_what_a_part_that_ended_had_open_can_be_forgotten(directory):
    run(directory, "listener-0", "m.ListenerMetrics().opened()")
    run(directory, "listener-1", "m.ListenerMetrics().opened()")

    metrics.forget(directory, "listener-0")

    assert sample(directory, "dicomscp_open_associations") == 1
    assert sample(directory, "dicomscp_accepted_associations_total") == 2


def test_calling_ae_titles_are_bounded(directory):
    run(directory, "listener-0", "l = m.ListenerMetrics()\nfor n in range(1000): l.received(f'AE{n}', 1, 0)")

    text = metrics.exposition(directory).decode()
    assert len(re.findall(r"^dicomscp_received_instances_total\{", text, re.MULTILINE)) == 65
    assert sample(directory, 'dicomscp_received_instances_total{calling_ae="other"}') == 1000 - 64


def test_the_pipeline_says_how_things_stand(directory):
    run(
        directory,
        "pipeline",
        """
p = m.PipelineMetrics()
p.applied(3); p.published(0.2); p.failed(); p.sync_failed()
p.now(lag_bytes=5, due=2, set_aside=1, disk_free_bytes=10**12)
""",
    )

    assert sample(directory, "dicomscp_indexed_instances_total") == 3
    assert sample(directory, "dicomscp_journal_lag_bytes") == 5
    assert sample(directory, "dicomscp_due_studies") == 2
    assert sample(directory, "dicomscp_set_aside_studies") == 1
    assert sample(directory, "dicomscp_disk_free_bytes") == 1e12
    assert sample(directory, "dicomscp_publish_seconds_count") == 1
    assert sample(directory, "dicomscp_sync_errors_total") == 1


def test_refusals_and_rejections_are_counted_by_why(directory):
    run(
        directory,
        "listener-0",
        "l = m.ListenerMetrics(); l.refused('busy', 'full'); l.rejected('limit', 'limit: 4'); "
        "l.opened(); l.ended(released=False)",
    )

    assert sample(directory, 'dicomscp_refused_instances_total{kind="busy"}') == 1
    assert sample(directory, 'dicomscp_rejected_associations_total{reason="limit"}') == 1
    assert sample(directory, "dicomscp_aborted_associations_total") == 1
    assert sample(directory, "dicomscp_open_associations") == 0


def test_a_clean_directory_begins_at_zero(directory):
    run(directory, "listener-0", "m.ListenerMetrics().opened()")

    metrics.clean(directory)

    assert metrics.exposition(directory) == b""


def test_without_a_directory_metrics_live_in_the_process():
    metrics.InboxMetrics().quarantined()
    metrics.InboxMetrics().received("", 1, 0.1)


def test_a_part_with_an_underscore_would_be_misread(directory):
    with pytest.raises(ValueError, match="underscore"):
        metrics.share(directory, "a_b")


def test_what_each_ae_sent_is_told_over_all_processes(directory):
    for part, calls in (
        ("listener-0", "received('CT1', 100, 0.1); l.received('CT1', 100, 0.1); l.refused('busy', 'full')"),
        ("listener-1", "received('CT1', 50, 0.1); l.received('MR', 7, 0.1); l.rejected('limit', 'limit: 4')"),
    ):
        run(directory, part, f"l = m.ListenerMetrics(); l.{calls}")

    counted = metrics.counted(directory)

    assert {ae: one[:2] for ae, one in counted.received.items()} == {"CT1": (3, 250), "MR": (1, 7)}
    assert all(abs(one.last_at - time.time()) < 60 for one in counted.received.values())
    assert (counted.refused, counted.rejected) == ({"busy": 1}, {"limit": 1})


def test_a_refusal_is_counted_and_noted_with_its_reason(tmp_path):
    noting = Refusals(tmp_path / "listener-0")
    counting = metrics.ListenerMetrics(noting)
    counting.refused("mismatch", "not what was claimed", calling_ae="CT1", address="10.0.0.1")
    counting.rejected("limit", "limit: 4", calling_ae="CT2", address="10.0.0.2")
    noting.close()

    noted = {one[:4] for one in recent(tmp_path, 10)}

    assert noted == {
        ("CT1", "10.0.0.1", "mismatch", "not what was claimed"),
        ("CT2", "10.0.0.2", "rejected", "limit: 4"),
    }
