"""Every reason for suspicion: rows that give it, and rows that only look as if they did."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from row_texts import text_rows

from finetune.mojibake import has_mojibake
from finetune.overlap import RowText
from finetune.suspicion import CHECKS, suspicions


def names(prompt: str, answer: str) -> list[str]:
    return [s.check.name for s in suspicions([RowText("f:1", prompt, answer)])]


LONG = "Describe the three states of matter in two sentences."
LONG_ZH = (
    "请用两三句话描述一下物质的三种常见状态,并且分别举出一个日常生活中的例子,"
    "最后说明它们之间如何互相转化。"
)

GIVES = [
    ("empty answer", "Q", ""),
    ("empty answer", "Q", " \n\t\u3000"),
    ("empty answer", "", "\u200b\ufeff "),
    ("answer is the prompt", "Say hello", "Say hello"),
    ("answer is the prompt", "Say  Hello?", "say hello"),
    ("answer is the prompt", "你好?", "你好?"),
    ("answer opens with the prompt", LONG, f"{LONG} Solid, liquid, gas."),
    ("answer opens with the prompt", LONG, f"{LONG.upper()}\n\nSolid, liquid, gas."),
    ("answer opens with the prompt", LONG_ZH, f"{LONG_ZH}固体、液体和气体。"),
    ("replacement characters", "Q", "caf\ufffd"),
    ("replacement characters", "na\ufffdve", "A"),
    ("control characters", "Q", "solve \x0crac{1}{2}"),
    ("control characters", "Q", "a\x00b"),
    ("control characters", "Q", "a\x1b[31mred"),
    ("control characters", "a\x85b", "A"),
    ("HTML in prose", "Where is it?", "<p>It is <b>here</b>.</p>"),
    ("HTML in prose", "你在哪里", "在这里<br>在那里<br/>到处<br />"),
    ("HTML in prose", "Q", "Tom &amp; Ann say &quot;hello&quot;"),
    ("HTML in prose", "Q", "It&#39;s Ann&#39;s, isn&#x27;t it"),
    ("control tokens as text", "Q", "Yes.<|eot_id|>"),
    ("control tokens as text", "<|start_header_id|>user<|end_header_id|>\n\nHi", "Hello"),
    ("control tokens as text", "[INST] Hi [/INST]", "Hello"),
    ("control tokens as text", "<<SYS>>\nBe kind\n<</SYS>>\n\nHi", "Hello"),
    ("control tokens as text", "Hi", "Hello</s>"),
    ("control tokens as text", "<s>Hi", "Hello"),
    ("control tokens as text", "Hi", "Hello<|im_end|>\n"),
    ("control tokens as text", "Hi<end_of_turn>", "Hello"),
    ("control tokens as text", "### Instruction:\nHi\n\n### Response:", "Hello"),
    ("long repetition", "Q", "a" * 120),
    ("long repetition", "Q", "哈" * 150),
    ("long repetition", "\n" * 130 + "Q", "A"),
    ("long repetition", "Q", "I said: no way!\n" * 8),
    ("long repetition", "Q", "Well.\n" + "  我们今天去公园散步好不好\n" * 9),
    ("refusal", "Q", "As an AI language model, I cannot do that."),
    ("refusal", "Q", "I'm sorry, but as an AI I don't have a body."),
    ("refusal", "Q", "I’m an AI and do not have favourites."),
    ("outer white space", "Q", "A\n"),
    ("outer white space", " Q", "A"),
]


@pytest.mark.parametrize(("name", "prompt", "answer"), GIVES)
def test_a_row_that_gives_a_reason(name, prompt, answer):
    assert name in names(prompt, answer)


def test_every_check_has_a_row_above():
    tested = {name for name, _, _ in GIVES} | {"wrong encoding"}
    assert tested == {check.name for check in CHECKS}
    assert len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Q", "0"),
        ("Q", "."),
        ("Answer only with a smile", "🙂"),
        ("", "Plain text that ends with a line end.\n"),
        ("Is it blue", "It is blue"),
        ("What is matter?", "What is matter? A good question."),
        (LONG, LONG[:-11]),
        (LONG, f"You ask: {LONG}"),
        ("Windows", "one\r\ntwo\tthree"),
        ("فارسی", "می‌خواهم بنویسم"),
        ("family", "👨‍👩‍👧‍👦 ❤️"),
        ("Write a page in HTML", "<p>a</p><p>b</p>"),
        ("Fix this: <p>a<p>", "<p>a</p> <b>b</b>"),
        ("How does one begin?", "```\n<p>a</p><p>b</p>\n```"),
        ("How does one begin?", "Use `<p>`, `</p>` and `<b>`."),
        ("Q", "<!DOCTYPE html>\n<p>a</p><p>b</p>"),
        ("Q", "<div><p>A whole block</p><p>of code</p></div>"),
        ("Q", "a < b and b > c, so List<String> x; R&D; AT&T;"),
        ("Q", "Use <br> once, &amp; that is all."),
        ("Old price", "It was <s>100</s> 80 euro"),
        ("Which operator?", "a <| b |> c, x || y, [1, INST]"),
        ("Q", "### Responses\nSee the response: here"),
        ("googol", "1" + "0" * 100),
        ("table", "| a | b |\n|" + "-" * 100 + "|\n| 1 | 2 |"),
        ("code", "}" + "\n}" * 12),
        ("code", "end;" + "\nend;" * 12),
        ("matrix", "1 0 0 0 0 0 0 0" + "\n1 0 0 0 0 0 0 0" * 9),
        ("song", "Row your boat!" + "\nRow your boat!" * 4),
        ("Who are you?", "I'm a language model called Plum, trained by many people."),
        ("Q", "An AI cannot do that alone."),
        ("Q", "As an AI, I cannot see it." + " But here is how it works." * 20),
    ],
)
def test_a_row_that_only_looks_like_it(prompt, answer):
    assert names(prompt, answer) == []


# --- wrong encodings: good text in many languages, and the same text damaged ---

GOOD = [
    "A ação não é sã: três maçãs, órgão, você, avó e coração.",
    "« Voilà » dit-il : le garçon naïf fête Noël à l’école, où ça ?",
    "Voilà\xa0»; à\xa0«\xa0Besançon\xa0», l’Île, ÂGE, forêt\xa0!",
    "Straße, Größe, Übermut – „Äpfel“, »Öl«, Spaß… ‚ß‘",
    "El niño comió piñas; ¿qué? ¡Mañana! ESPAÑA, corazón, 1.ª, 2.º",
    "Zażółć gęślą jaźń; Łódź, dziękuję, „cześć”",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Hlýtt ár, þú ert góður; Ísland, ævi, ð, Ð",
    "På ön åt räven sju blåbär – Ångström, smörgås",
    "Rødgrød med fløde på Ærø, 10 µm",
    "Tiếng Việt có dấu: Ân, Ê, Ô, Ư; ấm áp, người, một",
    "Ağaç, şöyle, İstanbul’da ılık; hâlâ kâr",
    "Română: în România, câine, să mănânci, țară, ÎN, ÂNGER",
    "Το ψωμί είναι ζεστό — καλημέρα",
    "Съешь ещё этих мягких булок, да выпей чаю",
    "我们今天去公园——好不好?“好”",
    "今日は「東京」へ行きます。…はい!",
    "오늘은 날씨가 좋습니다",
    "مرحبا بالعالم، كيف الحال؟",
    "שלום עולם, מה שלומך?",
    "हिन्दी भाषा बहुत सुन्दर है।",
    "ประเทศไทยสวยงามมาก",
    "It’s “fine” — really… 20 °C, £5, €7, ½ cup, Café™, ©2024",
    "😀 is a smile",
]
TRICKY = [
    "MAÇÃ”, MANHÃ…, IRMû, “Ã”, «Â», FRANÇÂ’",
    "voilà\xa0» — déjà\xa0«\xa0vu", "é”… and é…” and à…»", "“CAFÉ”, “É”, É…",
    "pipe of Ø½” and Ø¾", "10 Å², 5 kcal/molÅ², Ö²", "3 ×² and 2×³", "Spaß”, Spaß…, ß»",
    "Ä–Ö–Ü, «Ä»…, Ñ…Ö…", "“Café™” and “Bébé®…”",
    "Â", "Ã", "â", "Ça va ? ÇA VA… À…",
]  # fmt: skip


def damaged(text: str, encoding: str) -> str:
    """UTF-8 read in the encoding; bytes it has no character for read as Latin-1."""
    if encoding == "latin-1":
        return text.encode().decode("latin-1")
    parts = (bytes([byte]) for byte in text.encode())
    return "".join(p.decode("cp1252", "ignore") or p.decode("latin-1") for p in parts)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", GOOD)
def test_good_text_is_left_alone_and_damage_is_seen(text, encoding):
    assert not has_mojibake(text)
    assert not has_mojibake(text.upper())
    assert has_mojibake(damaged(text, encoding))
    assert has_mojibake(damaged(damaged(text, encoding), encoding))
    assert names("Q", damaged(text, encoding))[0] == "wrong encoding"


@pytest.mark.parametrize("text", TRICKY)
def test_letters_beside_typographic_marks_are_no_damage(text):
    assert not has_mojibake(text)


@pytest.mark.parametrize(
    "text",
    ["cafÃ©", "Ã©tÃ©", "CAFÃ‰", "itâ€™s", "â€œyesâ€\x9d", "5 â‚¬", "20Â°C", "Â£5", "ï»¿Hi",
     "Ä\x8desky mluvÃ\xad", "dziÄ™ki", "ï¿½", "ðŸ˜€", "锟斤拷", "Ã¢â‚¬â„¢"],
)  # fmt: skip
def test_damage_as_it_is_met(text):
    assert has_mojibake(text)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_text_is_never_refused_whatever_it_holds(text):
    names(text, text)


@given(st.text(st.characters(max_codepoint=0x7F)))
def test_ascii_is_never_damaged(text):
    assert not has_mojibake(text)


# --- the report ---


def test_places_are_listed_by_check_in_the_order_of_the_table():
    rows = [RowText("f:1", "Q", " a"), RowText("f:2", "Q", ""), RowText("f:3", "Q ", "")]
    found = suspicions(iter(rows))
    assert [(s.check.name, s.places) for s in found] == [
        ("empty answer", ("f:2", "f:3")),
        ("outer white space", ("f:1", "f:3")),
    ]
    assert [s.check.note for s in found] == [False, True]
    assert suspicions([]) == []


@pytest.mark.shared
def test_real_files_have_few(shared):
    """Read by hand: six answers of the Alpaca rows refuse; the others are clean."""
    for name, expected in [
        ("alpaca_en_demo.json", {"refusal": 6}),
        ("instructions_1100.json", {}),
        ("gsm8k_train.jsonl", {}),
    ]:
        found = suspicions(text_rows(shared(f"data/{name}")))
        assert {s.check.name: len(s.places) for s in found} == expected, name
