"""ROUGE-L, BLEU and chrF: the libraries' own published examples, and the formulas by themselves."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from tolerances import PUBLISHED_SCORES, SCORE_FORMULAS

from finetune.scorers import make

VOCABULARY = ["the", "a", "cat", "cats", "sat", "Hat", "running", "on"]
SENTENCES = st.lists(st.sampled_from(VOCABULARY), max_size=9)
WRITTEN = SENTENCES.map(" ".join)
EXPECTED = st.lists(SENTENCES.filter(bool).map(" ".join), min_size=1, max_size=3)
SETS = st.lists(st.tuples(WRITTEN, EXPECTED), min_size=1, max_size=4)

# google-research/google-research, rouge/rouge_scorer_test.py and rouge/testdata (ROUGE-1.5.5's
# scores; the texts are random strings), and the README's example, worked out by hand.
ROUGE = [
    (False, "testing one two", "testing one", 4 / 5),
    (False, "testing one two", "testing two", 4 / 5),
    (False, "testing one two", "", 0.0),
    (
        False,
        "ZfbCUIUuePaiLVUlCaUXxkpu XPeWing tUHfPMuZ',-Xd Y BrUgVJing M-HV.-DgdDaY.rFDJCRing "
        "Ht-LM EKBDXkME,yz'RBr q'wtion wIojNbN wL,b .a-'XdQggyFl jB-RPP'iyOIcUxer tKM L",
        "rFDJCRtion Ht-LM EKtDXkME,yz'RBr q'wer wrojNbN wL,b .a-'XdQggyFl jB-RPP'iyOIcUxi",
        0.51163,
    ),
    (
        False,
        "KsJdPByEtAor fE-Qg Dpdbring cw-WeFyu vC MoBL Xdn g wkvcEiGvKtion BDFhrpMtion psing "
        "sbKao Q m qiing LMmer HqqLFXe,XPY,J XsurkMer ,ed nB'wH'bWVHjWFEing tQ.saefZwJtKrTlix"
        "YpMMsJing UCAPwNHeYVjDing c T BUySKtion gMPfJpwGw p'NvxAoping eu pBwMBKV'I DNxqelhu,"
        "PHPxDEq,mtion SN",
        "nn cw-WeFyu vC MoBL Xdn g wkvcEiGvKtion BDFhrpMer pstion sbKao Q m qier LMmed "
        "HqqLFXe,XPY,J XsurkMeo ,ed nB'wH'bWVHjWFEer tQ.saefZwJtKrTlixYpMMNJtion UCAPwNHeYVjD",
        0.5,
    ),
    (
        True,
        "The quick brown fox jumps over the lazy dog",
        "The quick brown dog jumps on the log.",
        10 / 17,
    ),
]


@pytest.mark.parametrize(("use_stemmer", "expected", "written", "score"), ROUGE)
def test_published_rouge(use_stemmer, expected, written, score):
    scorer = make("rouge_l", {"use_stemmer": use_stemmer})
    assert scorer.score(written, [expected]) == pytest.approx(score, abs=PUBLISHED_SCORES)


def rouge_by_formula(written: str, answer: str) -> float:
    one, other = written.lower().split(), answer.lower().split()
    longest = [0] * (len(other) + 1)
    for word in one:
        before = list(longest)
        for i, known in enumerate(other):
            longest[i + 1] = before[i] + 1 if word == known else max(longest[i], before[i + 1])
    return 2 * longest[-1] / (len(one) + len(other))


@given(WRITTEN, EXPECTED)
def test_rouge_by_its_formula(written, expected):
    best = max(rouge_by_formula(written, answer) for answer in expected)
    assert make("rouge_l", {}).score(written, expected) == pytest.approx(best, abs=SCORE_FORMULAS)


@given(SETS, st.booleans())
def test_rouge_as_the_package_has_it_for_several_references(rows, use_stemmer):
    package = RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    scores = [package.score_multi(answers, text)["rougeL"].fmeasure for text, answers in rows]
    written, expected = zip(*rows, strict=True)
    total = make("rouge_l", {"use_stemmer": use_stemmer}).total(written, expected)
    assert total == pytest.approx(sum(scores) / len(scores), abs=SCORE_FORMULAS)


# mjpost/sacrebleu, test/test_bleu.py, test_corpus_bleu_cases.
BLEU_WRITTEN = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
BLEU_EXPECTED = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]
BLEU_SETS = [
    ({}, 48.530827),
    ({"tokenize": "none"}, 49.1919566),
    ({"tokenize": "13a"}, 48.530827),
    ({"tokenize": "intl"}, 43.91623493),
    ({"smooth_method": "none"}, 48.530827),
]


@pytest.mark.parametrize(("kwargs", "score"), BLEU_SETS)
def test_published_bleu_of_a_set(kwargs, score):
    scorer = make("bleu", kwargs)
    total = scorer.total(BLEU_WRITTEN, BLEU_EXPECTED)
    assert total == pytest.approx(score / 100, abs=PUBLISHED_SCORES)
    assert scorer.total(["", "", ""], BLEU_EXPECTED) == 0


# mjpost/sacrebleu, test/test_sentence_bleu.py.
ROMANIAN = "producţia de zahăr brut se exprimă în zahăr alb;"
ROMANIAN_WRITTEN = "Producția de zahăr primă va fi exprimată în ceea ce privește zahărul alb;"
BLEU_SENTENCES = [
    ({"smooth_method": "exp"}, 8.493),
    ({"smooth_method": "none"}, 0.0),
    ({"smooth_method": "floor"}, 4.51688),
    ({"smooth_method": "add-k"}, 14.882),
    ({"tokenize": "none"}, 7.347),
    ({"tokenize": "intl"}, 8.493),
    ({"tokenize": "char"}, 40.8759),
    ({"tokenize": "char", "lowercase": True}, 42.0267),
]


@pytest.mark.parametrize(("kwargs", "score"), BLEU_SENTENCES)
def test_published_bleu_of_one_answer(kwargs, score):
    scorer = make("bleu", kwargs)
    found = scorer.score(ROMANIAN_WRITTEN, [ROMANIAN])
    assert found == pytest.approx(score / 100, abs=PUBLISHED_SCORES)
    if "tokenize" not in kwargs:
        assert scorer.score("this is a cat", ["okay thanks"]) == 0


def ngrams(tokens, order):
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def bleu_by_formula(written, expected) -> float:
    """Papineni et al. 2002, equations 1 to 3 of section 2.3, unsmoothed, words cut at spaces."""
    found, possible, num_written, num_expected = Counter(), Counter(), 0, 0
    for text, answers in zip(written, expected, strict=True):
        words, references = text.split(), [answer.split() for answer in answers]
        num_written += len(words)
        num_expected += min((abs(len(r) - len(words)), len(r)) for r in references)[1]
        for order in range(1, 5):
            most = Counter()
            for reference in references:
                most |= ngrams(reference, order)
            found[order] += sum((ngrams(words, order) & most).values())
            possible[order] += sum(ngrams(words, order).values())
    if not all(found[order] for order in range(1, 5)):
        return 0.0
    mean = sum(math.log(found[order] / possible[order]) for order in range(1, 5)) / 4
    return math.exp(mean + min(0, 1 - num_expected / num_written))


@given(SETS)
def test_bleu_by_its_formula_and_as_the_package_has_it(rows):
    written, expected = zip(*rows, strict=True)
    total = make("bleu", {"tokenize": "none", "smooth_method": "none"}).total(written, expected)
    assert total == pytest.approx(bleu_by_formula(written, expected), abs=SCORE_FORMULAS)
    streams = [[(row + [None] * 3)[i] for row in expected] for i in range(3)]
    package = sacrebleu.corpus_bleu(list(written), [s for s in streams if any(s)]).score / 100
    assert make("bleu", {}).total(written, expected) == pytest.approx(package, abs=SCORE_FORMULAS)
    alone = [sacrebleu.sentence_bleu(text, answers).score / 100 for text, answers in rows]
    ours = [make("bleu", {}).score(text, answers) for text, answers in rows]
    assert ours == pytest.approx(alone, abs=SCORE_FORMULAS)


# mjpost/sacrebleu, test/test_chrf.py: test_cases, test_cases_effective_order,
# test_cases_keep_whitespace (beta 3) and test_sentence_level_chrf (beta 2).
ASSESSED = (
    "risk assessment must be made of those who are qualified and expertise in the sector - these "
    "are the scientists ."
)
ASSESSED_EXPECTED = (
    "risk assessment has to be undertaken by those who are qualified and expert in that area - "
    "that is the scientists ."
)
OBAMA = "Die Beziehung zwischen Obama und Netanjahu ist nicht gerade freundlich."
OBAMA_EXPECTED = "Das Verhältnis zwischen Obama und Netanyahu ist nicht gerade freundschaftlich."
EPS = {"beta": 3, "eps_smoothing": True}
CHRF_SETS = [
    (EPS, ["abcdefg"], ["hijklmnop"], 0.0),
    (EPS, [""], ["reference"], 0.0),
    (EPS, ["aa"], ["ab"], 8.3333),
    (EPS, ["a", "b"], ["a", "c"], 8.3333),
    (EPS, ["a"], ["a"], 16.6667),
    (EPS, ["a b c"], ["abc"], 50.0),
    (EPS, [" " + ASSESSED], [ASSESSED_EXPECTED], 63.361730),
    (EPS, [OBAMA], [OBAMA_EXPECTED], 64.1302698),
    ({"beta": 3}, ["a"], ["a"], 100.0),
    ({"beta": 3}, ["a b c"], ["abc"], 100.0),
    ({"beta": 3}, ["a", "b"], ["a", "c"], 50.0),
    ({"beta": 3}, ["aa"], ["ab"], 25.0),
    ({"beta": 3, "whitespace": True}, [OBAMA], [OBAMA_EXPECTED], 67.3481606),
    ({"beta": 3, "whitespace": True}, [ASSESSED], [ASSESSED_EXPECTED], 65.2414427),
]
CHRF_SENTENCES = [
    (
        "Co nás nejvíc trápí, protože lékaři si vybírají, kdo bude žít a kdo zemře.",
        "Nejvíce smutní jsme z toho, že musíme rozhodovat o tom, kdo bude žít a kdo zemře.",
        39.14078509,
    ),
    (
        "Nebo prostě nemají vybavení, které by jim pomohlo, uvedli lékaři.",
        "A někdy nemáme ani potřebný materiál, abychom jim pomohli, popsali lékaři.",
        31.22557079,
    ),
]


@pytest.mark.parametrize(("kwargs", "written", "expected", "score"), CHRF_SETS)
def test_published_chrf_of_a_set(kwargs, written, expected, score):
    total = make("chrf", kwargs).total(written, [[answer] for answer in expected])
    assert total == pytest.approx(score / 100, abs=PUBLISHED_SCORES)


@pytest.mark.parametrize(("written", "expected", "score"), CHRF_SENTENCES)
def test_published_chrf_of_one_answer(written, expected, score):
    found = make("chrf", {"eps_smoothing": True}).score(written, [expected])
    assert found == pytest.approx(score / 100, abs=PUBLISHED_SCORES)


def chrf_by_formula(written, expected) -> float:
    """Popović 2015: mean precision and recall over the orders that both texts have, then F2."""
    shares = []
    for order in range(1, 7):
        counts = [ngrams("".join(text.split()), order) for text in (written, expected)]
        sizes = [sum(count.values()) for count in counts]
        both = sum((counts[0] & counts[1]).values())
        if all(sizes):
            shares.append((both / sizes[0], both / sizes[1]))
    precision, recall = (
        (sum(column) / len(shares) for column in zip(*shares, strict=True))
        if (shares)
        else (0.0, 0.0)
    )
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


@given(WRITTEN, EXPECTED)
def test_chrf_by_its_formula(written, expected):
    best = max(chrf_by_formula(written, answer) for answer in expected)
    assert make("chrf", {}).score(written, expected) == pytest.approx(best, abs=SCORE_FORMULAS)


@given(SETS, st.sampled_from([0, 2]), st.booleans())
def test_chrf_as_the_package_has_it(rows, word_order, lowercase):
    written, expected = zip(*rows, strict=True)
    streams = [[(row + [None] * 3)[i] for row in expected] for i in range(3)]
    if lowercase:
        streams = [[text and text.lower() for text in stream] for stream in streams]
    package = sacrebleu.corpus_chrf(
        [text.lower() if lowercase else text for text in written],
        [stream for stream in streams if any(stream)],
        word_order=word_order,
    )
    scorer = make("chrf", {"word_order": word_order, "lowercase": lowercase})
    assert scorer.total(written, expected) == pytest.approx(package.score / 100, abs=SCORE_FORMULAS)
