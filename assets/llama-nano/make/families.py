"""The table of task families, in a fixed order."""

import arithmetic
import facts
import lists
import people
import recall
import records
import words
from family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for module in (facts, words, arithmetic, lists, records, people, recall)
    for family in module.FAMILIES
}
