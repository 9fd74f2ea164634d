//! Page-aligned ranges of a program's address space.

use core::fmt;

use farmem_region::{PAGE_SHIFT, PAGE_SIZE};

/// A page-aligned, half-open range of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddressRange {
    start: usize,
    end: usize,
}

impl AddressRange {
    /// From `start` up to but without `end`, widened to whole pages.
    #[must_use]
    pub const fn new(start: usize, end: usize) -> Self {
        let start = start & !(PAGE_SIZE - 1);
        let end = (end.saturating_add(PAGE_SIZE - 1)) & !(PAGE_SIZE - 1);
        Self { start, end: if end < start { start } else { end } }
    }

    /// `pages` pages from `start` on.
    #[must_use]
    pub const fn pages_from(start: usize, pages: usize) -> Self {
        Self::new(start, start.saturating_add(pages << PAGE_SHIFT))
    }

    /// First address.
    #[must_use]
    pub const fn start(self) -> usize {
        self.start
    }

    /// The address after the last one.
    #[must_use]
    pub const fn end(self) -> usize {
        self.end
    }

    /// Length in bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        self.end - self.start
    }

    /// Length in pages.
    #[must_use]
    pub const fn pages(self) -> usize {
        self.bytes() >> PAGE_SHIFT
    }

    /// Whether nothing is in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether the address lies in it.
    #[must_use]
    pub const fn contains(self, address: usize) -> bool {
        self.start <= address && address < self.end
    }

    /// The part that both have.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self { start, end: self.end.min(other.end).max(start) }
    }

    /// Whether both have a part in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        !self.intersect(other).is_empty()
    }

    /// What is left of it without `other`: the part before and the part after, either may be
    /// empty.
    #[must_use]
    pub fn without(self, other: Self) -> [Self; 2] {
        let cut = self.intersect(other);
        if cut.is_empty() {
            return [self, Self { start: self.end, end: self.end }];
        }
        [Self { start: self.start, end: cut.start }, Self { start: cut.end, end: self.end }]
    }
}

impl fmt::Debug for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}-{:#x}", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_leaves_what_is_outside() {
        let whole = AddressRange::new(0x1000, 0x9000);
        let check = |cut: (usize, usize), before: usize, after: usize| {
            let [a, b] = whole.without(AddressRange::new(cut.0, cut.1));
            assert_eq!((a.pages(), b.pages()), (before, after));
        };
        check((0x3000, 0x5000), 2, 4);
        check((0x0, 0x5000), 0, 4);
        check((0x3000, 0xf000), 2, 0);
        check((0x0, 0xf000), 0, 0);
        check((0xa000, 0xf000), 8, 0);
    }
}
