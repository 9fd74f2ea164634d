//! The page table of one address space: what the pager knows of every page it has handled.
//!
//! Pages are kept in chunks of 512 (2 MiB of addresses), 32 bytes a page. A page without an entry
//! has never been out: it is either resident and unknown to the servers, or untouched.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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

/// Who holds the slots of chunks beyond the first, and which slots have lost a holder in passing.
#[derive(Debug, Default)]
pub(crate) struct Holders {
    /// Slots with more than one holder: number of holders beyond the first.
    pub(crate) others: HashMap<u64, u32>,
    /// Slots of which a holder is gone that has not been released.
    pub(crate) dropped: Vec<PageIndex>,
}

/// The tables of all spaces and the slots have it in common.
pub(crate) type SharedHolders = Arc<Mutex<Holders>>;

/// Locks it: it is never held for long, nor by two threads.
pub(crate) fn lock(holders: &SharedHolders) -> MutexGuard<'_, Holders> {
    holders.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The entries of one address space.
///
/// A forked child's table begins with the chunks of its parent's, which are copied when one of the
/// two changes them. Each chunk is one holder of the slots in it, however many tables have it.
#[derive(Debug, Default)]
pub(crate) struct PageTable {
    chunks: HashMap<usize, Chunk, BuildHasherDefault<ChunkHasher>>,
    holders: SharedHolders,
}

#[derive(Debug)]
struct Chunk {
    slot: Arc<ChunkSlot>,
    /// It is as an ancestor had it: see [`as_inherited`].
    is_inherited: bool,
}

#[derive(Debug, Clone)]
struct ChunkSlot {
    used: u32,
    /// One bit a page: whether `entries` has it.
    known: [u64; CHUNK_PAGES / 64],
    entries: [Entry; CHUNK_PAGES],
}

/// What a child has of a page of which its parent has this entry. What the parent has in memory the
/// child has too, and its pager knows nothing of it.
fn as_inherited(mut entry: Entry) -> Option<Entry> {
    match entry.place() {
        Place::Resident => None,
        Place::Zero => Some(entry),
        Place::Out | Place::Fetching | Place::Victim(_) => {
            entry.set_place(Place::Out);
            entry.copy().map(|_| entry)
        }
    }
}

impl ChunkSlot {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            used: 0,
            known: [0; CHUNK_PAGES / 64],
            entries: [Entry::new(Place::Zero); CHUNK_PAGES],
        })
    }

    const fn has(&self, index: usize) -> bool {
        self.known[index / 64] & (1 << (index % 64)) != 0
    }

    const fn forget(&mut self, index: usize) {
        self.known[index / 64] &= !(1 << (index % 64));
        self.used -= 1;
    }

    fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        (0..CHUNK_PAGES).filter(|&index| self.has(index))
    }

    /// Makes it what a child has; the copies that the child has not lose a holder.
    fn become_inherited(&mut self, holders: &mut Holders) {
        for index in 0..CHUNK_PAGES {
            if !self.has(index) {
                continue;
            }
            match as_inherited(self.entries[index]) {
                Some(entry) => self.entries[index] = entry,
                None => {
                    holders.dropped.extend(self.entries[index].copy().map(|(slot, _)| slot));
                    self.forget(index);
                }
            }
        }
    }
}

impl Chunk {
    fn get(&self, index: usize) -> Option<Entry> {
        let entry = self.slot.has(index).then(|| self.slot.entries[index])?;
        if self.is_inherited { as_inherited(entry) } else { Some(entry) }
    }

    /// The chunk, to change: this table's own from now on.
    fn own(&mut self, holders: &SharedHolders) -> &mut ChunkSlot {
        let is_shared = Arc::strong_count(&self.slot) > 1;
        if is_shared || self.is_inherited {
            let mut holders = lock(holders);
            if is_shared {
                for index in self.slot.indices() {
                    if let Some((slot, _)) = self.slot.entries[index].copy() {
                        *holders.others.entry(slot.get()).or_insert(0) += 1;
                    }
                }
                self.slot = Arc::new(ChunkSlot::clone(&self.slot));
            }
            if std::mem::take(&mut self.is_inherited) {
                own_slot(&mut self.slot).become_inherited(&mut holders);
            }
        }
        own_slot(&mut self.slot)
    }
}

fn own_slot(slot: &mut Arc<ChunkSlot>) -> &mut ChunkSlot {
    Arc::get_mut(slot).unwrap_or_else(|| unreachable!("a chunk is copied before it is changed"))
}

const fn split(address: usize) -> (usize, usize) {
    let page = address >> PAGE_SHIFT;
    (page >> CHUNK_SHIFT, page & (CHUNK_PAGES - 1))
}

impl PageTable {
    /// An empty one, whose slots are held as is noted there.
    #[must_use]
    pub(crate) fn new(holders: SharedHolders) -> Self {
        Self { chunks: HashMap::default(), holders }
    }

    /// What a forked child begins with. Costs no more than the table has chunks.
    #[must_use]
    pub(crate) fn fork(&self) -> Self {
        let inherit = |chunk: &Chunk| Chunk { slot: Arc::clone(&chunk.slot), is_inherited: true };
        let chunks = self.chunks.iter().map(|(&number, chunk)| (number, inherit(chunk)));
        Self { chunks: chunks.collect(), holders: Arc::clone(&self.holders) }
    }

    /// The entry of the page at `address`.
    #[must_use]
    pub(crate) fn get(&self, address: usize) -> Option<Entry> {
        let (chunk, index) = split(address);
        self.chunks.get(&chunk)?.get(index)
    }

    /// The entry of the page at `address`, to change.
    pub(crate) fn get_mut(&mut self, address: usize) -> Option<&mut Entry> {
        let (number, index) = split(address);
        let chunk = self.chunks.get_mut(&number)?;
        chunk.get(index)?;
        Some(&mut chunk.own(&self.holders).entries[index])
    }

    /// Puts an entry, over an earlier one.
    pub(crate) fn put(&mut self, address: usize, entry: Entry) -> &mut Entry {
        let (number, index) = split(address);
        let empty = || Chunk { slot: ChunkSlot::new(), is_inherited: false };
        let chunk = self.chunks.entry(number).or_insert_with(empty).own(&self.holders);
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
        let entry = chunk.get(index)?;
        let own = chunk.own(&self.holders);
        own.forget(index);
        if own.used == 0 {
            self.chunks.remove(&number);
        }
        Some(entry)
    }

    /// Takes the entries of a range out. Costs no more for a large range than the table has chunks.
    #[must_use]
    pub(crate) fn detach(&mut self, range: AddressRange) -> Detached {
        let whole = Self::new(Arc::clone(&self.holders));
        let mut detached = Detached { whole, edges: Vec::new() };
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
            if part.pages() == CHUNK_PAGES {
                let chunk = self.chunks.remove(&number);
                detached.whole.chunks.extend(chunk.map(|chunk| (number, chunk)));
                continue;
            }
            let addresses = (part.start()..part.end()).step_by(1 << PAGE_SHIFT);
            let entries = addresses.filter_map(|at| self.take(at).map(|entry| (at, entry)));
            detached.edges.extend(entries);
        }
        detached
    }

    /// Takes all entries out.
    #[must_use]
    pub(crate) fn detach_all(&mut self) -> Detached {
        let empty = Self::new(Arc::clone(&self.holders));
        Detached { whole: std::mem::replace(self, empty), edges: Vec::new() }
    }

    /// Calls `each` for every entry, in any order.
    pub(crate) fn for_each(&self, each: &mut dyn FnMut(usize, &Entry)) {
        for (&number, chunk) in &self.chunks {
            for index in 0..CHUNK_PAGES {
                if let Some(entry) = chunk.get(index) {
                    each(((number << CHUNK_SHIFT) + index) << PAGE_SHIFT, &entry);
                }
            }
        }
    }

    /// Calls `each` for every entry, to change it; entries for which it returns false are dropped.
    pub(crate) fn retain(&mut self, each: &mut dyn FnMut(usize, &mut Entry) -> bool) {
        let holders = &self.holders;
        self.chunks.retain(|&number, chunk| {
            let chunk = chunk.own(holders);
            for index in 0..CHUNK_PAGES {
                let address = ((number << CHUNK_SHIFT) + index) << PAGE_SHIFT;
                if chunk.has(index) && !each(address, &mut chunk.entries[index]) {
                    chunk.forget(index);
                }
            }
            chunk.used > 0
        });
    }
}

/// Entries that were taken out of a table, of whatever many pages, and hold their slots. Chunks that lay
/// within the range are here as they were: nothing was copied or allocated for their pages.
#[derive(Debug, Default)]
pub(crate) struct Detached {
    whole: PageTable,
    /// Those of chunks that lay partly within it: of two chunks at most.
    edges: Vec<(usize, Entry)>,
}

impl Detached {
    /// Calls `each` for every entry, in any order.
    pub(crate) fn for_each(&self, each: &mut dyn FnMut(usize, &Entry)) {
        self.edges.iter().for_each(|(address, entry)| each(*address, entry));
        self.whole.for_each(each);
    }

    /// Whether any page has a copy on the servers.
    #[must_use]
    pub(crate) fn has_copies(&self) -> bool {
        let has_copy = |entry: Entry| entry.copy().is_some();
        let of_chunk =
            |chunk: &Chunk| (0..CHUNK_PAGES).any(|index| chunk.get(index).is_some_and(has_copy));
        self.edges.iter().any(|&(_, entry)| has_copy(entry))
            || self.whole.chunks.values().any(of_chunk)
    }

    /// Hands out all entries, in any order; their slots are held by who takes them. Each chunk's memory is
    /// given back before the next one's entries are handed out.
    pub(crate) fn into_entries(self, each: &mut dyn FnMut(usize, Entry)) {
        self.edges.into_iter().for_each(|(address, entry)| each(address, entry));
        let PageTable { chunks, holders } = self.whole;
        for (number, mut chunk) in chunks {
            let own = chunk.own(&holders);
            for index in own.indices() {
                each(((number << CHUNK_SHIFT) + index) << PAGE_SHIFT, own.entries[index]);
            }
        }
    }

    /// Hands out the slots that are held here and by no chunk of another table, each of which has one holder
    /// less now. Costs nothing for chunks that another table has too.
    pub(crate) fn into_slots(self, each: &mut dyn FnMut(PageIndex)) {
        let edges = self.edges.iter().filter_map(|(_, entry)| entry.copy());
        edges.for_each(|(slot, _)| each(slot));
        for (_, Chunk { slot: chunk, .. }) in self.whole.chunks {
            if Arc::strong_count(&chunk) == 1 {
                let entries = chunk.indices().map(|index| &chunk.entries[index]);
                entries.filter_map(Entry::copy).for_each(|(slot, _)| each(slot));
            }
        }
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
        // The second chunk changes hands as it is.
        let second = Arc::as_ptr(&table.chunks[&1].slot);
        let taken = table.detach(AddressRange::pages_from(500 << PAGE_SHIFT, 1000));
        assert_eq!(Arc::as_ptr(&taken.whole.chunks[&1].slot), second);
        assert!(taken.edges.len() == 12 + 1500 - 1024 && taken.whole.chunks.len() == 1);
        let mut pages = Vec::new();
        taken.for_each(&mut |address, _| pages.push(address >> PAGE_SHIFT));
        pages.sort_unstable();
        assert_eq!(pages, (500..1500).collect::<Vec<_>>());
        assert!(table.get(499 << PAGE_SHIFT).is_some() && table.get(500 << PAGE_SHIFT).is_none());
        assert!(table.get(1499 << PAGE_SHIFT).is_none() && table.get(1500 << PAGE_SHIFT).is_some());
        pages.clear();
        let all = table.detach(AddressRange::new(0, usize::MAX));
        all.into_entries(&mut |address, _| pages.push(address >> PAGE_SHIFT));
        pages.sort_unstable();
        assert_eq!(pages, (0..500).chain(1500..2000).collect::<Vec<_>>());
        assert!(table.chunks.is_empty());
    }

    fn entry(place: Place, slot: u64) -> Entry {
        let mut entry = Entry::new(place);
        entry.set_copy(PageIndex::new(slot), Version::new(1), 0);
        entry
    }

    /// Which slots have how many holders beyond the first, and which have lost one.
    fn noted(table: &PageTable) -> (Vec<(u64, u32)>, Vec<u64>) {
        let mut holders = lock(&table.holders);
        let mut others: Vec<_> =
            holders.others.iter().map(|(&slot, &count)| (slot, count)).collect();
        others.sort_unstable();
        let mut dropped: Vec<_> = holders.dropped.drain(..).map(PageIndex::get).collect();
        dropped.sort_unstable();
        (others, dropped)
    }

    /// Cap 21: a child sees what its parent had, neither sees what the other changes, and nothing is
    /// copied before.
    #[test]
    fn a_child_has_its_parents_entries_until_one_of_them_changes_them() {
        let at = |page: usize| page << PAGE_SHIFT;
        let mut parent = PageTable::default();
        parent.put(at(0), entry(Place::Out, 10));
        parent.put(at(1), entry(Place::Resident, 11));
        parent.put(at(2), entry(Place::Victim(FrameId::new(4)), 12));
        parent.put(at(3), Entry::new(Place::Zero));
        parent.put(at(600), entry(Place::Out, 13));
        let mut child = parent.fork();
        assert_eq!(noted(&parent), (vec![], vec![]));
        let places = |table: &PageTable| {
            [0, 1, 2, 3, 600].map(|page| table.get(at(page)).map(|entry| entry.place()))
        };
        let (out, zero) = (Some(Place::Out), Some(Place::Zero));
        assert_eq!(places(&child), [out, None, out, zero, out]);
        assert!(child.get_mut(at(1)).is_none() && child.take(at(1)).is_none());
        // The parent's page comes in: its chunk is its own now, and what was common has two holders.
        parent.get_mut(at(0)).unwrap().set_place(Place::Resident);
        assert_eq!(noted(&parent), (vec![(10, 1), (11, 1), (12, 1)], vec![]));
        assert_eq!(places(&child), [out, None, out, zero, out]);
        // The child, alone with the old chunk, gives up what it does not have.
        assert!(child.take(at(3)).is_some());
        assert_eq!(noted(&parent).1, [11]);
        assert_eq!(places(&child), [out, None, out, None, out]);
        assert_eq!(places(&parent)[2], Some(Place::Victim(FrameId::new(4))));
        // A grandchild, and the end of its parent: it alone has that chunk.
        let mut grandchild = child.fork();
        assert_eq!(released(child.detach_all()), []);
        assert_eq!(places(&grandchild), [out, None, out, None, out]);
        assert_eq!(released(grandchild.detach_all()), [10, 12]);
        assert!(parent.get(at(600)).is_some());
        assert_eq!(released(parent.detach_all()), [10, 11, 12, 13]);
        assert_eq!(noted(&parent).1, []);
    }

    fn released(detached: Detached) -> Vec<u64> {
        let mut slots = Vec::new();
        detached.into_slots(&mut |slot| slots.push(slot.get()));
        slots.sort_unstable();
        slots
    }

    /// What is taken out of a table whose chunks a child has too has the holders of what it is taken out of,
    /// whether it was the parent's or the child's, and whole chunks are still not copied.
    #[test]
    fn what_is_detached_is_held_as_it_was() {
        let at = |page: usize| page << PAGE_SHIFT;
        let all = AddressRange::pages_from(0, CHUNK_PAGES);
        let mut parent = PageTable::default();
        for page in 0..CHUNK_PAGES {
            let place = if page == 7 { Place::Resident } else { Place::Out };
            parent.put(at(page), entry(place, page as u64));
        }
        let mut child = parent.fork();
        let taken = parent.detach(all);
        assert!(taken.has_copies() && parent.get(at(1)).is_none());
        assert_eq!(noted(&parent), (vec![], vec![]));
        assert_eq!(released(taken), [], "the child has them");
        // Page 7 the child never had, and its copy loses its last holder when the others are handed out.
        let mut places = Vec::new();
        let grandchild = child.fork();
        child.detach(all).into_entries(&mut |address, entry| {
            places.push((address >> PAGE_SHIFT, entry.copy().unwrap().0.get()));
        });
        places.sort_unstable();
        let expected = (0..CHUNK_PAGES).filter(|&page| page != 7);
        assert_eq!(places, expected.clone().map(|page| (page, page as u64)).collect::<Vec<_>>());
        let (others, dropped) = noted(&child);
        assert_eq!((others.len(), dropped), (CHUNK_PAGES, vec![7]));
        let mut grandchild = grandchild;
        let part = grandchild.detach(AddressRange::pages_from(at(6), 3));
        assert_eq!(released(part), [6, 8]);
        assert_eq!(noted(&child).1, [7]);
        assert_eq!(released(grandchild.detach_all()).len(), CHUNK_PAGES - 3);
        assert!(!parent.detach(all).has_copies());
    }
}
