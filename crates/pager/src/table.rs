//! The page table of one address space: what the pager knows of every page it has handled.
//!
//! Pages are kept in chunks of 512 (2 MiB of addresses), 32 bytes a page. A page without an entry
//! has never been out: it is either resident and unknown to the servers, or untouched.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use farmem_region::{FrameId, PAGE_SHIFT, PageIndex, Version};
use farmem_vmem::AddressRange;

/// Content of a page as 128 bits of a keyed hash: two pages with equal fingerprints are taken to
/// be equal. The key is random for every pager, so contents cannot be chosen to collide.
pub(crate) type Fingerprint = u128;

/// Where a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the program's memory.
    Resident,
    /// Nowhere: its content is zero.
    Zero,
    /// Only in its slot on the servers.
    Out,
    /// Asked for, on its way in.
    Fetching,
    /// In the victim buffer, in this frame.
    Victim(FrameId),
}

/// What is known of one page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    /// Fingerprint of the server's copy; has no meaning without one.
    pub(crate) fingerprint: Fingerprint,
    version_and_use: u64,
    slot: u32,
    place: u32,
}

const _: () = assert!(size_of::<Entry>() == 32);

const NO_SLOT: u32 = u32::MAX;
const USE_SHIFT: u32 = 56;
const VERSION_MASK: u64 = (1 << USE_SHIFT) - 1;
/// Highest use count: a page this hot survives that many passes of the clock hand.
pub(crate) const USE_MAX: u8 = 3;

const PLACE_RESIDENT: u32 = 0;
const PLACE_ZERO: u32 = 1;
const PLACE_OUT: u32 = 2;
const PLACE_FETCHING: u32 = 3;
const PLACE_FRAMES: u32 = 4;

impl Entry {
    /// An entry without a copy on the servers.
    #[must_use]
    pub(crate) const fn new(place: Place) -> Self {
        let mut entry = Self { fingerprint: 0, version_and_use: 0, slot: NO_SLOT, place: 0 };
        entry.set_place(place);
        entry
    }

    /// Where the page is.
    #[must_use]
    pub(crate) const fn place(&self) -> Place {
        match self.place {
            PLACE_RESIDENT => Place::Resident,
            PLACE_ZERO => Place::Zero,
            PLACE_OUT => Place::Out,
            PLACE_FETCHING => Place::Fetching,
            frame => Place::Victim(FrameId::new(frame - PLACE_FRAMES)),
        }
    }

    /// Records where the page is.
    pub(crate) const fn set_place(&mut self, place: Place) {
        self.place = match place {
            Place::Resident => PLACE_RESIDENT,
            Place::Zero => PLACE_ZERO,
            Place::Out => PLACE_OUT,
            Place::Fetching => PLACE_FETCHING,
            Place::Victim(frame) => frame.get() + PLACE_FRAMES,
        };
    }

    /// The page of the region that holds the server's copy, and the copy's version.
    #[must_use]
    pub(crate) fn copy(&self) -> Option<(PageIndex, Version)> {
        (self.slot != NO_SLOT).then(|| {
            let version = Version::new(self.version_and_use & VERSION_MASK);
            (PageIndex::new(u64::from(self.slot)), version)
        })
    }

    /// Records the server's copy.
    pub(crate) fn set_copy(&mut self, slot: PageIndex, version: Version, fingerprint: Fingerprint) {
        self.slot = u32::try_from(slot.get())
            .ok()
            .filter(|&s| s != NO_SLOT)
            .unwrap_or_else(|| unreachable!("slots are bounded by SLOTS_MAX"));
        assert!(version.get() <= VERSION_MASK, "versions fit in 56 bits");
        self.version_and_use = (self.version_and_use & !VERSION_MASK) | version.get();
        self.fingerprint = fingerprint;
    }

    /// Forgets the server's copy and returns its slot.
    pub(crate) fn take_copy(&mut self) -> Option<PageIndex> {
        let slot = self.copy().map(|(slot, _)| slot);
        self.slot = NO_SLOT;
        slot
    }

    /// How often the page was missed soon after it was moved out, 0 to [`USE_MAX`].
    #[must_use]
    pub(crate) const fn uses(&self) -> u8 {
        (self.version_and_use >> USE_SHIFT) as u8
    }

    /// Sets the use count; saturates at [`USE_MAX`].
    pub(crate) fn set_uses(&mut self, uses: u8) {
        let uses = u64::from(uses.min(USE_MAX));
        self.version_and_use = (self.version_and_use & VERSION_MASK) | (uses << USE_SHIFT);
    }
}

const CHUNK_SHIFT: u32 = 9;
const CHUNK_PAGES: usize = 1 << CHUNK_SHIFT;

/// Chunk numbers are spread well enough by one multiplication.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct ChunkHasher(u64);

impl Hasher for ChunkHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_usize(usize::from(byte));
        }
    }
    fn write_usize(&mut self, number: usize) {
        let mixed = (self.0 ^ number as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// The entries of one address space.
#[derive(Debug, Clone, Default)]
pub(crate) struct PageTable {
    chunks: HashMap<usize, Box<ChunkSlot>, BuildHasherDefault<ChunkHasher>>,
}

#[derive(Debug, Clone)]
struct ChunkSlot {
    used: u32,
    /// One bit a page: whether `entries` has it.
    known: [u64; CHUNK_PAGES / 64],
    entries: [Entry; CHUNK_PAGES],
}

impl ChunkSlot {
    fn new() -> Box<Self> {
        Box::new(Self {
            used: 0,
            known: [0; CHUNK_PAGES / 64],
            entries: [Entry::new(Place::Zero); CHUNK_PAGES],
        })
    }

    const fn has(&self, index: usize) -> bool {
        self.known[index / 64] & (1 << (index % 64)) != 0
    }
}

const fn split(address: usize) -> (usize, usize) {
    let page = address >> PAGE_SHIFT;
    (page >> CHUNK_SHIFT, page & (CHUNK_PAGES - 1))
}

impl PageTable {
    /// The entry of the page at `address`.
    #[must_use]
    pub(crate) fn get(&self, address: usize) -> Option<&Entry> {
        let (chunk, index) = split(address);
        let chunk = self.chunks.get(&chunk)?;
        chunk.has(index).then(|| &chunk.entries[index])
    }

    /// The entry of the page at `address`, to change.
    pub(crate) fn get_mut(&mut self, address: usize) -> Option<&mut Entry> {
        let (chunk, index) = split(address);
        let chunk = self.chunks.get_mut(&chunk)?;
        if chunk.has(index) { Some(&mut chunk.entries[index]) } else { None }
    }

    /// Puts an entry, over an earlier one.
    pub(crate) fn put(&mut self, address: usize, entry: Entry) -> &mut Entry {
        let (chunk, index) = split(address);
        let chunk = self.chunks.entry(chunk).or_insert_with(ChunkSlot::new);
        if !chunk.has(index) {
            chunk.known[index / 64] |= 1 << (index % 64);
            chunk.used += 1;
        }
        chunk.entries[index] = entry;
        &mut chunk.entries[index]
    }

    /// Takes an entry out.
    pub(crate) fn take(&mut self, address: usize) -> Option<Entry> {
        let (number, index) = split(address);
        let chunk = self.chunks.get_mut(&number)?;
        if !chunk.has(index) {
            return None;
        }
        chunk.known[index / 64] &= !(1 << (index % 64));
        chunk.used -= 1;
        let entry = chunk.entries[index];
        if chunk.used == 0 {
            self.chunks.remove(&number);
        }
        Some(entry)
    }

    /// Takes out all entries of a range, in any order. Costs no more for a large range than the
    /// table has chunks.
    pub(crate) fn take_range(&mut self, range: AddressRange, each: &mut dyn FnMut(usize, Entry)) {
        let first = split(range.start()).0;
        let last = split(range.end().saturating_sub(1)).0;
        let numbers: Vec<usize> = if last - first > self.chunks.len() {
            self.chunks.keys().copied().filter(|n| (first..=last).contains(n)).collect()
        } else {
            (first..=last).filter(|n| self.chunks.contains_key(n)).collect()
        };
        for number in numbers {
            let base = number << (CHUNK_SHIFT + PAGE_SHIFT);
            let part = AddressRange::pages_from(base, CHUNK_PAGES).intersect(range);
            for address in (part.start()..part.end()).step_by(1 << PAGE_SHIFT) {
                if let Some(entry) = self.take(address) {
                    each(address, entry);
                }
            }
        }
    }

    /// Calls `each` for every entry, in any order.
    pub(crate) fn for_each(&self, each: &mut dyn FnMut(usize, &Entry)) {
        for (&number, chunk) in &self.chunks {
            for index in (0..CHUNK_PAGES).filter(|&index| chunk.has(index)) {
                each(((number << CHUNK_SHIFT) + index) << PAGE_SHIFT, &chunk.entries[index]);
            }
        }
    }

    /// Calls `each` for every entry, to change it; entries for which it returns false are dropped.
    pub(crate) fn retain(&mut self, each: &mut dyn FnMut(usize, &mut Entry) -> bool) {
        self.chunks.retain(|&number, chunk| {
            for index in 0..CHUNK_PAGES {
                let address = ((number << CHUNK_SHIFT) + index) << PAGE_SHIFT;
                if chunk.has(index) && !each(address, &mut chunk.entries[index]) {
                    chunk.known[index / 64] &= !(1 << (index % 64));
                    chunk.used -= 1;
                }
            }
            chunk.used > 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_pack_and_unpack() {
        let mut entry = Entry::new(Place::Victim(FrameId::new(77)));
        assert_eq!(entry.copy(), None);
        entry.set_uses(9);
        entry.set_copy(PageIndex::new(5), Version::new(1 << 40), 42);
        assert_eq!(entry.copy(), Some((PageIndex::new(5), Version::new(1 << 40))));
        assert_eq!((entry.uses(), entry.fingerprint), (USE_MAX, 42));
        assert_eq!(entry.place(), Place::Victim(FrameId::new(77)));
        for place in [Place::Resident, Place::Zero, Place::Out, Place::Fetching] {
            entry.set_place(place);
            assert_eq!(entry.place(), place);
        }
        assert_eq!(entry.take_copy(), Some(PageIndex::new(5)));
        assert_eq!(entry.copy(), None);
    }

    #[test]
    fn ranges_are_taken_out_whole_and_alone() {
        let mut table = PageTable::default();
        for page in 0..2000usize {
            table.put(page << PAGE_SHIFT, Entry::new(Place::Out));
        }
        let mut taken = 0;
        table.take_range(AddressRange::pages_from(500 << PAGE_SHIFT, 1000), &mut |_, _| taken += 1);
        assert_eq!(taken, 1000);
        assert!(table.get(499 << PAGE_SHIFT).is_some() && table.get(500 << PAGE_SHIFT).is_none());
        assert!(table.get(1499 << PAGE_SHIFT).is_none() && table.get(1500 << PAGE_SHIFT).is_some());
        table.take_range(AddressRange::new(0, usize::MAX), &mut |_, _| taken += 1);
        assert_eq!(taken, 2000);
        assert!(table.chunks.is_empty());
    }
}
