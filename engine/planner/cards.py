"""Cards to plan for that are not in this computer."""

import re
from dataclasses import dataclass

from engine.errors import DeviceError
from engine.hardware import Device
from engine.units import GIB

# What a desktop, a browser and their driver hold on a card that also draws the screen; measured by nobody, a guess.
DESKTOP_GIB = 0.5


@dataclass(frozen=True)
class Card:
    """A card by the name people know it by.

    `total_gib`: memory that CUDA reports, rounded down: less than on the box, as the driver and error correction take
    some. `sm`: compute capability, 89 for 8.9. `screen`: whether it usually draws one.
    """

    name: str
    total_gib: float
    sm: int
    screen: bool = True

    @property
    def usable_bytes(self) -> int:
        """Memory that a run may use: without what a desktop takes."""
        return int((self.total_gib - (DESKTOP_GIB if self.screen else 0)) * GIB)


CARDS: tuple[Card, ...] = (
    Card("RTX 3050 8 GB", 7.6, 86),
    Card("RTX 4060 8 GB", 7.6, 89),
    Card("RTX 3080 10 GB", 9.6, 86),
    Card("RTX 2080 Ti 11 GB", 10.7, 75),
    Card("RTX 3060 12 GB", 11.6, 86),
    Card("RTX 4070 12 GB", 11.6, 89),
    Card("T4 16 GB", 14.5, 75, screen=False),
    Card("RTX 4060 Ti 16 GB", 15.6, 89),
    Card("RTX 4080 16 GB", 15.6, 89),
    Card("RTX 5080 16 GB", 15.4, 120),
    Card("A10 24 GB", 22.0, 86, screen=False),
    Card("L4 24 GB", 22.0, 89, screen=False),
    Card("RTX 3090 24 GB", 23.6, 86),
    Card("RTX 4090 24 GB", 23.6, 89),
    Card("RTX 5090 32 GB", 31.3, 120),
    Card("V100 32 GB", 31.7, 70, screen=False),
    Card("A100 40 GB", 39.4, 80, screen=False),
    Card("L40S 48 GB", 44.4, 89, screen=False),
    Card("RTX A6000 48 GB", 47.5, 86),
    Card("RTX 6000 Ada 48 GB", 47.5, 89),
    Card("A100 80 GB", 79.1, 80, screen=False),
    Card("H100 80 GB", 79.1, 90, screen=False),
    Card("RTX PRO 6000 96 GB", 94.9, 120),
)


_SIZE = re.compile(r"([+-]?\d+(?:\.\d+)?) *(GiB)?", re.IGNORECASE)


def find_card(name: str) -> Card:
    """Return the card that `name` means: its name, or words that only one card's name has; case is the same.

    "24 GiB" is any card that lets a run have as much.

    Raises:
        DeviceError: there is none, or several, or the size is not above 0.
    """
    if sized := _SIZE.fullmatch(name.strip()):
        if float(sized[1]) <= 0:
            raise DeviceError(f"The memory of a card must be above 0, as in '24 GiB', got {name!r}.")
        if sized[2]:
            return Card(f"A card of {sized[1]} GiB", float(sized[1]), sm=0, screen=False)
    words = name.lower().replace("gb", " gb").split()
    found = [card for card in CARDS if card.name.lower() == name.strip().lower()]
    found = found or [card for card in CARDS if words and all(word in card.name.lower().split() for word in words)]
    if len(found) != 1:
        names = ", ".join(card.name for card in found or CARDS)
        raise DeviceError(f"card must be one of {names}, got {name!r}. Give its whole name, or memory as in '24 GiB'.")
    return found[0]


def card_device(name: str) -> Device:
    """Return the card that `name` means as a device to plan for, nothing else running on it.

    Raises:
        DeviceError: there is none, or several.
    """
    card = find_card(name)
    return Device("cuda:0", card.name, int(card.total_gib * GIB), card.usable_bytes, sm=card.sm, here=False)
