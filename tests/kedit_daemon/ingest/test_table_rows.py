"""Tables as spreadsheets, pandas, R and databases write them."""

import pytest

from kedit_daemon.ingest.parser import ParsedFile, extract_failed, parse_file
from kedit_daemon.ingest.schemas import FileLimits

LIMITS = FileLimits()


def parsed(text: str | bytes, name: str = "x.csv") -> ParsedFile:
    return parse_file(text if isinstance(text, bytes) else text.encode(), name, None, LIMITS)


def statements(found: ParsedFile) -> list[tuple[str, str]]:
    assert found.problems == []
    return [(fact.subject, fact.target) for _, fact in found.facts]


PLAIN = 'subject,prompt,target\nSnow,"{}, the",back\nIda,{} is,tall\n'
SAME = [
    PLAIN,
    "\ufeff" + PLAIN,
    PLAIN.replace("\n", "\r\n"),
    PLAIN.replace("\n", "\r"),
    "\r\n \n" + PLAIN.replace("\n", "\n\n"),
    "subject;prompt;target\nSnow;{}, the;back\nIda;{} is;tall\n",
    "subject\tprompt\ttarget\nSnow\t{}, the\tback\n\t\t\nIda\t{} is\ttall\n",
    "subject|prompt|target\nSnow|{}, the|back\nIda|{} is|tall",
    "sep=;\nsubject;prompt;target\nSnow;{}, the;back\nIda;{} is;tall\n",
    '"sep=^"\r\nsubject^prompt^target\r\nSnow^{}, the^back\r\nIda^{} is^tall\r\n',
    "SEP=\t\nsubject\tprompt\ttarget\nSnow\t{}, the\tback\nIda\t{} is\ttall\n",
    "sep=,,,\n" + PLAIN,
    'subject,prompt,target,,\nSnow,"{}, the",back,,\n,,,,\nIda,{} is,tall,,\n',
    'subject;prompt;target;\nSnow;"{}, the";back\nIda;{} is;tall;;;\n;;;\n',
    'subject, prompt, target\nSnow, "{}, the", back\nIda, {} is, tall\n',
    ',subject,prompt,target\n0,Snow,"{}, the",back\n1,Ida,{} is,tall\n',
    '"","subject","prompt","target"\n"1","Snow","{}, the","back"\n"2","Ida","{} is","tall"\n',
    'Unnamed: 0.1,Unnamed: 0,subject,prompt,target\n0,0.0,Snow,"{}, the",back\n1,,Ida,{} is,tall\n',
    "\tsubject\tprompt\ttarget\n0\tSnow\t{}, the\tback\n1\tIda\t{} is\ttall\n",
]


@pytest.mark.parametrize("text", SAME)
@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
def test_one_table_in_many_layouts(text: str, codec: str) -> None:
    assert statements(parsed(text.encode(codec))) == [("Snow", "back"), ("Ida", "tall")]


JOINS = [
    ("no-space", ""),
    ("space", " "),
    (" space ", " "),
    ("", None),
    ('" "', None),
    ("null", None),
]


@pytest.mark.parametrize(("cell", "join"), JOINS)
def test_a_join_has_a_name_in_a_table(cell: str, join: str | None) -> None:
    ((_, fact),) = parsed(f"subject,prompt,target,join\nSnow,{{}} is LR,77,{cell}\n").facts
    assert fact.join == join


def test_another_join_is_a_problem_with_its_remedy() -> None:
    found = parsed("subject,prompt,target,join\nSnow,{} is,back,-\nIda,{} is,tall,space\n")
    assert [fact.subject for _, fact in found.facts] == ["Ida"]
    (problem,) = found.problems
    assert (problem.line, problem.problem) == (2, '"join": "-" is no join')
    assert problem.remedy.startswith('write "" or " ", in a table no-space or space')


@pytest.mark.parametrize("name", ["x", "x.txt", "stdin.jsonl"])
def test_a_table_is_known_by_its_first_line(name: str) -> None:
    for text in SAME:
        assert len(statements(parsed(text, name))) == 2


@pytest.mark.parametrize(
    ("text", "line", "problem", "remedy"),
    [
        ("0,Snow,{} is,back", 2, "under a column without a name", "take the value out"),
        ("a,Snow,{} is,back,1", 2, "5 values under 4 columns", "holds a comma"),
        ("a,Snow,{} is", 2, "3 values under 4 columns", "a value under each column"),
    ],
)
def test_values_that_stand_under_no_name(text: str, line: int, problem: str, remedy: str) -> None:
    heading = ",subject,prompt,target" if text[0] == "a" else "subject,,prompt,target"
    text = text if text[0] == "a" else "Snow,0,{} is,back"
    found = parsed(f"{heading}\n{text}\n" + ("7,I,{} is,x" if text[0] == "a" else "I,,{} is,x"))
    [(_, fact)], [told] = found.facts, found.problems
    assert fact.subject == "I" and told.line == line
    assert problem in told.problem and remedy in told.remedy


def test_row_names_that_are_no_numbers_are_told() -> None:
    [told] = parsed(",subject,prompt,target\nrow one,Snow,{} is,back\n").problems
    assert '"row one"' in told.problem


@pytest.mark.parametrize(
    ("separator", "word"), [(";", "a semicolon"), ("\t", "a tab"), ("|", '"|"')]
)
def test_the_remedy_names_the_separator_that_the_table_has(separator: str, word: str) -> None:
    rows = [("subject", "prompt", "target"), ("Snow", "{} is", "a", "b")]
    [told] = parsed("\n".join(map(separator.join, rows))).problems
    assert told.remedy == f"quote each value that holds {word}"


def test_a_table_without_a_heading_is_told_so() -> None:
    [told] = parsed("Snow,{} is,back\nIda,{} is,tall\n").problems
    assert "no known column" in told.problem and "subject,prompt,target" in told.remedy


def test_carriage_returns_among_line_feeds_are_named() -> None:
    [told, *_] = parsed("subject,prompt,target\nA,{} is,x\rB,{} is,y\nC,{} is,z\n").problems
    assert told.line == 2 and told.remedy == "end every line in the same way"


@pytest.mark.parametrize("null", ["", "null", "NULL", "None", "nan", "NaN", "\\N"])
def test_what_tools_write_for_nothing_is_nothing(null: str) -> None:
    heading = "subject,prompt,target,paraphrases,tags,id,source,valid_until"
    [(_, fact)] = parsed(f"{heading}\nNaN,{{}} is,None{f',{null}' * 5}\n").facts
    assert (fact.subject, fact.target) == ("NaN", "None")
    assert (fact.paraphrases, fact.tags, fact.external_id, fact.source) == ((), (), None, None)


def test_lists_in_cells_and_one_that_is_none() -> None:
    rows = [
        "A;{} is;x;['{} was', \"{} isn't\"];a|b",
        'B;{} is;x;"[""{} was; or"", ""{} has""]";[\'c\']',
        "C;{} is;x;[{} was, {} has];",
        "D;{} is;x;[];",
    ]
    found = parsed("subject;prompt;target;paraphrases;tags\n" + "\n".join(rows))
    assert [(fact.paraphrases, fact.tags) for _, fact in found.facts] == [
        (("{} was", "{} isn't"), ("a", "b")),
        (("{} was; or", "{} has"), ("c",)),
        ((), ()),
    ]
    [told] = found.problems
    assert told.line == 4 and told.problem.startswith('"paraphrases": a list')
    assert told.record == rows[2]


@pytest.mark.parametrize("codec", ["utf-8", "utf-16"])
@pytest.mark.parametrize("text", SAME)
def test_failed_rows_come_back_under_their_heading(text: str, codec: str) -> None:
    data = text.replace("tall", "").encode(codec)
    problems = parsed(data).problems
    assert [p.problem for p in problems] == ['"target" is empty']
    again = extract_failed(data, "x.csv", problems)
    assert [(p.problem, p.record) for p in parsed(again).problems] == [
        (problems[0].problem, problems[0].record)
    ]
