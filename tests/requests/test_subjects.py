from editcli.requests.schema import EditRequest
from editcli.requests.subjects import by_subject


def edits(*subjects: str) -> list[EditRequest]:
    return [EditRequest(str(number), "about ", subject, " is", "Rome") for number, subject in enumerate(subjects)]


def test_subjects_that_look_the_same_are_one_group():
    assert by_subject(edits("France", "Italy", "France", "fra\u200bnce", "Fran\u200bce")) == [[0, 2, 4], [1], [3]]


def test_an_edit_without_a_subject_is_alone():
    assert by_subject(edits("", "Rome", "")) == [[0], [1], [2]]
    assert by_subject([]) == []
