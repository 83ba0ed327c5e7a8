"""The text on which tests train: the same today and next year, so that no change of the library's own sources moves a figure.

Words are as frequent as in a natural language (Zipf's law), and each has a few favourite words to follow it. So there is
something to learn, which a tiny model begins to do in its first steps.
"""

from itertools import accumulate
from pathlib import Path
from random import Random

WORDS = 2000
FAVOURITES = 4  # words that follow a word in three of four cases


def text_of(characters: int, seed: int = 0) -> str:
    """Sentences in paragraphs of about 600 characters. The same seed gives the same text; all seeds share the words."""
    words = Random("words")  # choices() and random() give the same in Python 3.10 to 3.13
    syllables = [a + b for a in ("b", "d", "g", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v") for b in "aeiouü"]
    vocabulary = ["".join(words.choices(syllables, k=words.choices((1, 2, 3, 4), (1, 4, 3, 1))[0])) for _ in range(WORDS)]
    frequency = list(accumulate(1 / (rank + 3) for rank in range(WORDS)))
    favourites = [words.choices(range(WORDS), cum_weights=frequency, k=FAVOURITES) for _ in range(WORDS)]

    random, parts, length, word = Random(seed), [], 0, 0
    while length < characters:
        sentence = []
        for _ in range(4 + int(random.random() * 12)):
            likely = random.random() < 0.75
            word, = random.choices(favourites[word] if likely else range(WORDS), cum_weights=None if likely else frequency)
            sentence.append(vocabulary[word] if random.random() < 0.98 else str(int(random.random() * 1000)))
            if random.random() < 0.1:
                sentence[-1] += ","
        end = random.choices(". ? ! :".split(), (20, 2, 1, 1))[0] + ("\n\n" if random.random() < 0.1 else " ")
        parts.append(" ".join(sentence).capitalize() + end)
        length += len(parts[-1])
    return "".join(parts)[:characters]


def write_text(folder: Path, files: int = 5, characters: int = 20_000) -> None:
    """Writes a new folder of files 0.txt, 1.txt, … of so many characters each."""
    folder.mkdir()
    for number in range(files):
        (folder / f"{number}.txt").write_text(text_of(characters, seed=number), encoding="utf-8")
