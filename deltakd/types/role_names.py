"""The models of a run, by role."""

from __future__ import annotations

import re

STUDENT = "student"
TEACHER = "teacher"
TEACHER_RAW = "teacher_raw"
STUDENT_RAW = "student_raw"
#: The roles of Delta-KD. Further (teacher, raw teacher) pairs are numbered: ``teacher_2``, ``teacher_raw_2``, ...
ROLES = (STUDENT, TEACHER, TEACHER_RAW, STUDENT_RAW)
_NUMBERED = re.compile(r"teacher(_raw)?_([2-9]|[1-9]\d+)")


def is_reference_role(name: str) -> bool:
    """Return True if a loss may ask for a frozen model of this name."""
    return name in ROLES[1:] or _NUMBERED.fullmatch(name) is not None


def is_teacher(role: str) -> bool:
    """Return True for ``teacher``, ``teacher_2``, ...; False for their raw models and for other roles."""
    return role == TEACHER or (role.startswith(f"{TEACHER}_") and not role.startswith(TEACHER_RAW))


def teacher_pair(number: int) -> tuple[str, str]:
    """Return the roles (teacher, raw teacher) of a pair, counted from 1; the first pair's roles have no number."""
    suffix = "" if number == 1 else f"_{number}"
    return TEACHER + suffix, TEACHER_RAW + suffix


def pair_number(role: str) -> int | None:
    """Return the number of the pair of a teacher or a raw teacher, from 1; None for every other role."""
    found = _NUMBERED.fullmatch(role)
    return 1 if role in (TEACHER, TEACHER_RAW) else int(found[2]) if found is not None else None


def raw_role_of(role: str) -> str | None:
    """Return the raw teacher of a teacher's pair; None for every other role."""
    found = _NUMBERED.fullmatch(role)
    if role == TEACHER or (found is not None and found[1] is None):
        return role.replace(TEACHER, TEACHER_RAW)
    return None
