"""``kvtier inspect``: what a store of saved sequences holds. Loads no model and reads no tensor."""

import os
from typing import Any

from kvtier.runtime.budget import format_bytes
from kvtier.runtime.library import Entry, Library


def describe_store(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``kvtier inspect --json`` prints; raises StoreError if ``path`` is no store.

    A sequence whose record cannot be read has its reason under ``problem``; only its id is known then, and the rest is
    None. ``text_tokens``: of the whole text, also while a sequence holds its beginning alone; None: not known.
    ``parts``: ids of the sequences whose chunks it refers to, and without which it cannot be opened. ``replaced``:
    folders of what it was before it was written anew, which are kept until it is complete.
    """
    store = Library(path)
    sequences = [_describe(store, entry) for entry in store.entries()]
    return {"store": str(store.path), "sequences": sequences}


def _describe(store: Library, entry: Entry) -> dict[str, Any]:
    known = entry.problem is None
    a = entry.attributes
    model = a.get("model", {})
    settings = {name: value for name, value in a.get("fixed", {}).items() if value is not None}
    return {
        "id": entry.id,
        "tokens": entry.tokens if known else None,
        "text_tokens": a.get("text_tokens"),
        "complete": entry.commit.complete if entry.commit else None,
        "parts": [id for id, _ in a.get("parts", [])],
        "replaced": [str(folder) for folder in store.replaced(entry.id)],
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
        else:
            created, nbytes = s["created"][:16].replace("T", " "), format_bytes(s["bytes"])
            lines.append(f"{s['id']:<14}{s['tokens']:>12,}{nbytes:>13}  {created:<18}{s['model']}{_note(s)}")
        lines += [f"  written anew; until that is complete, what it was is kept in {path}" for path in s["replaced"]]
    if any(s["problem"] for s in sequences):
        lines.append(
            "what is damaged is kept: put back a copy of its folder, or read and save the same text again, which "
            "replaces it (`kvtier verify` lists all damage)"
        )
    return "\n".join(lines)


def _note(sequence: dict[str, Any]) -> str:
    notes = []
    if not sequence["complete"]:
        of = sequence["text_tokens"]
        notes.append("not complete" + (f": {sequence['tokens']:,} of {of:,} tokens" if of else ""))
    if sequence["parts"]:
        notes.append(f"needs {', '.join(sequence['parts'])}")
    return "".join(f", {note}" for note in notes)
