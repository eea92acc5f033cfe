# ruff: noqa: RUF001  (people write names with these letters and signs)

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memory.side.subject_matcher import Mention, SubjectMatcher, names_subject, normalize_text


def knows(**names: str | tuple[str, ...]) -> SubjectMatcher:
    """A matcher of facts by their ids, with a name or several for each."""
    known = SubjectMatcher()
    for fact_id, name in names.items():
        known.add_names(fact_id, (name,) if isinstance(name, str) else name)
    return known


def is_named(text: str, *names: str) -> bool:
    return knows(it=names).find_named_facts(text) == {"it"}


def said(known: SubjectMatcher, text: str) -> list[str]:
    return [text[mention.start : mention.end] for mention in known.find_mentions(text)]


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Who leads Denmark?", "Denmark"),
        ("DENMARK is led by", "Denmark"),
        ("who leads denmark", "Denmark"),
        ("Denmarks, then Denmark", "Denmark"),
        ("the  United\nKingdom's leader", "United Kingdom"),
        ("the ＳＯＮＹ　Ｇｒｏｕｐ is", "Sony Group"),
        ("Windows 98 is", "Windows 98"),
        ("The C++ language", "C++"),
        ("Is C# a language?", "C#"),
        ("Issue 7 of #Paris#", "Paris"),
        # accents, and letters that do not decompose
        ("Beyonce sings", "Beyoncé"),
        ("München liegt", "MÜNCHEN"),
        ("Mu\u0308nchen liegt", "Munchen"),
        ("Soren Kierkegaard wrote", "Søren Kierkegaard"),
        ("Lech Walesa led", "Lech Wałęsa"),
        ("Ngo Dinh Diem ruled", "Ngô Đình Diệm"),
        ("Gruss aus der Karlstrasse", "Karlstraße"),
        ("Where is Aeroskobing?", "Ærøskøbing"),
        ("Reykjavik and Isafjordur", "Ísafjörður"),
        ("Gudmundur sings", "Guðmundur"),
        ("Istanbul is", "İSTANBUL"),
        ("Diyarbakir is", "Diyarbakır"),
        # hyphens and dashes
        ("Saint Germain is", "Saint-Germain"),
        ("Saint–Germain is", "Saint Germain"),
        ("a CocaCola is", "Coca-Cola"),
        ("a Coca\u2011Cola is", "CocaCola"),
        ("Jay-Z was born", "Jay Z"),
        ("a hundred thou\u00adsand Lakes", "Thousand Lakes"),
        ("the Saint-\nGermain quarter", "Saint-Germain"),
        # apostrophes and possessives
        ("O’Brien left", "O'Brien"),
        ("OBrien left", "O'Brien"),
        ("O'Brien left", "OBrien"),
        ("the mayor of st john s is", "St. John's"),
        ("in Hawai'i", "Hawaiʻi"),
        ("Darrieux’s films", "Darrieux"),
        ("Louis' crown", "Louis"),
        ("a McDonald's is", "McDonalds"),
        ("Quelle est la capitale de l'Allemagne ?", "Allemagne"),
        ("Ankara'nın nüfusu", "Ankara"),
        # quotation marks
        ("Who directed “Psycho”?", "Psycho"),
        ('Dwayne "The Rock" Johnson acts', "Dwayne The Rock Johnson"),
        ("Who is Weird Al Yankovic?", '"Weird Al" Yankovic'),
        # initials and other full stops
        ("J. R. R. Tolkien wrote", "J.R.R. Tolkien"),
        ("JRR Tolkien wrote", "J.R.R. Tolkien"),
        ("J.R.R. Tolkien wrote", "JRR Tolkien"),
        ("the U.S. economy", "US"),
        ("Does the US trade?", "U.S."),
        ("The mayor of St. John's is", "St. John's"),
        ("Is St John here?", "St. John"),
        ("Is Yahoo a company?", "Yahoo!"),
        ("R&B is", "R & B"),
        ("Simon and Garfunkel sang", "Simon & Garfunkel"),
        ("AC DC play", "AC/DC"),
        # articles
        ("Who runs Tarn database?", "the Tarn database"),
        ("Who runs the Tarn database?", "Tarn database"),
        # other scripts
        ("巴黎的市长是", "巴黎"),
        ("Sonyの本社は", "Sony"),
        ("ﾊﾟﾘは", "パリ"),
        ("列奥纳多・达・芬奇画", "列奥纳多·达·芬奇"),
        ("서울의 시장은", "서울"),
        ("\u1109\u1165\u110b\u116e\u11af\u1109\u1175", "서울"),
        ("दिल्ली का मौसम", "दिल्ली"),
        ("население МОСКВЫ", "Москвы"),
        ("η πρωτεύουσα ΑΘΗΝΑΣ", "αθηνας"),
    ],
)
def test_a_subject_is_named_however_it_is_written(text: str, subject: str) -> None:
    assert is_named(text, subject)


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Who leads Sweden?", "Denmark"),
        ("Davidson sings", "David"),
        ("Harald Davids", "David"),
        ("Windows 98 is", "Windows 9"),
        ("Windows 198 is", "Windows 98"),
        ("iOS 7.1 is", "iOS 7"),
        ("Kingdom, United", "United Kingdom"),
        ("an island", "is land"),
        ("this is land", "island"),
        ("NewYork is", "New York"),
        ("I came by Rome. Paris followed", "Rome Paris"),
        ("Tell us more", "U.S."),
        ("The U.S. economy", "us"),
        ("The U.S. economy", "Us"),
        ("who leads it", "WHO"),
        ("Who leads it?", "WHO"),
        ("WHO LEADS IT", "WHO"),
        ("It rained", "It"),
        ("C is a language", "C++"),
        ("C++ is a language", "C"),
        ("मोर नाचता है", "म"),
        ("йод", "иод"),
        ("anything", "!?"),
        ("anything & more", "&"),
        ("anything", ""),
        ("", "Denmark"),
        ("Den", "Denmark"),
    ],
)
def test_another_word_is_not_the_subject(text: str, subject: str) -> None:
    assert not is_named(text, subject)


LONGER_NAMES = [
    ("Samsung", "Samsung Heavy Industries"),
    ("Samsung", "Samsung Galaxy"),
    ("Apple", "Apple iPhone"),
    ("Paris", "Paris Hilton"),
    ("Paris", "Paris Saint-Germain"),
    ("Paris", "Paris-Soir"),
    ("Germain", "Paris Saint-Germain"),
    ("Hilton", "Paris Hilton"),
    ("Martin Luther", "Martin Luther King"),
    ("King", "Martin Luther King"),
    ("York", "New York"),
    ("Oxford", "University of Oxford"),
    ("Congo", "Republic of the Congo"),
    ("England", "Bank of England"),
    ("Bank", "Bank of England"),
    ("Denmark", "Christian IX of Denmark"),
    ("Wales", "Prince of Wales"),
    ("Jesus", "Jesus of Nazareth"),
    ("Alexander", "Alexander the Great"),
    ("Beauvoir", "Simone de Beauvoir"),
    ("Leonardo", "Leonardo da Vinci"),
    ("Oscar", "Oscar de la Renta"),
    ("Este", "Beatrice d'Este"),
    ("David", "David d'Angers"),
    ("Muhammad", "Muhammad al-Mahdi"),
    ("Seine", "Bar-sur-Seine"),
    ("Aix", "Aix-en-Provence"),
    ("Windows", "Windows 95"),
    ("windows", "windows 95"),
    ("Intel", "Intel i960"),
    ("vitamin", "vitamin B12"),
    ("COVID", "COVID-19"),
    ("Elizabeth", "Elizabeth I"),
    ("Elizabeth", "Elizabeth II"),
    ("Johnson", "Johnson & Johnson"),
    ("Brien", "O'Brien"),
    ("Xi", "Xi'an"),
    ("Wilson", "A. N. Wilson"),
    ("Louis", "St. Louis"),
    ("C", "C.R.A.Z.Y."),
    ("copper", "copper(II) oxide"),
    ("football", "American football"),
    ("Lancaster", "Lancaster railway station"),
    ("Brazil", "Brazil national football team"),
]
QUESTIONS = [
    "Where is {} located?",
    "What do you know about {}'s history?",
    "And {}?",
    "I read that {} moved; where to?",
]


@pytest.mark.parametrize(("subject", "longer"), LONGER_NAMES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_longer_name_is_another_one(subject: str, longer: str, question: str) -> None:
    text = question.replace("{}", longer)
    assert not is_named(text, subject)
    assert is_named(text, longer)
    assert is_named(text, subject, longer)  # unless it is one of the fact's own
    assert knows(short=subject, long=longer).find_named_facts(text) == {"long"}
    assert is_named(question.replace("{}", subject), subject)


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Samsung's new phone", "Samsung"),
        ("Is Samsung Inc. a company?", "Samsung"),
        ("Who leads Siemens AG today?", "Siemens"),
        ("Is Amazon.com down?", "Amazon"),
        ("Is Paris larger than Rome?", "Paris"),
        ("Describe Paris to a child", "Paris"),
        ("Does Paris have a mayor?", "Paris"),
        ("He asked: Is Paris large?", "Paris"),
        ("Ist Paris größer als Rom?", "Paris"),
        ("¿Es París la capital?", "París"),
        ("Où est Paris ?", "Paris"),
        ("Где Москва?", "Москва"),
        ("When did President Obama speak?", "Obama"),
        ("Where did Dr. Watson live?", "Watson"),
        ("Is the King of England old?", "England"),
        ("Who is the Mayor of Paris?", "Paris"),
        ("History of Paris", "Paris"),
        ("What is the Capital of France?", "France"),
        ("Tell me about The Netherlands", "Netherlands"),
        ("Who is Google CEO?", "Google"),
        ("the French city Paris", "Paris"),
        ("the Paris-based company", "Paris"),
        ("Are non-Apple phones good?", "Apple"),
        ("Tell me about Paris. Hilton is", "Paris"),
        ("Tell me about Paris\nHilton is", "Paris"),
        ("Tell me about Paris (Texas)", "Paris"),
        ("In Paris I met her", "Paris"),
        ("On Monday Apple rose", "Apple"),
        ("What did Google Tuesday say?", "Google"),
        ("What happened on May 5, when May met us?", "May"),
        ("Kenia Sinclair of Jamaica won", "Kenia Sinclair"),
        ("He played for Cardiff City F.C. Mark Isham plays", "Mark Isham"),
        ("Triple H. Then came others", "Triple H"),
        ("Bach(1685) wrote", "Bach"),
        ("France beat Brazil 3-0", "Brazil"),
        ("Was D'Angelo there?", "D'Angelo"),
        # where nothing can be told
        ("WHERE IS PARIS HILTON?", "Paris"),
        ("It rained. WHERE IS PARIS HILTON, they asked?", "Paris"),
        ("where is paris hilton?", "Paris"),
        ("where is paris Hilton?", "Paris"),
        ("Where Is Paris Located?", "Paris"),
        ("who runs the bank of england", "England"),
        ("What is Acme's refund policy?", "refund policy"),
        ("What is the Acme refund policy?", "refund policy"),
        ("the airport of Rome", "airport"),
        ("Supporters of the airport say", "airport"),
        ("巴黎 Hilton", "巴黎"),
    ],
)
def test_a_word_beside_a_name_need_not_belong_to_it(text: str, subject: str) -> None:
    assert is_named(text, subject)


def test_each_name_of_a_list_is_named() -> None:
    known = knows(a="Paris", b="Rome", c="London", d="York")
    text = "Are Paris, Rome and London larger than New York?"
    assert said(known, text) == ["Paris", "Rome", "London"]
    assert said(known, "- Paris\n- Rome\n- London") == ["Paris", "Rome", "London"]


def test_the_longest_known_name_at_a_place_is_meant() -> None:
    known = knows(a="Paris", b="Paris Hilton", c="Hilton Hotels", d="Russian", e="Russians")
    assert said(known, "where is paris hilton?") == ["paris hilton"]
    assert said(known, "where are paris hilton hotels?") == ["paris hilton"]
    assert said(known, "What is a Russian's right?") == ["Russian"]
    assert said(known, "Of Paris, Hilton wrote") == ["Paris"]
    known.remove_fact("b")
    assert said(known, "where is paris hilton?") == ["paris"]


def test_a_mention_tells_where_the_name_stands() -> None:
    known = knows(a="Saint-Germain", b=("Straße des 17. Juni",), c="the Tarn database", d="巴黎")
    text = "“Saint\n Germain’s” STRASSE DES 17. JUNI? It’s in the Tarn database, 在巴黎呢"
    assert said(known, text) == [
        "Saint\n Germain",
        "STRASSE DES 17. JUNI",
        "the Tarn database",
        "巴黎",
    ]
    ids = [mention.fact_ids for mention in known.find_mentions(text)]
    assert ids == [{"a"}, {"b"}, {"c"}, {"d"}]
    known.add_names("e", ("Tarn database",))
    text = "Ask the Tarn database"
    assert known.find_mentions(text) == [Mention(frozenset("ce"), 4, 21)]


def test_a_fact_has_several_names() -> None:
    known = knows(a=("Germany", "Deutschland", "FRG", "germany"), b="Deutschland")
    assert known.find_named_facts("Is Germany large?") == {"a"}
    assert known.find_named_facts("Wie groß ist Deutschland?") == {"a", "b"}
    known.add_names("a", ("Germany",))
    assert known.find_named_facts("Wie groß ist Deutschland?") == {"b"}
    assert known.find_named_facts("Is Germany larger than the FRG?") == {"a"}
    known.add_names("a", ())
    assert known.find_named_facts("Is Germany large?") == set()


def test_a_text_names_all_facts_on_its_subjects() -> None:
    known = knows(a="Denmark", b="Den Haag", c="denmark", d="")
    assert known.find_named_facts("From Den Haag to Denmark") == {"a", "b", "c"}
    assert known.find_named_facts("Danish dens") == set()
    known.remove_fact("a")
    known.remove_fact("a")
    assert known.find_named_facts("DENMARK!") == {"c"}
    known.add_names("c", ("Den Haag",))
    assert known.find_named_facts("Denmark") == set()
    assert known.find_named_facts("den haag") == {"b", "c"}
    known.remove_fact("d")


def test_all_texts_have_to_name_the_subject() -> None:
    names = ("Germany", "Deutschland")
    assert names_subject(["Is Germany large?", "Deutschland"], names)
    assert not names_subject(["Is Germany large?", "It is"], names)
    assert not names_subject(["Who runs Germany Trade?"], names)


def test_normal_text_has_lower_case_and_single_spaces() -> None:
    assert normalize_text(" The  Ｅnd–of “É”.\n") == "the end of é"


subjects = st.text(alphabet="bc BC1.-'中国éß", max_size=5)
texts = st.text(alphabet="bc BC1.-'中国éß,\n", max_size=20)


@settings(deadline=None)
@example(["Sony"], "Sonyの本社は")
@example(["111"], "111中")
@example(["B-C c", "BCc"], "b-C C")
@given(st.lists(subjects, max_size=5), texts)
def test_a_name_is_found_among_others_unless_another_is_meant(many: list[str], text: str) -> None:
    def places(*names: str) -> dict[str, set[tuple[int, int]]]:
        known = knows(**{str(n): name for n, name in enumerate(names)})
        found = [(n, m) for m in known.find_mentions(text) for n in m.fact_ids]
        return {str(n): {(m.start, m.end) for k, m in found if k == str(n)} for n in range(9)}

    together = places(*many)
    spans = sorted({span for found in together.values() for span in found})
    assert all(one[1] <= next_one[0] for one, next_one in pairwise(spans))
    for n, name in enumerate(many):
        alone = places(name)["0"]
        assert together[str(n)] <= alone
        for place in alone - together[str(n)]:
            assert any(place not in places(name, other)["0"] for other in many)


@settings(deadline=None)
@given(subjects)
def test_what_is_added_and_removed_leaves_nothing(subject: str) -> None:
    known = knows(a=subject, b="bc")
    known.remove_fact("a")
    known.remove_fact("b")
    assert known.__dict__ | {"_reader": None} == SubjectMatcher().__dict__ | {"_reader": None}
