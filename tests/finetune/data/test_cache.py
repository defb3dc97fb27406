"""Disk cache: one process creates a file while the others wait for it."""

import threading
import time

import numpy as np
import pytest

from finetune.data import cache
from finetune.data.dataset import cached
from finetune.data.report import DataReport


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_pain_22_rows_are_tokenised_once_however_many_processes_want_them():
    made = []

    def encode(report):
        made.append(threading.get_ident())
        time.sleep(0.2)
        report.too_long = 7
        return {"ids": np.arange(5)}

    reports = [DataReport() for _ in range(4)]
    threads = [
        threading.Thread(target=cached, args=("key", encode), kwargs={"cache": True, "report": report})
        for report in reports
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(report.from_cache for report in reports) == [False, True, True, True]
    assert [report.too_long for report in reports] == [7] * 4


def test_the_lock_lies_beside_what_is_kept_and_is_free_again():
    path = cache.cache_file("tokens", "other")
    with cache.made_once(path):
        assert not path.exists()
    with cache.made_once(path):
        assert [file.name for file in path.parents[1].iterdir()] == ["locks"]
