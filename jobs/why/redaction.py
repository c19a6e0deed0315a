"""Takes what looks like a secret out of texts that programs and registries wrote. Pure."""

from __future__ import annotations

import re

_NAME = r"[\w.-]*(?:secret|token|passw(?:or)?d|api_?key|access_?key|credential)[\w.-]*"
_PATTERNS = (
    # Logins in URIs, and what signs them.
    (re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^/\s:@]+:[^/\s@]+@"), r"\1***@"),
    (re.compile(r"(?i)\b((?:x-amz-(?:signature|security-token|credential)|sig|signature)=)[^&\s\"']+"),
     r"\1***"),
    (re.compile(r"(?i)\b((?:bearer|basic)\s+)[\w.~+/=-]{8,}"), r"\1***"),
    # Values that names say are secrets: `AWS_SECRET_ACCESS_KEY=...`, `"token": "..."`; behind a
    # colon without quotes only what has a digit, as words of a sentence have none.
    (re.compile(rf"(?i)({_NAME}[\"']?\s*=\s*)([\"']?)[^\s\"',;&]{{6,}}"), r"\1\2***"),
    (re.compile(rf"(?i)({_NAME}[\"']?\s*:\s*)([\"'])[^\"']{{6,}}"), r"\1\2***"),
    (re.compile(rf"(?i)({_NAME}[\"']?\s*:\s*)(?=[^\s\"',;&]*\d)[^\s\"',;&]{{6,}}"), r"\1***"),
    # Values that say by their form that they are keys.
    (re.compile(
        r"(?:AKIA|ASIA)[0-9A-Z]{12,}|hf_\w{8,}|gh[pousr]_\w{8,}|github_pat_\w+|sk-[\w-]{16,}"
        r"|xox[a-z]-[\w-]+|glpat-[\w-]+|eyJ[\w-]{8,}\.[\w-]+[\w.-]*"),
     "***"),
)  # fmt: skip


def redacted(text: str) -> str:
    """The text with `***` for each of them."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text
