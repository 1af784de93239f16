"""Pages of keys and values: a pool with reference counts, copies on write, and prefixes that requests share.

A page holds the keys and values of ``size`` consecutive positions in every layer. A sequence's block table lists its
pages. Pages of equal prefixes are one page, counted; what a sequence writes into, it owns alone. A page that nobody
holds keeps its content while there are others to hand out, so that a prompt which comes again finds it.

    pool.reserve(table, n)     grow a block table to n positions, or raise OutOfPages
    pool.fork(table)           one more sequence with the same pages
    pool.own(table, position)  the page of a position, copied if it is shared
    pool.publish / pool.find   full pages by the tokens that they hold, and what came before them
"""

from __future__ import annotations

from collections import OrderedDict

import torch

ROOT = 0  # the serial number of nothing


class OutOfPages(RuntimeError):
    """There is no page left to hand out."""


class PagePool:
    """Which pages are whose.

    Args:
        pages: how many there are.
        size: positions in a page.
    """

    def __init__(self, pages: int, size: int):
        self.pages, self.size = pages, size
        self.count = [0] * pages
        self.never = list(range(pages - 1, -1, -1))  # free, with nothing in them
        self.idle: OrderedDict[int, None] = OrderedDict()  # free, with a known prefix; the one longest idle first
        # A page is known by its tokens and the serial number of the page before it: no hash stands for a prefix.
        self.by_key: dict[tuple, int] = {}
        self.key_of: dict[int, tuple] = {}
        self.serial_of: dict[int, int] = {}
        self.serial = ROOT
        self.era = 0  # how often the weights have changed
        self.copies: list[tuple[int, int]] = []  # (from, to) that the caches have yet to make

    @property
    def free(self) -> int:
        """How many pages can be handed out."""
        return len(self.never) + len(self.idle)

    @property
    def held(self) -> int:
        """How many are somebody's."""
        return self.pages - self.free

    def pages_for(self, positions: int) -> int:
        """How many pages so many positions take."""
        return -(-positions // self.size)

    def take(self) -> int:
        """A page of one's own."""
        if self.never:
            page = self.never.pop()
        elif self.idle:
            page, _ = self.idle.popitem(last=False)
            self._forget(page)
        else:
            raise OutOfPages(f"all {self.pages} pages of {self.size} positions are in use")
        self.count[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder."""
        if self.count[page] == 0:
            self.idle.pop(page)
        self.count[page] += 1

    def release(self, table: list[int]) -> None:
        """One holder of each page less; the table is empty afterwards."""
        for page in reversed(table):  # the end of a prefix is forgotten before its beginning
            self.count[page] -= 1
            if self.count[page] == 0:
                if page in self.key_of:
                    self.idle[page] = None
                else:
                    self.never.append(page)
        table.clear()

    def reserve(self, table: list[int], positions: int) -> None:
        """Pages for so many positions; all that are missing, or none and ``OutOfPages``."""
        missing = self.pages_for(positions) - len(table)
        if missing > self.free:
            raise OutOfPages(
                f"{missing} pages of {self.size} positions are wanted, {self.free} of {self.pages} are free"
            )
        table.extend(self.take() for _ in range(missing))

    def fork(self, table: list[int]) -> list[int]:
        """The same pages for another sequence."""
        for page in table:
            self.hold(page)
        return list(table)

    def own(self, table: list[int], position: int) -> None:
        """Before a position is written: its page is the table's alone, a copy if it was shared."""
        index = position // self.size
        page = table[index]
        if self.count[page] > 1:
            copy = self.take()
            self.copies.append((page, copy))
            self.count[page] -= 1
            table[index] = copy
        elif page in self.key_of:
            self._forget(page)

    def publish(self, table: list[int], tokens) -> None:
        """The full pages of a table, found from now on by what they hold."""
        before = ROOT
        for page, held in zip(table, self._full(tokens), strict=False):
            key = (before, held)
            if key not in self.by_key and page not in self.key_of:
                self.serial += 1
                self.by_key[key], self.key_of[page], self.serial_of[page] = page, key, self.serial
            before = self.serial_of.get(self.by_key.get(key))
            if before is None:
                break

    def find(self, tokens) -> list[int]:
        """Pages that hold a prefix of these tokens, held for the caller."""
        before, found = ROOT, []
        for held in self._full(tokens):
            page = self.by_key.get((before, held))
            if page is None:
                break
            self.hold(page)
            found.append(page)
            before = self.serial_of[page]
        return found

    def _full(self, tokens):
        """The tokens of each full page."""
        return (tuple(tokens[at : at + self.size]) for at in range(0, len(tokens) - self.size + 1, self.size))

    def forget_all(self) -> None:
        """What pages hold is no prefix any more: the weights have changed."""
        self.era += 1
        self.never.extend(self.idle)
        self.idle.clear()
        for known in (self.by_key, self.key_of, self.serial_of):
            known.clear()

    def _forget(self, page: int) -> None:
        key = self.key_of.pop(page, None)
        if key is not None:
            del self.by_key[key], self.serial_of[page]


class Caches:
    """Keys and values of every layer, in pages; a layer's tensors are made when it is first written.

    Memory that no page has touched is not the process's yet on a CPU.
    """

    def __init__(self, pages: int, size: int):
        self.pages, self.size = pages, size
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def layer(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(keys, values) of a layer, [pages, size, heads, dim] each, for tokens [T, heads, dim] like these."""
        found = self.layers.get(index)
        if found is None:
            with torch.inference_mode(False):  # later calls may be outside of a caller's
                found = tuple(x.new_empty((self.pages, self.size, *x.shape[1:])) for x in (k, v))
            self.layers[index] = found
        return found

    def write(self, index: int, k, v, slots) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens' keys and values into their slots, page·size + place; the layer's caches."""
        caches = self.layer(index, k, v)
        for cache, x in zip(caches, (k, v), strict=True):
            cache.view(-1, *x.shape[1:]).index_copy_(0, slots, x)
        return caches

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Whole pages, (from, to) each, in order."""
        if not pairs:
            return
        for caches in self.layers.values():
            for cache in caches:
                source, target = (torch.tensor(x, device=cache.device) for x in zip(*pairs, strict=True))
                cache.index_copy_(0, target, cache.index_select(0, source))
