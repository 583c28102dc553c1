"""Words that names and values of the almanac are made of.

All are common English words that usual tokenizers keep whole, in prose and inside quotes: a small
model misspells names that fall into many pieces, and that would measure spelling, not reasoning.
"""

from __future__ import annotations

__all__ = ["GOODS", "NAME_PARTS", "OCCUPATIONS"]

_TOWN = (
    "Silver Cold Green Stone Salt Winter Summer Spring Clear Deep High Long North South East West Red Blue "
    "White Black Golden Rose Old New Fair Grand Apple Ash Mill",
    "Harbor Falls Ridge Valley Creek Bridge Grove Field Hill Haven Port Bay Point Lake River Ford Springs "
    "Cross Gate Shore Cliff Island Forest Park Landing Mountain Plains Heights Canyon Rock Beach Cove "
    "Crossing Garden Station Junction Hollow",
)
_PERSON = (
    "Rose Hope Mark Frank Grant Jack Lily Martin Victor Thomas Anna Alice Peter Paul Simon Henry George "
    "Edward Arthur Max Sarah Maria David Daniel Samuel Jacob Adam Louis Charles Jane Marie John James "
    "William Robert Michael Richard Joseph Mary Elizabeth Anne Andrew Matthew Luke Stephen Alexander Scott "
    "Ben Tom Emily",
    "Carpenter Miller Baker Cook Fisher Hunter Shepherd Stone Wood Fields Rivers Brook Marsh Fox Wolf Bird "
    "Swan Crane Hawk Drake Lamb Bishop King Knight Page Porter Potter Weaver Taylor Smith Turner Walker "
    "Wheeler Gardner Barber Butler Cooper Farmer Fletcher Glass Marshall Palmer Prince Singer Spencer Steel "
    "Tyler Ward Waters Young Bell Banks Bush Day English French Frost Gold Hall Hart Holland House Love "
    "Moon Moore Noble North Paris Peak Power Price Rice Sharp Short Small Storm Street Strong Temple West "
    "White Wise",
)
_COMPANY = (
    "Iron United Royal Union Central National Northern Southern Eastern Western Atlantic Pacific Modern "
    "Global Master Great Prime Public First General Universal Standard Common Future Energy Space World "
    "Earth Home Family Light Fire Water Wind Snow Sky True Real Open Safe Double Single Simple Solid Direct "
    "Active Digital Electric Capital Major Quality Vision Point Circle Square Center",
    "Trading Supply Works Brothers Partners Mills Tools Goods Crafts Trust Press Mining Motor Metal Paper "
    "Export",
)
_BOOK = (
    "Quiet Broken Hidden Last Lost Secret Silent Empty Burning Frozen Dark Ancient Strange Sleeping Gentle "
    "Sweet Happy Perfect Second Third Final Narrow Curious Patient Rising",
    "Mirror Garden Letter Door Window Clock Key Road Journey Shadow Song Promise Dream Tower Island Winter "
    "Summer Night Morning Storm River Ocean Mountain Forest Bridge Castle Queen Soldier Teacher Doctor "
    "Child Mother Father Brother Sister Hunter Witness",
)
_SHIP = (
    "Swift Loyal Bold Wild Noble Flying Racing Rapid Giant Little Holy Free Brave Proud Lucky",
    "Comet Eagle Falcon Tiger Lion Wolf Bear Horse Whale Shark Turtle Swan Hawk Raven Owl Arrow Spirit Wave "
    "Star Moon Sun Thunder Lightning Rocket Sword Princess Pearl",
)

NAME_PARTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    kind: (pattern, tuple(first.split()), tuple(second.split()))
    for kind, pattern, (first, second) in (
        ("town", "{} {}", _TOWN),
        ("person", "{} {}", _PERSON),
        ("company", "{} {} Company", _COMPANY),
        ("book", "The {} {}", _BOOK),
        ("ship", "SS {} {}", _SHIP),
    )
}
"""For each kind of entity: the pattern of its names, the first words, the second words."""

_GOODS = (
    "clocks lamps boats candles bells blankets bottles bricks brushes buttons cheese chairs cakes cloth "
    "coins cups curtains dolls drums engines flags flowers glasses gloves hats honey knives leather "
    "locks maps masks mirrors needles oil olives paint paper pens pottery ropes rugs salt shoes silk "
    "soap spices spoons statues sugar swords tables tea tents tiles tools toys wheels wine wool apples "
    "oranges watches"
)

_OCCUPATIONS = (
    "baker painter teacher doctor lawyer farmer singer writer poet judge priest nurse tailor chef "
    "butcher chemist clerk dancer dentist driver editor engineer gardener guard guide hunter inventor "
    "journalist merchant miner musician philosopher photographer physicist pilot printer publisher "
    "scientist shepherd soldier surgeon translator architect biologist geologist historian"
)

GOODS: tuple[str, ...] = tuple(_GOODS.split())
"""What towns are known for and companies make."""

OCCUPATIONS: tuple[str, ...] = tuple(_OCCUPATIONS.split())
"""What people worked as."""
