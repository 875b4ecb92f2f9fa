"""Small tokenizer files of our own, in both of Llama's formats."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import random
from collections import Counter

WORDS = [
    *("the", "a", "of", "and", "to", "in", "is", "it", "was", "that", "for", "on", "with", "as"),
    *("at", "by", "from", "this", "have", "not", "are", "but", "had", "they", "you", "she", "her"),
    *("we", "all", "were", "there", "been", "their", "one", "so", "what", "up", "out", "about"),
    *("who", "get", "which", "go", "when", "make", "can", "like", "time", "no", "just", "know"),
]


def sentences(num_sentences: int = 400) -> list[str]:
    """Seeded nonsense of common words, numbers, indents and a few other scripts."""
    chance = random.Random(0)
    extras = ["13", "2024", "don't", "naïve", "été", "中文", "    x", "---", "...", "🙂", "(a)"]
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "er", "an")]
    made = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(400)]
    return [
        " ".join(chance.choice(WORDS + extras + made) for _ in range(chance.randint(3, 12)))
        for _ in range(num_sentences)
    ]


@functools.cache
def sentencepiece_model(
    vocab_size: int,
    *,
    add_dummy_prefix: bool = True,
    byte_fallback: bool = True,
    control_symbols: tuple[str, ...] = (),
    user_defined_symbols: tuple[str, ...] = (),
    pad_id: int = -1,
    **settings: object,
) -> bytes:
    """A BPE model trained on `sentences`, set up as Llama's unless said otherwise."""
    import sentencepiece

    out = io.BytesIO()
    chosen = {
        "model_type": "bpe", "byte_fallback": byte_fallback, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "add_dummy_prefix": add_dummy_prefix, "allow_whitespace_only_pieces": True,
        "control_symbols": list(control_symbols), "pad_id": pad_id,
        "user_defined_symbols": list(user_defined_symbols), "minloglevel": 2,
    } | settings  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=out, vocab_size=vocab_size, **chosen
    )
    return out.getvalue()


def scored_model(pieces: list[tuple[str, float]]) -> bytes:
    """A model of the given pieces and scores, after the 259 unknown, control and byte pieces."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(sentencepiece_model(300))
    del model.pieces[259:]
    for text, score in pieces:
        model.pieces.add(piece=text, score=score, type=1)
    model.trainer_spec.vocab_size = len(model.pieces)
    return model.SerializeToString()


@functools.cache
def tiktoken_model(vocab_size: int) -> bytes:
    """Ranks by plain byte-pair counting, `vocab_size` less the 256 special tokens."""
    words = [
        [bytes([byte]) for byte in f" {word}".encode()]
        for sentence in sentences()
        for word in sentence.split(" ")
    ]
    ranks = [bytes([byte]) for byte in range(256)]
    while len(ranks) < vocab_size - 256:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.append(best[0] + best[1])
        words = [_joined(word, best) for word in words]
    lines = (base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(ranks))
    return b"".join(lines)


def _joined(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out
