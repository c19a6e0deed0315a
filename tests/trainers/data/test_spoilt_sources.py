"""What `shoal prepare` takes from an object store is what the store holds, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from cluster.embedded import EmbeddedStore
from cluster.storage import Store, join_uri
from jobs.errors import EnvironmentFault
from jobs.spec import StoreAccess
from tests.faulty_proxy import FaultyProxy, proxy_to
from trainers.data.sources import Source, SourceChoice, open_source

ROWS: list[dict[str, Any]] = [
    {"text": f"the film number {n} was {'fine' if n % 3 else 'dull'}", "label": n % 2}
    for n in range(400)
]


def rows_of(source: Source) -> list[dict[str, Any]]:
    batches = source.batches(source.schema.names)
    return pa.concat_tables([batch.table for batch in batches]).to_pylist()


def write(path: Path) -> Path:
    if path.suffix == ".csv":
        pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100)
    return path


def opened(proxy: FaultyProxy, store: Store) -> Source:
    access = StoreAccess(endpoint_url=proxy.url)
    return open_source(SourceChoice(uri=join_uri(store.uri, "raw"), access=access))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_tables_are_read_as_they_are(
    object_store: EmbeddedStore, s3_store: Store, tmp_path: Path, name: str
) -> None:
    s3_store.upload(f"raw/{name}", write(tmp_path / name))
    with proxy_to(object_store.endpoint_url) as proxy:
        source = opened(proxy, s3_store)
        proxy.fail("corrupt answer", "GET", name, times=2)
        assert rows_of(source) == ROWS
        assert proxy.injected["corrupt answer"] == 2


def test_images_are_read_as_they_are(object_store: EmbeddedStore, s3_store: Store) -> None:
    images = {f"{label}/{n}.png": bytes([n]) * 500 for label in ("cat", "dog") for n in range(4)}
    for name, data in images.items():
        s3_store.write(f"raw/{name}", data)
    with proxy_to(object_store.endpoint_url) as proxy:
        source = opened(proxy, s3_store)
        proxy.fail("corrupt answer", "GET", ".png", times=5)
        found = [row["image"] for row in rows_of(source)]
        assert {image["path"]: image["bytes"] for image in found} == images
        assert proxy.injected["corrupt answer"] == 5


def test_a_disk_without_room_for_a_file_is_told(
    object_store: EmbeddedStore, s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_store.upload("raw/rows.csv", write(tmp_path / "rows.csv"))
    source = open_source(SourceChoice(uri=join_uri(s3_store.uri, "raw"), access=StoreAccess()))
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(EnvironmentFault, match=r"1000 bytes free, but s3://.*/raw/rows\.csv has"):
        rows_of(source)
