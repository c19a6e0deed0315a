"""Words that mean the same, from a file of the user's.

Two formats: lines of words that all mean the same, with commas between them and # before comments
(as Solr and Elasticsearch read them), and MyThes thesauri (LibreOffice; Debian's mythes-en-us):
the encoding, then `word|n` and n lines of `(noun)|synonym|synonym`.
"""

from __future__ import annotations

import re
from pathlib import Path

from cluster.storage import ObjectMissing, is_s3, open_store, split_uri
from jobs.errors import Problem, SpecError
from jobs.spec import JobSpec

Synonyms = dict[str, list[str]]

_ENTRY = re.compile(r"(.+)\|(\d+)")
_NOTE = re.compile(r"\s*\([^)]*\)$")


def read_synonyms(spec: JobSpec) -> Synonyms:
    """Other words for a word, in the order of the job's file; SpecError where it cannot be read."""
    name = spec.task.augment.synonyms_file if spec.task.augment is not None else None
    if name is None:
        return {}
    try:
        data = _read(name, spec)
        found = parse_synonyms(data)
    except (OSError, ObjectMissing, UnicodeDecodeError, LookupError) as error:
        raise SpecError(
            Problem(
                f"task.augment.synonyms_file is {name}, which cannot be read: {error}",
                "name a text file that all workers have, or put it into the store",
            )
        ) from error
    if not found:
        raise SpecError(
            Problem(
                f"task.augment.synonyms_file is {name}, which has no words that mean the same",
                "write lines such as: big, large, huge",
            )
        )
    return found


def _read(name: str, spec: JobSpec) -> bytes:
    if not is_s3(name):
        return Path(name).expanduser().read_bytes()
    folder, key = split_uri(name)
    return open_store(folder, spec.data.access).read(key)


def parse_synonyms(data: bytes) -> Synonyms:
    """The synonyms of a file's content, in either format."""
    first, _, rest = data.partition(b"\n")
    encoding = first.strip().decode("ascii", errors="replace")
    if b"," not in first and b"|" in rest.partition(b"\n")[0]:
        return _of_thesaurus(rest.decode(encoding))
    found: Synonyms = {}
    for line in data.decode("utf-8").splitlines():
        words = [word.strip() for word in line.partition("#")[0].split(",") if word.strip()]
        for word in words:
            _add(found, word, words)
    return found


def _of_thesaurus(text: str) -> Synonyms:
    found: Synonyms = {}
    lines = iter(text.splitlines())
    for line in lines:
        entry = _ENTRY.fullmatch(line.strip())
        if entry is None:
            continue
        for _ in range(int(entry[2])):
            words = [_NOTE.sub("", word).strip() for word in next(lines, "").split("|")[1:]]
            _add(found, entry[1], [word for word in words if word])
    return found


def _add(found: Synonyms, word: str, others: list[str]) -> None:
    new = [other for other in others if other != word and other not in found.get(word, ())]
    if new:
        found.setdefault(word, []).extend(new)
