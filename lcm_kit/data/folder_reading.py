"""What a check says of how captions were read: which conventions it found, and what is made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from lcm_kit.config.data import Captions, Data
from lcm_kit.data.caption_tags import prepared
from lcm_kit.data.findings import Finding, few, number
from lcm_kit.data.records import Listing

_LINES = {
    "joined": "joined into one; data.captions.lines each makes a caption of each line",
    "first": "read to the end of their first line",
    "each": "read as so many captions",
}


def texts_of(listing: Listing, data: Data) -> dict[str, str]:
    """Every caption of a listing that was read as written, the trigger before it where `data` says so.

    By the id of its image; those after the first with their number behind it.
    """
    how = data.captions.unshuffled
    captions = {record.id: prepared(record.captions, how, data.trigger) for record in listing.good}
    return {
        id if k == 1 else f"{id} (caption {k})": text
        for id, each in captions.items()
        for k, (text, _) in enumerate(each, start=1)
    }


def findings(listing: Listing, data: Data) -> Iterator[Finding]:
    """What is read otherwise than one caption a picture, once an epoch; `listing`: as written."""
    yield from _folders(listing)
    if found := listing.several_lines:
        of = number(len(found), "caption", after=("is", "are"))
        yield Finding("note", f"{of} of several lines: {few(found)}; {_LINES[data.captions.lines]}.")
    several = {record.id: len(record.captions) for record in listing.good if len(record.captions) > 1}
    if several:
        most = max(several, key=lambda id: several[id])
        yield Finding(
            "note",
            f"{number(len(several), 'image', after=('has', 'have'))} several captions, "
            f"{sum(several.values())} in all and {several[most]} at most ({most}); every step draws one by "
            "its weight.",
        )
    if data.captions.trigger_in_front and data.trigger:
        put = _in_front(listing, data.captions, data.trigger)
        yield Finding(
            "note", f"The trigger {data.trigger!r} is put before {number(put, 'caption')}, which lacked it."
        )
    if data.captions.shuffle_tags:
        yield _shuffled(listing, data)


def _folders(listing: Listing) -> Iterator[Finding]:
    """What the names of subfolders were taken for."""
    if listing.layout.doubtful:
        yield Finding(
            "note",
            f"Subfolders are named as kohya's trainer has them, but {listing.layout.doubtful}; so their "
            "names say nothing here. If they are repeats and classes, set data.captions.layout to kohya.",
        )
    classes = set(listing.layout.classes.values())
    if not classes:
        return
    count = Counter(listing.layout.classes[record.id].folder for record in listing.good)
    said = [
        f"{its.folder} ({number(count[its.folder], 'image')}, {its.repeats} times each: {its.name!r})"
        for its in sorted(classes, key=lambda its: its.folder)
    ]
    samples = sum(record.repeats for record in listing.good)
    yield Finding(
        "note",
        f"Subfolders are read as kohya's trainer has them: {few(said)}; an epoch has {samples:,} samples of "
        f"{number(len(listing.good), 'image')}. Set data.captions.layout to plain if their numbers are no "
        "repeats.",
    )
    if found := listing.named:
        has = number(len(found), "image", after=("has no caption and gets", "have no caption and get"))
        yield Finding("note", f"{has} the name of the folder for one, as with kohya's trainer: {few(found)}.")


def _in_front(listing: Listing, how: Captions, trigger: str) -> int:
    each = [(record.captions, prepared(record.captions, how.unshuffled, trigger)) for record in listing.good]
    return sum(len(set(after) - set(before)) for before, after in each)


def _shuffled(listing: Listing, data: Data) -> Finding:
    written = texts_of(listing, data)
    all_orders = [prepared(record.captions, data.captions, data.trigger) for record in listing.good]
    more = sum(map(len, all_orders)) - len(written)
    if not more:
        return Finding(
            "warning",
            f"data.captions.shuffle_tags {data.captions.shuffle_tags} shuffles nothing: no caption has two "
            "tags, with a comma between them, that may change places; set it to 0.",
        )
    return Finding(
        "note",
        f"Tags are shuffled: {number(len(written), 'caption')} and {more} other orders of their tags are "
        "encoded, and every step draws one.",
    )
