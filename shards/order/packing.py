"""Items of a chunk: packs of documents or clips, clips, or groups of clips of similar length. NumPy and plain lists.

Best-fit over 64 open packs reaches within half a percent of packing everything at once, in one streaming pass
(Ding et al., arXiv 2404.10830, pack this way to avoid cutting documents).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import chain

import numpy as np

from shards.order.items import Elements, Items, elements_of, starts_of
from shards.order.shuffle import Ints

_NUMBER_BITS = 40
_NUMBER = (1 << _NUMBER_BITS) - 1


def clips(order: Ints, lengths: Ints) -> Items:
    """One clip per item. ``lengths`` [len(order)] are frames."""
    return Items(np.arange(len(order) + 1, dtype=np.int64), elements_of(order, 0, lengths))


def sort_windows(lengths: Ints, window: int) -> Ints:
    """Positions sorted by length inside runs of ``window``; equal lengths keep their order."""
    return np.lexsort((lengths, np.arange(len(lengths)) // window)).astype(np.int64)


def cut_documents(order: Ints, lengths: Ints, block_tokens: int) -> Elements:
    """Documents as pieces of at most ``block_tokens``; only documents longer than that are cut, empty ones vanish."""
    pieces = -(-lengths // block_tokens)
    first = starts_of(pieces)
    start = (np.arange(first[-1]) - np.repeat(first[:-1], pieces)) * block_tokens
    length = np.minimum(np.repeat(lengths, pieces) - start, block_tokens)
    return elements_of(np.repeat(order, pieces), start, length)


def best_fit(lengths: Ints, capacity: int, open_packs: int = 64) -> tuple[Ints, int]:
    """Number of the pack each piece goes to, and the number of packs.

    A piece goes to the open pack it fills best. When nothing fits and 64 packs are open, the fullest is closed. The
    packs still open at the end are packed once more, longest piece first. Packs are numbered by their first piece.

    Args:
        lengths: pieces in order, each ``1..capacity``.
        capacity: tokens per pack.
        open_packs: packs kept open; the cost per piece hardly depends on it.
    """
    partial = (lengths < capacity).nonzero()[0]
    sizes: list[int] = lengths[partial].tolist()
    shortest = min(sizes, default=1)
    state: list[int] = []  # room << 40 | pack, ascending
    packs, count = [0] * len(sizes), 0
    for piece, size in enumerate(sizes):
        best = bisect_left(state, size << _NUMBER_BITS)
        if best < len(state):
            entry = state.pop(best) - (size << _NUMBER_BITS)
        else:
            if len(state) == open_packs:
                del state[0]
            entry = (capacity - size) << _NUMBER_BITS | count
            count += 1
        packs[piece] = entry & _NUMBER
        if entry >> _NUMBER_BITS >= shortest:
            insort(state, entry)
    assigned = count + np.arange(len(lengths), dtype=np.int64)  # a full piece is a pack of its own
    assigned[partial] = packs
    _repack(assigned, lengths, [entry & _NUMBER for entry in state], capacity)
    _, first, compact = np.unique(assigned, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[compact], len(first)


def _repack(assigned: Ints, lengths: Ints, unfilled: list[int], capacity: int) -> None:
    """Best-fit decreasing over the packs that stayed open, in place; no worse than before or left alone."""
    pieces = np.isin(assigned, unfilled).nonzero()[0]
    pieces = pieces[np.argsort(-lengths[pieces], kind="stable")]
    rooms: list[tuple[int, int]] = []
    new: list[int] = []
    for size in lengths[pieces].tolist():
        best = bisect_left(rooms, (size, -1))
        room, pack = rooms.pop(best) if best < len(rooms) else (capacity, len(rooms))
        insort(rooms, (room - size, pack))
        new.append(pack)
    if len(rooms) < len(unfilled):
        assigned[pieces] = np.asarray(unfilled, dtype=np.int64)[new]


def pack(order: Ints, lengths: Ints, block_tokens: int) -> Items:
    """Documents packed into blocks of ``block_tokens``: every token exactly once, only over-long documents cut.

    Args:
        order: sample numbers in order.
        lengths: [len(order)] tokens of each.
        block_tokens: tokens per pack.
    """
    pieces = cut_documents(order, lengths, block_tokens)
    packs, count = best_fit(pieces["length"].astype(np.int64), block_tokens)
    by_pack = np.argsort(packs, kind="stable")
    return Items(starts_of(np.bincount(packs, minlength=count)), pieces[by_pack])


def group(order: Ints, lengths: Ints, budget: int, window: int, hashes: Ints | None = None) -> tuple[Items, Ints]:
    """Clips of similar length grouped so that ``clips x longest`` stays within ``budget`` frames.

    Args:
        order: sample numbers in order.
        lengths: [len(order)] frames of each clip; one longer than the budget forms a group of its own.
        budget: frames per group, padding included.
        window: clips sorted by length together; 0 groups them in the order they come.
        hashes: [len(order)] text hashes; given, no group holds the same text twice.

    Returns:
        the groups, and the number of the window each was made in.
    """
    positions = sort_windows(lengths, window) if window else np.arange(len(order), dtype=np.int64)
    sorted_lengths: list[int] = lengths[positions].tolist()
    texts = hashes[positions].tolist() if hashes is not None else None
    groups: list[list[int]] = []
    windows: list[int] = []
    step = window or max(len(order), 1)
    for begin in range(0, len(order), step):
        waiting = list(range(begin, min(begin + step, len(order))))
        while waiting:
            made, waiting = _fill_groups(waiting, sorted_lengths, texts, budget, window > 0)
            groups += made
            windows += [begin // step] * len(made)
    chosen = np.fromiter(chain.from_iterable(groups), dtype=np.int64, count=len(order))
    sizes = np.fromiter(map(len, groups), dtype=np.int64, count=len(groups))
    picked = positions[chosen]
    items = Items(starts_of(sizes), elements_of(order[picked], 0, lengths[picked]))
    return items, np.asarray(windows, dtype=np.int64)


def _fill_groups(
    candidates: list[int], lengths: list[int], texts: list[int] | None, budget: int, ascending: bool
) -> tuple[list[list[int]], list[int]]:
    """One greedy pass: the groups made, and the candidates set aside because their text was already in the group."""
    sizes = [lengths[position] for position in candidates]
    names = [texts[position] for position in candidates] if texts is not None else None
    groups: list[list[int]] = []
    aside: list[int] = []
    begin = 0
    while begin < len(candidates):
        end = _reach(sizes, begin, budget) if ascending else begin
        if end > begin and (names is None or len(set(names[begin:end])) == end - begin):
            groups.append(candidates[begin:end])
        else:
            members, skipped, end = _one_by_one(sizes, names, begin, budget)
            groups.append([candidates[number] for number in members])
            aside += skipped
        begin = end
    return groups, [candidates[number] for number in aside]


def _reach(sizes: list[int], begin: int, budget: int) -> int:
    """Where a group of ascending sizes from ``begin`` on must end; it holds at least one."""
    low, high = begin + 1, min(begin + max(budget // max(sizes[begin], 1), 1), len(sizes))
    while low < high:
        middle = (low + high + 1) // 2
        if (middle - begin) * sizes[middle - 1] <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _one_by_one(sizes: list[int], names: list[int] | None, begin: int, budget: int) -> tuple[list[int], list[int], int]:
    """A group from ``begin`` on: its members, what was set aside because of its text, and where the next one begins."""
    members: list[int] = []
    aside: list[int] = []
    longest, seen = 0, set()
    for number in range(begin, len(sizes)):
        reach = max(longest, sizes[number])
        if members and (len(members) + 1) * reach > budget:
            return members, aside, number
        if names is not None:
            if names[number] in seen:
                aside.append(number)
                continue
            seen.add(names[number])
        members.append(number)
        longest = reach
    return members, aside, len(sizes)
