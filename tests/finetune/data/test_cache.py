"""Disk cache: one process creates a file while the others wait for it."""

import threading
import time

import numpy as np
import pytest

from finetune.data import cache
from finetune.data.dataset import load_or_encode
from finetune.data.report import DataReport


@pytest.fixture(autouse=True)
def _isolated_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_pain_22_concurrent_processes_tokenize_rows_once():
    made = []

    def encode(report):
        made.append(threading.get_ident())
        time.sleep(0.2)
        report.num_too_long = 7
        return {"ids": np.arange(5)}

    reports = [DataReport() for _ in range(4)]
    threads = [
        threading.Thread(
            target=load_or_encode, args=("key", encode), kwargs={"cache": True, "report": report}
        )
        for report in reports
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(report.from_cache for report in reports) == [False, True, True, True]
    assert [report.num_too_long for report in reports] == [7] * 4


def test_the_lock_file_is_outside_the_cache_folder_and_released():
    path = cache.cache_path("tokens", "other")
    with cache.cache_lock(path):
        assert not path.exists()
    with cache.cache_lock(path):
        assert [file.name for file in path.parents[1].iterdir()] == ["locks"]
