"""``kvtier inspect``: what a store of saved sequences holds. Loads no model and reads no tensor."""

import os
from typing import Any

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.library import Entry, Library


def describe_store(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``kvtier inspect --json`` prints; raises StoreError if ``path`` is no store.

    A sequence whose record cannot be read has its reason under ``problem``; only its id is known then, and the rest is
    None. ``parts``: ids of the sequences whose chunks it refers to, and without which it cannot be opened.
    """
    store = Library(path)
    sequences = [_describe(entry) for entry in store.entries()]
    return {"store": str(store.path), "sequences": sequences}


def _describe(entry: Entry) -> dict[str, Any]:
    known = entry.problem is None
    a = entry.attributes
    model = a.get("model", {})
    settings = {name: value for name, value in a.get("fixed", {}).items() if value is not None}
    return {
        "id": entry.id,
        "tokens": entry.tokens if known else None,
        "complete": entry.commit.complete if entry.commit else None,
        "parts": [id for id, _ in a.get("parts", [])],
        "bytes": entry.nbytes if known else None,
        "model": model.get("name"),
        "model_class": model.get("class"),
        "created": a.get("created"),
        "dtype": settings.pop("dtype", None),
        "select": a.get("select"),
        "settings": settings,
        "problem": entry.problem,
    }


def table(report: dict[str, Any]) -> str:
    """The same for people, a line per sequence."""
    sequences = report["sequences"]
    if not sequences:
        return f"{report['store']} holds no saved sequence"
    lines = [f"{'id':<14}{'tokens':>12}{'bytes':>13}  {'created (UTC)':<18}model"]
    for s in sequences:
        if s["problem"]:
            lines.append(f"{s['id']:<14}damaged: {s['problem']}")
            continue
        created = s["created"][:16].replace("T", " ")
        notes = ["" if s["complete"] else "not complete", ", ".join(s["parts"]) and f"needs {', '.join(s['parts'])}"]
        note = "".join(f", {note}" for note in notes if note)
        lines.append(f"{s['id']:<14}{s['tokens']:>12,}{format_bytes(s['bytes']):>13}  {created:<18}{s['model']}{note}")
    return "\n".join(lines)
