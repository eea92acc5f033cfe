"""Describes the faults of a record that fits no form, each with a remedy that mends it."""

import difflib
from collections.abc import Mapping, Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from kedit_daemon.ingest.field_types import TIME_REMEDY, quote_value
from kedit_daemon.ingest.schemas import NativeRecord, NeighbourRecord

MAX_FAULTS_SHOWN = 3
TYPE_NAMES = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    str: "a string",
}
COLUMNS_REMEDY = 'write one object for each fact: in pandas, to_json(…, orient="records")'
OBJECT_REMEDIES = {
    "neighbours": 'write {"prompt": "…", "answer": "…"} in its place',
    "requested_rewrite": 'write {"prompt": …, "subject": …, "target_new": {"str": …}} in its place',
}
LIST_REMEDIES = {"neighbours": 'write a list of objects, such as [{"prompt": "…"}]'}


def explain_faults(error: ValidationError, record: Mapping[str, object]) -> tuple[str, str]:
    """Describe the first few faults in one sentence each, and their remedies."""
    if all(isinstance(record.get(key), dict | list) for key in ("subject", "prompt")):
        return "the record holds columns instead of one fact", COLUMNS_REMEDY
    faults = error.errors(include_url=False)[:MAX_FAULTS_SHOWN]
    problems, remedies = zip(*(_explain_fault(fault, record) for fault in faults), strict=True)
    # One remedy may serve several faults.
    return "; ".join(problems), "; ".join(dict.fromkeys(remedies))


def _explain_fault(fault: ErrorDetails, record: Mapping[str, object]) -> tuple[str, str]:
    steps = _locate(fault["loc"], record)
    where = quote_value(".".join(steps)) if steps else "the record"
    kind = _name_type(fault["input"])
    field, last = (steps[0], steps[-1]) if steps else ("", "")
    match fault["type"]:
        case "missing":
            return f"{where} is missing", f"add {quote_value(last)}"
        case "extra_forbidden":
            return f"unknown key {where}", _suggest_key(last, nested=len(steps) > 1)
        case "string_too_short" | "too_short":
            is_optional = field in NativeRecord.model_fields and (
                len(steps) > 1 or not NativeRecord.model_fields[field].is_required()
            )
            rest = "take it out" if is_optional else "leave the record out"
            return f"{where} is empty", f"fill it in, or {rest}"
        case "string_unicode":
            return f"{where} holds half a surrogate pair", "take that character out"
        case "string_type":
            return f"{where} must be a string, not {kind}", _suggest_text(steps, fault["input"])
        case "list_type":
            remedy = "put the value in [ ]" if kind == "a string" else 'write a list: ["a", "b"]'
            return f"{where} must be a list, not {kind}", LIST_REMEDIES.get(field, remedy)
        case "model_type" | "dict_type":
            remedy = OBJECT_REMEDIES.get(field, "write an object in its place")
            return f"{where} must be an object, not {kind}", remedy
    context = fault.get("ctx", {})
    problem = str(context.get("problem", fault["msg"]))
    return f"{where}: {problem}" if steps else problem, str(context.get("remedy", ""))


def _locate(location: Sequence[str | int], record: object) -> list[str]:
    """Return the steps to a value that the record has; one answer is also a list of answers."""
    steps: list[str] = []
    value = record
    for step in location:
        if isinstance(step, int):
            if not isinstance(value, list) or step >= len(value):
                break
            value = value[step]
        else:
            value = value.get(step) if isinstance(value, dict) else None
        steps.append(str(step))
    return steps


def _name_type(value: object) -> str:
    return next((name for kind, name in TYPE_NAMES.items() if isinstance(value, kind)), "null")


def _suggest_text(steps: list[str], value: object) -> str:
    """Suggest what to write for a value that should be a text."""
    if steps[-1] in ("valid_from", "valid_until"):
        return TIME_REMEDY
    if value is None:
        return "take it out of the list" if steps[-1].isdigit() else "write a text in its place"
    if isinstance(value, list):
        return "write one text in its place"
    if isinstance(value, dict):
        return "write the text alone in its place, without { }"
    if steps[-1] == "prompt":
        return "write a text with {} for the subject in its place"
    return "put the value in quotes"


def _suggest_key(key: str, nested: bool) -> str:
    known = list((NeighbourRecord if nested else NativeRecord).model_fields)
    near = difflib.get_close_matches(key, known, 1)
    return f'did you mean "{near[0]}"?' if near else f"take it out; the keys are {', '.join(known)}"
