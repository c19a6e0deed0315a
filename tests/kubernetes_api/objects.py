"""What is in a cluster, as an API server keeps it.

Each write has a version; a watch reads what came after one, until it has expired. Server-side apply
knows who has which field. An object with finalizers stays until somebody removes them; deleting
in the foreground waits for what it owns.
"""

from __future__ import annotations

import copy
import re
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.kubernetes_api.schemas import Kind, undeclared, with_defaults, wrong_values

Tree = dict[str, Any]
Path = tuple[str, ...]

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


class Refusal(Exception):  # noqa: N818 - an answer
    """An answer other than 2xx."""

    def __init__(
        self, code: int, reason: str, message: str, *, details: Tree | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status: Tree = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            **({"reason": reason} if reason else {}),
            **({"details": details} if details else {}),
            "code": code,
        }


@dataclass
class Change:
    """One entry of the log that watches read."""

    version: int
    kind: Kind
    type: str
    tree: Tree


@dataclass
class Objects:
    """All objects of a cluster. Every method may be called from any thread."""

    namespaces: set[str] = field(default_factory=lambda: {"default"})
    version: int = 1000
    oldest_version: int = 1000
    """Watches from before it are told that it has expired."""
    changed: threading.Condition = field(default_factory=threading.Condition)
    _trees: dict[tuple[Kind, str, str], Tree] = field(default_factory=dict)
    _owners: dict[str, dict[str, set[Path]]] = field(default_factory=dict)
    """uid -> manager -> the fields that it has."""
    _log: list[Change] = field(default_factory=list)

    # ------------------------------------------------------------------------------- reading

    def get(self, kind: Kind, namespace: str, name: str) -> Tree:
        with self.changed:
            found = self._trees.get((kind, namespace, name))
            if found is None:
                raise not_found(kind, name)
            return copy.deepcopy(found)

    def list(self, kind: Kind, namespace: str, *, labels: str = "", fields: str = "") -> list[Tree]:
        """Those of a namespace; without one, of all."""
        with self.changed:
            return [
                copy.deepcopy(tree)
                for (k, ns, _), tree in sorted(self._trees.items(), key=lambda e: e[0][2])
                if k == kind
                and namespace in (ns, "")
                and is_selected(tree, labels=labels, fields=fields)
            ]

    def changes(self, kind: Kind, namespace: str, *, after: int) -> Iterator[Change]:
        """What came after a version; 410 where that has expired."""
        with self.changed:
            if after < self.oldest_version:
                raise Refusal(
                    410,
                    "Expired",
                    f"too old resource version: {after} ({self.oldest_version})",
                )
            found = [
                c
                for c in self._log
                if c.version > after
                and c.kind == kind
                and (c.type == "BOOKMARK" or c.tree["metadata"].get("namespace", "") == namespace)
            ]
        yield from found

    def expire(self) -> None:
        """Forgets all changes so far, as etcd does after five minutes."""
        with self.changed:
            self.version += 1
            self.oldest_version = self.version
            self._log.clear()

    def bookmark(self, kind: Kind) -> None:
        """Tells those who watch a kind the newest version."""
        with self.changed:
            self.version += 1
            metadata = {"resourceVersion": str(self.version), "creationTimestamp": None}
            tree = {"kind": kind.name, "apiVersion": kind.api_version, "metadata": metadata}
            self._tell(kind, "BOOKMARK", tree)

    # ------------------------------------------------------------------------------- writing

    def create(self, kind: Kind, namespace: str, tree: Tree, *, manager: str = "test") -> Tree:
        with self.changed:
            name = str(tree["metadata"]["name"])
            if (kind, namespace, name) in self._trees:
                raise Refusal(409, "AlreadyExists", f'{kind.resource} "{name}" already exists')
            made = copy.deepcopy(tree)
            if kind.is_namespaced:
                made["metadata"]["namespace"] = namespace
            return self._store(kind, namespace, name, None, made, {manager: leaves(made)})

    def apply(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        tree: Tree,
        *,
        manager: str,
        force: bool,
        is_dry: bool = False,
    ) -> tuple[Tree, bool]:
        """(object, whether it is new) of a server-side apply; nothing is kept of a dry run."""
        with self.changed:
            unknown = undeclared(kind, tree)
            if unknown:
                # Not a 400, whatever the validation asked for: it fails before that.
                raise Refusal(
                    500,
                    "",
                    f"failed to create typed patch object ({namespace}/{name}; "
                    f"{kind.api_version}, Kind={kind.name}): "
                    + "; ".join(f"{path}: field not declared in schema" for path in unknown),
                )
            live = self._trees.get((kind, namespace, name))
            owners = {} if live is None else self._owners[live["metadata"]["uid"]]
            given = leaves(tree)
            others = {m: paths for m, paths in owners.items() if m != manager}
            self._refuse_conflicts(kind, name, live, tree, given, others, force=force)
            made = merged(copy.deepcopy(live) if live else {}, tree)
            made["metadata"]["namespace"] = namespace
            for path in owners.get(manager, set()) - given:
                if not any(path in paths for paths in others.values()):
                    remove(made, path)
            kept = {m: paths - given if force else paths for m, paths in others.items()}
            owned = {**kept, manager: given}
            stored = self._store(kind, namespace, name, live, made, owned, is_dry=is_dry)
            return stored, live is None

    def merge_patch(
        self, kind: Kind, namespace: str, name: str, patch: Tree, *, manager: str
    ) -> Tree:
        with self.changed:
            live = self._trees.get((kind, namespace, name))
            if live is None:
                raise not_found(kind, name)
            unknown = undeclared(kind, patch)
            if unknown:
                told = ", ".join(f'unknown field "{path[1:]}"' for path in unknown)
                raise Refusal(400, "BadRequest", f"strict decoding error: {told}")
            made = merged(copy.deepcopy(live), patch)
            owners = self._owners[live["metadata"]["uid"]]
            given = leaves(patch)
            kept = {m: paths - given for m, paths in owners.items()}
            kept[manager] = kept.get(manager, set()) | given
            return self._store(kind, namespace, name, live, made, kept)

    def set_status(self, kind: Kind, namespace: str, name: str, status: Tree) -> Tree:
        """As the operator does by the subresource `status`: all of it is replaced."""
        with self.changed:
            live = self._trees.get((kind, namespace, name))
            if live is None:
                raise not_found(kind, name)
            made = {**live, "metadata": copy.deepcopy(live["metadata"])}
            made["status"] = copy.deepcopy(status)
            owners = self._owners[live["metadata"]["uid"]]
            return self._store(kind, namespace, name, live, made, owners, is_status=True)

    def set_finalizers(self, kind: Kind, namespace: str, name: str, finalizers: list[str]) -> None:
        """The object goes where it was to be deleted and none is left."""
        with self.changed:
            live = self._trees.get((kind, namespace, name))
            if live is None:
                return
            made = copy.deepcopy(live)
            made["metadata"]["finalizers"] = finalizers
            owners = self._owners[live["metadata"]["uid"]]
            self._store(kind, namespace, name, live, made, owners)
            self._collect()

    def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        propagation: str = "Background",
    ) -> Tree:
        with self.changed:
            live = self._trees.get((kind, namespace, name))
            if live is None:
                raise not_found(kind, name)
            own = live["metadata"]["uid"]
            if uid is not None and uid != own:
                raise Refusal(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {kind.resource} "{name}": the UID in the '
                    f"precondition ({uid}) does not match the UID in record ({own})",
                )
            made = copy.deepcopy(live)
            made["metadata"].setdefault("deletionTimestamp", now())
            finalizers = made["metadata"].setdefault("finalizers", [])
            if propagation == "Foreground" and "foregroundDeletion" not in finalizers:
                finalizers.append("foregroundDeletion")
            self._store(kind, namespace, name, live, made, self._owners[own])
            self._collect()
            return copy.deepcopy(made)

    def _collect(self) -> None:
        """Removes what is to be deleted and held by nobody, and what belonged to it."""
        while True:
            for (kind, namespace, name), tree in self._trees.items():
                metadata = tree["metadata"]
                is_orphan = any(
                    not self._has(owner["uid"]) for owner in metadata.get("ownerReferences", ())
                )
                dying = any(
                    self._is_in_foreground(o["uid"]) for o in metadata.get("ownerReferences", ())
                )
                if (is_orphan or dying) and "deletionTimestamp" not in metadata:
                    metadata["deletionTimestamp"] = now()
                    if dying:
                        metadata.setdefault("finalizers", []).append("foregroundDeletion")
                if "deletionTimestamp" not in metadata:
                    continue
                held = [f for f in metadata.get("finalizers", ()) if f != "foregroundDeletion"]
                if not held and not any(
                    metadata["uid"] in (o["uid"] for o in t["metadata"].get("ownerReferences", ()))
                    for t in self._trees.values()
                    if "foregroundDeletion" in metadata.get("finalizers", ())
                ):
                    self._drop(kind, namespace, name)
                    break
            else:
                return

    def _drop(self, kind: Kind, namespace: str, name: str) -> None:
        tree = self._trees.pop((kind, namespace, name))
        self._owners.pop(tree["metadata"]["uid"])
        self.version += 1
        tree["metadata"]["resourceVersion"] = str(self.version)
        self._tell(kind, "DELETED", tree)

    def _has(self, uid: str) -> bool:
        return uid in self._owners

    def _is_in_foreground(self, uid: str) -> bool:
        return any(
            t["metadata"]["uid"] == uid
            and "foregroundDeletion" in t["metadata"].get("finalizers", ())
            for t in self._trees.values()
        )

    def _store(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        live: Tree | None,
        made: Tree,
        owners: Mapping[str, set[Path]],
        *,
        is_status: bool = False,
        is_dry: bool = False,
    ) -> Tree:
        """Validated, with a new version where anything has changed; a copy of what is stored."""
        if live is None and kind.is_namespaced and namespace not in self.namespaces:
            details = {"name": namespace, "kind": "namespaces"}
            raise Refusal(404, "NotFound", f'namespaces "{namespace}" not found', details=details)
        given = {"status": made["status"]} if is_status else made
        with_defaults(kind, given)
        causes = wrong_values(kind, given)
        if not _NAME.fullmatch(name) or len(name) > 253:
            causes.append(
                {
                    "reason": "FieldValueInvalid",
                    "field": "metadata.name",
                    "message": f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must '
                    "consist of lower case alphanumeric characters, '-' or '.'",
                }
            )
        if causes:
            told = ", ".join(f"{c['field']}: {c['message']}" for c in causes)
            raise Refusal(
                422,
                "Invalid",
                f'{kind.name}.{kind.group} "{name}" is invalid: {told}',
                details={"name": name, "group": kind.group, "kind": kind.name, "causes": causes},
            )
        metadata = made["metadata"]
        if live is None:
            metadata["uid"] = str(uuid.uuid4())
            metadata["creationTimestamp"] = now()
            metadata["generation"] = 1
        elif live.get("spec") != made.get("spec"):
            metadata["generation"] = int(metadata.get("generation", 1)) + 1
        metadata["managedFields"] = [
            {"manager": manager, "operation": "Apply", "fieldsV1": as_fields(paths)}
            for manager, paths in sorted(owners.items())
            if paths
        ]
        if is_dry:
            return copy.deepcopy(made)
        self._owners[metadata["uid"]] = {m: set(paths) for m, paths in owners.items() if paths}
        if live is None or live != made:
            self.version += 1
            metadata["resourceVersion"] = str(self.version)
            self._trees[kind, namespace, name] = made
            self._tell(kind, "ADDED" if live is None else "MODIFIED", made)
        return copy.deepcopy(made)

    def _tell(self, kind: Kind, type_: str, tree: Tree) -> None:
        self._log.append(Change(self.version, kind, type_, copy.deepcopy(tree)))
        self.changed.notify_all()

    @staticmethod
    def _refuse_conflicts(
        kind: Kind,
        name: str,
        live: Tree | None,
        tree: Tree,
        given: set[Path],
        others: Mapping[str, set[Path]],
        *,
        force: bool,
    ) -> None:
        if live is None or force:
            return
        causes = [
            {
                "reason": "FieldManagerConflict",
                "message": f'conflict with "{manager}" using {kind.api_version}',
                "field": "." + ".".join(path),
            }
            for manager, paths in others.items()
            for path in sorted(paths & given)
            if at(live, path) != at(tree, path)
        ]
        if causes:
            told = ", ".join(f"{c['message']}: {c['field']}" for c in causes)
            raise Refusal(
                409,
                "Conflict",
                f"Apply failed with {len(causes)} conflict{'s' * (len(causes) > 1)}: {told}",
                details={"name": name, "kind": kind.plural, "causes": causes},
            )


def not_found(kind: Kind, name: str) -> Refusal:
    details = {"name": name, "group": kind.group, "kind": kind.plural}
    return Refusal(404, "NotFound", f'{kind.resource} "{name}" not found', details=details)


def now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def is_selected(tree: Tree, *, labels: str, fields: str) -> bool:
    """By selectors of equality, and one of a set alone: `key in (a,b)`."""
    own = tree["metadata"].get("labels") or {}
    if of_set := re.fullmatch(r"(\S+) in \(([^)]*)\)", labels):
        return own.get(of_set[1]) in of_set[2].split(",")
    wanted = [part.split("=", 1) for part in labels.split(",") if part]
    if any(own.get(key.rstrip("=")) != value for key, value in wanted):
        return False
    pairs = [part.split("=", 1) for part in fields.split(",") if part]
    return all(at(tree, tuple(key.split("."))) == value for key, value in pairs)


def leaves(tree: Mapping[str, Any], path: Path = ()) -> set[Path]:
    """Paths of the fields that somebody has by writing a tree; lists count as one field."""
    found: set[Path] = set()
    for key, value in tree.items():
        inner = (*path, key)
        if inner in _OF_ALL:
            continue
        if isinstance(value, dict) and value:
            found |= leaves(value, inner)
        else:
            found.add(inner)
    return found


_OF_ALL = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace"), ("status",)}


def as_fields(paths: set[Path]) -> Tree:
    """Paths in the form of `fieldsV1`."""
    found: Tree = {}
    for path in sorted(paths):
        inner = found
        for part in path:
            inner = inner.setdefault(f"f:{part}", {})
    return found


def at(tree: Any, path: Path) -> Any:
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def remove(tree: Any, path: Path) -> None:
    *parents, last = path
    for part in parents:
        tree = tree.get(part)
        if not isinstance(tree, dict):
            return
    tree.pop(last, None)


def merged(old: Tree, new: Mapping[str, Any]) -> Tree:
    """`new` over `old`, which is changed: maps are joined, all else is replaced, null removes."""
    for key, value in new.items():
        if key == "status" and "status" in old:
            continue  # a subresource of its own
        if value is None:
            old.pop(key, None)
        elif isinstance(value, dict):
            inner = old.get(key)
            old[key] = merged(inner if isinstance(inner, dict) else {}, value)
        else:
            old[key] = copy.deepcopy(value)
    return old
