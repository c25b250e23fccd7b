"""Endings in prose, written when those of endings_letters_prose.py were read: nine of 63 were misread."""

from __future__ import annotations

Row = tuple[tuple[str, ...], str, str | None]

PROCESSES = ("Photosynthesis", "Respiration", "Fermentation", "Transpiration")
WORDS = ("Verb", "Noun", "Adjective", "Adverb")
CUBES = ("9", "27", "81", "3")
LANDS = ("Brazil", "Peru", "Chile", "Argentina")
WATER = ("Evaporation", "Condensation", "Precipitation", "Sublimation")
SIZES = ("It is larger than the Earth", "It is smaller than the Earth", "It is the same size")
DECIMALS = ("0.1", "0.01", "10", "100")
ROOTS = ("x = 2", "x = 3", "x = -2", "x = 5")
COMPOSERS = ("Mozart", "Ludwig van Beethoven", "Bach", "Chopin")
PERCENTS = ("10%", "20%", "25%", "50%")
VITAMINS = ("A vitamin", "B vitamin", "C vitamin", "D vitamin")

HELD_OUT: list[Row] = [
    (PROCESSES, "Plants lose water through transpiration.", "D"),
    (PROCESSES, "The process is not respiration; it's photosynthesis.", "A"),
    (
        PROCESSES,
        "Photosynthesis makes sugar. Respiration burns it. The process asked for is respiration.",
        "B",
    ),
    (
        PROCESSES,
        "A. Photosynthesis\nB. Respiration\nC. Fermentation\nD. Transpiration\nThe correct one is C.",
        "C",
    ),
    (
        PROCESSES,
        "A. Photosynthesis\nB. Respiration\nC. Fermentation\nD. Transpiration\n\nYeast uses fermentation.",
        "C",
    ),
    (PROCESSES, "Yeast: fermentation", "C"),
    (PROCESSES, "Fermentation happens in yeast, whereas respiration happens in animals.", "C"),
    (PROCESSES, "The answer is C. Respiration needs oxygen.", "C"),
    (PROCESSES, "Answer: C. Respiration", None),
    (PROCESSES, "I'm torn between respiration and fermentation.", None),
    (PROCESSES, "Not C. B.", None),
    (WORDS, '"Quickly" is an adverb.', "D"),
    (WORDS, "The word describes a verb, so it is an adverb.", "D"),
    (WORDS, "Answer: an adverb", "D"),
    (WORDS, "It isn't a noun.", None),
    (WORDS, "D - Adverb", "D"),
    (WORDS, "D - Noun", None),
    (CUBES, "3^3 = 27", "B"),
    (CUBES, "3 × 3 × 3 = 27", "B"),
    (CUBES, "3 cubed is 27.", "B"),
    (CUBES, "9 squared is 81, so it is 81.", "C"),
    (CUBES, "There are 3 reasons for this. The first is size.", None),
    (CUBES, "The cube root of 27 is 3.", "D"),
    (CUBES, "\\boxed{27}", "B"),
    (CUBES, "27.", "B"),
    (CUBES, "Answer: twenty-seven", None),
    (LANDS, "Lima is in Peru.", "B"),
    (LANDS, "The capital of Peru is Lima.", "B"),
    (LANDS, "Chile borders Peru and Argentina.", None),
    (LANDS, "Machu Picchu is located in Peru, not in Chile or Brazil.", "B"),
    (LANDS, "Answer: Peru, South America", "B"),
    (LANDS, "Maybe Peru?", None),
    (LANDS, "Peru or Chile.", None),
    (LANDS, "I am sure it is not Brazil. I would say Peru.", "B"),
    (LANDS, "Brazil is the largest, but the question asks for the one with Lima, i.e. Peru.", "B"),
    (WATER, "Water vapour turning into liquid is called condensation.", "B"),
    (WATER, "This is the opposite of evaporation.", None),
    (WATER, "Evaporation comes before condensation.", None),
    (WATER, 'The term is "sublimation".', "D"),
    (WATER, "Rain is a form of precipitation.", "C"),
    (SIZES, "Jupiter is big. It is larger than the Earth.", "A"),
    (SIZES, "B", "B"),
    (SIZES, "The answer is that it is smaller than the Earth.", "B"),
    (DECIMALS, "1/10 = 0.1", "A"),
    (DECIMALS, "One percent is 0.01.", "B"),
    (DECIMALS, "10 × 10 = 100", "D"),
    (DECIMALS, "0.1 of 100 is 10.", "C"),
    (ROOTS, "2x = 6, so x = 3.", "B"),
    (ROOTS, "Hence x = -2.", "C"),
    (ROOTS, "The solution is x = 2", "A"),
    (ROOTS, "x = 2 or x = -2", None),
    (ROOTS, "x = 25", None),
    (COMPOSERS, "The Ninth Symphony was composed by Ludwig van Beethoven.", "B"),
    (COMPOSERS, "Answer: Beethoven", "B"),
    (COMPOSERS, "Answer: van Beethoven", "B"),
    (COMPOSERS, "Mozart? No, Bach.", "C"),
    (PERCENTS, "20/80 = 0.25 = 25%", "C"),
    (PERCENTS, "It is 25%.", "C"),
    (PERCENTS, "A rise of 5% gives 25%.", "C"),
    (VITAMINS, "Scurvy is a lack of C vitamin.", "C"),
    (VITAMINS, "The answer is A.", "A"),
]

LEFT_OUT: list[tuple[tuple[str, ...], str, str | None, str]] = [
    (
        PROCESSES,
        "C. Fermentation is wrong. B. Respiration is right.",
        "B",
        "a letter, its text, and a verdict in one sentence",
    ),
    (WORDS, "It modifies the noun, which makes it an adjective.", "C", "two options in one sentence"),
]
